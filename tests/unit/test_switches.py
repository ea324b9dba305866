"""train.py's switches: each changes what it says and nothing else, and comes back from the checkpoint."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from base.errors import ModelError
from model.alexnet import AlexNet
from model.parallel.ranks import Ranks
from model.training.checkpoint import Checkpoints, load, save
from model.training.mixup import mix
from model.training.recipe import initialise
from pipeline.shards import ShardReader
from tools.lib.runs import load_run
from tools.lib.scores import judge

ROOT = Path(__file__).parents[2]
TINY = [
    "--gpus",
    0,
    "--crop",
    63,
    "--global-batch",
    32,
    "--workers",
    0,
    "--decode-threads",
    1,
    "--amp",
    "off",
]
TINY += ["--no-progress", "--no-tensorboard", "--log-every", 1, "--init", "torch", "--lr", 0.003]
MODERN = ["--mixup", 0.4, "--ema", 0.9, "--label-smoothing", 0.1]


def run(data, out, *arguments, code=0):
    command = [sys.executable, ROOT / "train.py", "--data", data, "--out", out, *TINY, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == code, done.stderr
    return done


def options_of(*arguments):
    """What train.py would train with."""
    return train.main.make_context("train.py", list(map(str, arguments))).params


# --- recipes ---


def recipe_files():
    return sorted((ROOT / "recipes").glob("*.json"))


def test_the_papers_recipe_is_the_defaults():
    assert options_of("--recipe", "paper") == options_of() | {"init": "paper"}
    assert {path.stem for path in recipe_files()} == {"paper", "owt", "bn-large-batch", "modern"}


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: path.stem)
def test_every_recipe_sets_the_same_options_and_gives_way_to_the_command_line(path, tmp_path):
    recipe = json.loads(path.read_text())
    assert recipe.keys() == json.loads((ROOT / "recipes/paper.json").read_text()).keys()  # fit for diff
    found = options_of("--recipe", path.stem)
    assert {key: found[key] for key in recipe} == recipe
    changed = options_of("--recipe", path.stem, "--lr", "0.5")
    assert {key for key in found if found[key] != changed[key]} == {"lr"}
    # the config of a whole run says more, whichever is named first
    (tmp_path / "config.json").write_text(json.dumps({"lr": 0.25}))
    for order in (["--recipe", path.stem, "--config"], ["--config"]):
        arguments = [*order, tmp_path / "config.json", *([] if len(order) > 1 else ["--recipe", path.stem])]
        both = options_of(*arguments)
        assert {key for key in found if found[key] != both[key]} == {"lr"} and both["lr"] == 0.25


# --- the network's switches ---


def test_the_defaults_are_the_papers_network():
    assert AlexNet(10).options == {} and AlexNet(10, groups=2, lrn=True, pool=(3, 2)).options == {}


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"drop_layers": ("conv2",)}, {"conv2", "act2", "lrn2"}),
        ({"drop_layers": ("conv5", "conv3")}, {"conv3", "act3", "conv5", "act5"}),
        ({"lrn": False}, {"lrn1", "lrn2"}),
        ({"activation": "tanh"}, set()),
        ({"groups": 1}, set()),
        ({"pool": (2, 2)}, set()),
    ],
)
def test_each_switch_changes_exactly_what_it_should(options, gone):
    whole, changed = AlexNet(5, image_size=96), AlexNet(5, image_size=96, **options)
    before, after = (dict(net.features.named_children()) for net in (whole, changed))
    assert before.keys() - after.keys() == gone and after.keys() <= before.keys()
    different = {name for name in after if str(before[name]) != str(after[name])}
    expected = {
        "activation": {f"act{n}" for n in range(1, 6)},
        "groups": {"conv2", "conv4", "conv5"},
        "pool": {"pool1", "pool2", "pool5"},
    }
    neighbours = {("conv2",): {"conv3"}, ("conv5", "conv3"): {"conv4"}}  # take other channels
    key = next(iter(options))
    assert different == expected.get(key, neighbours.get(options.get("drop_layers"), set()))
    again = AlexNet(5, image_size=96, **json.loads(json.dumps(changed.options)))
    assert str(again) == str(changed)


def test_biases_of_one_follow_the_papers_numbers_where_a_layer_is_left_out():
    net = AlexNet(5, image_size=96, drop_layers=("conv3",))
    initialise(net, "paper")
    convolutions = {n: m.bias for n, m in net.features.named_children() if n.startswith("conv")}
    assert {name: float(bias.detach().mean()) for name, bias in convolutions.items()} == {
        "conv1": 0, "conv2": 1, "conv4": 1, "conv5": 1,
    }  # fmt: skip


def test_the_four_layer_network_of_figure_1():
    """Against torch's functions alone: pools of 3 and 2 that round up, the first a maximum, the others means."""
    net = AlexNet(10, "cifar", image_size=32)
    x = 50 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    w, f = net.state_dict(), torch.nn.functional
    assert [k for k in w if k.endswith("weight")] == [
        "features.conv1.weight", "features.conv2.weight", "features.conv3.weight", "classifier.fc4.weight",
    ]  # fmt: skip
    maps = x / 64
    for layer in (1, 2, 3):
        name = f"features.conv{layer}"
        maps = f.relu(f.conv2d(maps, w[f"{name}.weight"], w[f"{name}.bias"], padding=2))
        pad = f.pad(
            maps, (0, 1, 0, 1), value=-torch.inf if layer == 1 else 0
        )  # rounds up: a last half window
        if layer == 1:
            maps = f.max_pool2d(pad, 3, 2)
        else:
            count = f.avg_pool2d(f.pad(torch.ones_like(maps), (0, 1, 0, 1)), 3, 2)  # mean of what is there
            maps = f.avg_pool2d(pad, 3, 2) / count
    assert maps.shape == (2, 64, 4, 4)
    logits = f.linear(maps.flatten(1), w["classifier.fc4.weight"], w["classifier.fc4.bias"])
    torch.testing.assert_close(net(x), logits, rtol=1e-4, atol=1e-5)
    net.set_position(1, 0)  # without dropout, nothing to set
    assert "Tanh" in str(AlexNet(10, "cifar", image_size=24, activation="tanh"))


