"""train.py's switches: each changes only what it should, and checkpoints preserve it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, train_error

import train
from base.errors import ModelError
from model.alexnet import AlexNet
from model.training.config import Config
from model.training.mixup import mix
from model.training.recipe import initialise


def options_of(*arguments: object) -> dict[str, Any]:
    """The Config that train.py makes from `arguments`."""
    return train.main.make_context("train.py", list(map(str, arguments))).params


# --- recipes ---


def recipe_files() -> list[Path]:
    return sorted((ROOT / "recipes").glob("*.json"))


def test_the_papers_recipe_is_the_defaults() -> None:
    """A Config for a million images."""
    given, recipe = (Config(**options_of(*o)) for o in ((), ("--recipe", "paper")))
    given.fill(1_281_167)
    recipe.fill(1_281_167)
    assert recipe == given


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: path.stem)
def test_every_recipe_sets_the_same_options_and_gives_way_to_the_command_line(
    path: Path, tmp_path: Path
) -> None:
    recipe = json.loads(path.read_text())
    # so that diff is readable
    assert recipe.keys() == json.loads((ROOT / "recipes/paper.json").read_text()).keys()
    found = options_of("--recipe", path.stem)
    assert {key: found[key] for key in recipe} == recipe
    changed = options_of("--recipe", path.stem, "--lr", "0.5")
    assert {key for key in found if found[key] != changed[key]} == {"lr"}
    # --config takes precedence over --recipe in any order
    (tmp_path / "config.json").write_text(json.dumps({"lr": 0.25}))
    for order in (["--recipe", path.stem, "--config"], ["--config"]):
        arguments = [*order, tmp_path / "config.json", *([] if len(order) > 1 else ["--recipe", path.stem])]
        both = options_of(*arguments)
        assert {key for key in found if found[key] != both[key]} == {"lr"} and both["lr"] == 0.25


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # cuda-convnet's layers-80sec.cfg and layer-params-80sec.cfg
        ("cifar-80sec", {"epochs": 11, "milestones": "8", "layer_decay": ["fc10=0.03", "fc64=0.03"]}),
        # layers-18pct.cfg and layer-params-18pct.cfg
        ("cifar-18pct", {"epochs": 140, "milestones": "120,130", "layer_decay": ["fc10=1"]}),
    ],
)
def test_the_recipes_for_cifar_are_the_authors(name: str, expected: dict[str, object]) -> None:
    both: dict[str, object] = {
        "variant": name,
        "crop": 32,
        "mean": "pixel",
        "augment": "none",
        "color_std": 0,
    }
    both |= {"global_batch": 128, "lr": 0.001, "bias_lr": 2, "momentum": 0.9, "weight_decay": 0.004}
    both |= {"schedule": "step", "init": "cuda-convnet", "dropout": 0, "warmup_epochs": 0}
    recipe = json.loads((ROOT / f"recipes/{name}.json").read_text())
    assert (both | expected).items() <= recipe.items()


# --- the network's switches ---


def test_the_defaults_are_the_papers_network() -> None:
    assert AlexNet(10).options == {} and AlexNet(10, groups=2, lrn=True, pool=(3, 2)).options == {}


@pytest.mark.parametrize(
    ("options", "gone", "new"),
    [
        ({"drop_layers": ("conv2",)}, {"conv2", "lrn2"}, set()),
        ({"drop_layers": ("conv5", "conv3")}, {"conv3", "act3", "conv5", "act5"}, set()),
        ({"lrn": False}, {"lrn1", "lrn2"}, {"act1", "act2"}),  # LRN computes the ReLU and the pool
        ({"activation": "tanh"}, set(), {"act1", "act2"}),
        ({"groups": 1}, set(), set()),
        ({"pool": (2, 2)}, set(), set()),
    ],
)
def test_each_switch_changes_exactly_what_it_should(
    options: dict[str, Any], gone: set[str], new: set[str]
) -> None:
    whole, changed = AlexNet(5, image_size=96), AlexNet(5, image_size=96, **options)
    before, after = (dict(net.features.named_children()) for net in (whole, changed))
    assert before.keys() - after.keys() == gone and after.keys() - before.keys() == new
    different = {name for name in before.keys() & after.keys() if str(before[name]) != str(after[name])}
    expected = {
        "activation": {"lrn1", "lrn2", "act3", "act4", "act5"},
        "groups": {"conv2", "conv4", "conv5"},
        "pool": {"lrn1", "lrn2", "pool5"},
        "lrn": {"pool1", "pool2"},
    }
    # conv3 and conv4 have other input channels, and pool2 is no longer computed by LRN
    neighbours = {("conv2",): {"conv3", "pool2"}, ("conv5", "conv3"): {"conv4"}}
    key = next(iter(options))
    assert different == expected.get(key, neighbours.get(options.get("drop_layers", ()), set()))
    again = AlexNet(5, image_size=96, **json.loads(json.dumps(changed.options)))
    assert str(again) == str(changed)


def test_biases_of_one_follow_the_papers_numbers_where_a_layer_is_left_out() -> None:
    net = AlexNet(5, image_size=96, drop_layers=("conv3",))
    initialise(net, "paper")
    convolutions = {
        n: net.features.get_parameter(f"{n}.bias")
        for n, _ in net.features.named_children()
        if n.startswith("conv")
    }
    assert {name: float(bias.detach().mean()) for name, bias in convolutions.items()} == {
        "conv1": 0, "conv2": 1, "conv4": 1, "conv5": 1,
    }  # fmt: skip


@pytest.mark.parametrize("variant", ["cifar-80sec", "cifar-18pct"])
def test_the_networks_of_cuda_convnet(variant: str) -> None:
    """Against torch's functions: 3x3 pools with stride 2 that round up, first max, then average pooling."""
    net = AlexNet(10, variant, image_size=32)
    x = 50 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    w, f = net.state_dict(), torch.nn.functional
    hidden = ["fc64"] if variant == "cifar-80sec" else []
    assert [k.split(".")[1] for k in w if k.endswith("weight")] == [
        "conv1",
        "conv2",
        "conv3",
        *hidden,
        "fc10",
    ]
    maps = x
    for layer in (1, 2, 3):
        name = f"features.conv{layer}"
        maps = f.relu(f.conv2d(maps, w[f"{name}.weight"], w[f"{name}.bias"], padding=2))
        # the size of the output is rounded up, with a partial last window
        pad = f.pad(maps, (0, 1, 0, 1), value=-torch.inf if layer == 1 else 0)
        if layer == 1:
            maps = f.max_pool2d(pad, 3, 2)
        else:
            count = f.avg_pool2d(f.pad(torch.ones_like(maps), (0, 1, 0, 1)), 3, 2)  # pixels inside the map
            maps = f.avg_pool2d(pad, 3, 2) / count
        if not hidden and layer < 3:  # rnorm: size 3, scale 5e-5, pow 0.75, within each map
            squares = f.pad(maps**2, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).sum((-1, -2))
            maps = maps / (1 + 5e-5 / 9 * squares) ** 0.75
    assert maps.shape == (2, 64, 4, 4)
    units = maps.flatten(1)
    for name in hidden:
        units = f.relu(f.linear(units, w[f"classifier.{name}.weight"], w[f"classifier.{name}.bias"]))
    logits = f.linear(units, w["classifier.fc10.weight"], w["classifier.fc10.bias"])
    torch.testing.assert_close(net(x), logits, rtol=1e-4, atol=1e-5)
    net.set_position(1, 0)  # there is no dropout to set
    assert "Tanh" in str(AlexNet(10, variant, image_size=24, activation="tanh"))


def test_mixup_blends_pairs_that_never_lie_across_a_border(dataset: Path, tmp_path: Path) -> None:
    """The parts of ranks or micro-batches are blended as the whole batch."""
    odd = ["--mixup", 0.2, "--global-batch", 33, "--gpus", 0]
    assert "even number" in train_error("--data", dataset, "--out", tmp_path, *odd, code=2)
    images, lam = torch.randn(8, 3, 2, 2), torch.rand(8)
    parts = [mix(images[i : i + 2], lam[i : i + 2]) for i in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), mix(images, lam))


def test_options_that_make_no_network_are_refused_in_one_line(dataset: Path, tmp_path: Path) -> None:
    assert "not KERNEL,STRIDE" in train_error("--pool", "3", code=2)
    network = ["--variant", "cifar-18pct", "--groups", 2, "--gpus", 0]
    error = train_error("--data", dataset, "--out", tmp_path / "b", *network)
    assert "for images of 32 pixels" in error
    with pytest.raises(ModelError, match="cannot omit fc6"):
        AlexNet(drop_layers=("fc6",))