@pytest.fixture(scope="module")
def switched(dataset, tmp_path_factory):
    """A run of two epochs with everything turned."""
    out = tmp_path_factory.mktemp("runs") / "switched"
    arguments = ["--no-lrn", "--groups", 1, "--pool", "2,2", "--drop-layer", "conv3", "--activation", "tanh"]
    run(dataset, out, "--epochs", 2, *arguments, *MODERN, "--train-error")
    return out


def test_the_tools_rebuild_the_network_and_judge_the_averaged_weights(switched, dataset):
    saved = Checkpoints(switched).newest()
    assert saved["network"] == {
        "activation": "tanh", "groups": 1, "lrn": False, "pool": [2, 2], "drop_layers": ["conv3"],
    }  # fmt: skip
    trained = load_run(Checkpoints(switched).paths()[0])
    assert "conv3" not in dict(trained.network.features.named_children())
    for key, value in trained.network.state_dict().items():
        assert torch.equal(value, saved["ema"]["model"][key])
    assert any(not torch.equal(saved["model"][k], saved["ema"]["model"][k]) for k in saved["model"])
    logged = [json.loads(line) for line in (switched / "log.jsonl").read_text().splitlines()]
    (scores,) = judge([trained], ShardReader(dataset / "val"), Ranks(), workers=0, progress=False)
    ours = scores.overall()
    validation = [entry for entry in logged if entry["kind"] == "val"][-1]
    assert ours["top1"] == validation["top1"] and ours["loss"] == pytest.approx(validation["loss"], rel=1e-5)
    errors = [entry["error"] for entry in logged if entry["kind"] == "train"]
    assert len(errors) == 6 and all(error * 32 == pytest.approx(round(error * 32)) for error in errors)


def test_mixup_and_averaging_resume_in_mid_epoch_bit_for_bit(switched, dataset, tmp_path):
    """The checkpoint of step 4, in the middle of the second epoch, goes on to the same weights and averages."""
    arguments = ["--no-lrn", "--groups", 1, "--pool", "2,2", "--drop-layer", "conv3", "--activation", "tanh"]
    out = tmp_path / "part"
    options = ["--epochs", 2, *arguments, *MODERN, "--train-error", "--save-every", 4]
    run(dataset, out, *options)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
    for path in Checkpoints(out).paths():
        if load(path)["step"] > 4:
            path.unlink()
    assert Checkpoints(out).newest()["step"] == 4
    run(dataset, out, "--resume")
    whole, resumed = Checkpoints(switched).newest(), Checkpoints(out).newest()
    assert whole["step"] == resumed["step"] == 6 and whole["ema"]["steps"] == resumed["ema"]["steps"] == 6
    for a, b in ((whole["model"], resumed["model"]), (whole["ema"]["model"], resumed["ema"]["model"])):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_mixup_is_the_same_for_any_number_of_parts_and_ranks(dataset, tmp_path):
    run(dataset, tmp_path / "one", "--epochs", 1, *MODERN)
    run(dataset, tmp_path / "two", "--epochs", 1, *MODERN, "--cpu-ranks", 2, "--accumulate", 2)
    one, two = (Checkpoints(tmp_path / name).newest() for name in ("one", "two"))
    for part in (lambda s: s["model"], lambda s: s["ema"]["model"]):
        for key, value in part(one).items():
            torch.testing.assert_close(value, part(two)[key], atol=5e-5, rtol=1e-3)
    odd = ["--mixup", 0.2, "--global-batch", 33]
    assert "even batch" in run(dataset, tmp_path / "odd", *odd, code=2).stderr
    # a pair never lies across a border of ranks or parts: blending the parts is blending the whole
    images, keep = torch.randn(8, 3, 2, 2), torch.rand(8)
    parts = [mix(images[i : i + 2], keep[i : i + 2]) for i in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), mix(images, keep))


def test_a_resume_with_other_switches_is_refused(switched, dataset, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(switched, out)
    for option, name in ((["--lrn"], "lrn"), (["--groups", 2], "groups"), (["--ema", 0.5], "ema")):
        assert f"has {name} " in run(dataset, out, "--resume", *option, code=1).stderr
    # also where the config was changed by hand: the checkpoint itself knows
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"pool": "3,2"}))
    assert "has network {" in run(dataset, out, "--resume", code=1).stderr
    (out / "config.json").write_text(json.dumps(config | {"ema": 0}))
    assert "--ema" in run(dataset, out, "--resume", code=1).stderr


def test_checkpoints_from_before_the_switches_still_load_and_resume(dataset, tmp_path):
    out = tmp_path / "old"
    run(dataset, out, "--epochs", 1)
    path = Checkpoints(out).paths()[0]
    state = load(path)
    for key in ("network", "ema"):
        del state[key]
    del state["identity"]["network"]
    save(path, state)
    config = json.loads((out / "config.json").read_text())
    new = ("activation", "groups", "lrn", "pool", "drop_layer", "stride", "label_smoothing", "mixup", "ema")
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in new}))
    assert load_run(path).step == 3
    run(dataset, out, "--resume", "--epochs", 2)
    assert Checkpoints(out).newest()["step"] == 6


def test_options_that_make_no_network_are_refused_in_one_line(dataset, tmp_path):
    assert "not KERNEL,STRIDE" in run(dataset, tmp_path / "a", "--pool", "3", code=2).stderr
    error = run(dataset, tmp_path / "b", "--variant", "cifar", "--groups", 2, code=1).stderr
    assert "variant cifar has no groups" in error and "Traceback" not in error
    with pytest.raises(ModelError, match="cannot drop fc6"):
        AlexNet(drop_layers=("fc6",))
