"""--weights: runs, torchvision's state dicts and safetensors; layers that fit and layers that do not."""

import json
import os
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from click.testing import CliRunner
from helpers import CROP, make_run, newest, train_here
from safetensors.torch import save_file

from base.errors import ModelError
from model.alexnet import AlexNet
from model.training import checkpoint
from model.training.checkpoint import find, load, unpack
from model.training.config import Config, command, given_options
from model.training.weights import IMAGENET_STD, load_weights
from pipeline.preprocess import IMAGENET_MEAN


def torchvision_state(classes: int) -> dict[str, Any]:
    """The state dict of torchvision's alexnet, which equals that of `owt` by another test."""
    torch.manual_seed(1)
    return AlexNet(classes, "owt").state_dict()


def test_torchvisions_weights_take_its_mean_and_scale(tmp_path: Path) -> None:
    state = torchvision_state(1000)
    torch.save(state, tmp_path / "alexnet.pth")
    weights = load_weights(tmp_path / "alexnet.pth")
    assert (weights.variant, weights.mean) == ("owt", "imagenet")
    ours, theirs = AlexNet(1000, "owt").eval(), AlexNet(1000, "owt").eval()
    assert weights.into(ours) == f"8 layers of {tmp_path / 'alexnet.pth'}"
    theirs.load_state_dict(state)
    levels = torch.randint(0, 256, (2, 3, 224, 224)).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(
        ours(levels - 255 * mean), theirs((levels / 255 - mean) / std), atol=1e-4, rtol=1e-3
    )


def test_the_last_layer_begins_anew_where_classes_differ(tmp_path: Path) -> None:
    torch.save(torchvision_state(1000), tmp_path / "a.pth")
    network = AlexNet(5, "owt")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert load_weights(tmp_path / "a.pth").into(network).endswith("with new weights for classifier.6")
    after = network.state_dict()
    assert torch.equal(before["classifier.6.weight"], after["classifier.6.weight"])
    assert not torch.equal(before["classifier.4.weight"], after["classifier.4.weight"])


def test_a_run_and_its_exported_safetensors_give_the_same_network(dataset: Path, tmp_path: Path) -> None:
    from tools.lib.formats import to_safetensors
    from tools.lib.runs import load_run

    run = make_run(tmp_path / "run", dataset, drop_layers=["conv3"], activation="tanh")
    to_safetensors(load_run(run), tmp_path / "net.safetensors")
    for path in (run, find(run), tmp_path / "net.safetensors"):
        weights = load_weights(path)
        assert weights.variant == "paper" and weights.mean == "pixel"
        assert weights.options == {"drop_layers": ["conv3"], "activation": "tanh"}
        network = AlexNet(4, image_size=CROP, **weights.options)
        weights.into(network)
        saved = load(find(run))["model"]
        assert all(torch.equal(saved[name], value) for name, value in network.state_dict().items())


def test_files_of_anything_else_are_refused_in_one_line(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    for name in ("text.pth", "other.pth", "list.pth", "x.safetensors", "cut.safetensors", "none.pth", "none"):
        with pytest.raises(ModelError) as error:
            load_weights(tmp_path / name)
        assert "\n" not in error.value.message and name in error.value.message
    torch.save(torchvision_state(3), tmp_path / "a.pth")
    with pytest.raises(ModelError, match="weights of another network"):
        load_weights(tmp_path / "a.pth").into(AlexNet(3))


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_weights_that_are_a_pipe_are_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match=f"cannot read .*{name}.*not a regular file"):
        load_weights(tmp_path / name)


def test_weights_that_unfold_are_refused_before_they_do(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1 << 20)}, tmp_path / "a.pth")
    with ZipFile(tmp_path / "a.pth") as plain, ZipFile(tmp_path / "b.pth", "w", ZIP_DEFLATED) as deflated:
        for member in plain.namelist():
            deflated.writestr(member, plain.read(member))
    assert (tmp_path / "b.pth").stat().st_size < 1 << 16
    with pytest.raises(ValueError, match="it is compressed"):
        unpack((tmp_path / "b.pth").read_bytes())
    with pytest.raises(ModelError, match="not a file of weights"):
        load_weights(tmp_path / "b.pth")


def test_a_training_begins_with_frozen_convolutions(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another run and with its options. The file is read once, and not at all to resume."""
    reads: list[Path] = []

    def counted(path: Path, *remedy: str) -> dict[str, Any]:
        reads.append(path)
        return load(path, *remedy)

    monkeypatch.setattr(checkpoint, "load", counted)
    run = make_run(tmp_path / "old", dataset, "bn", pool=(2, 2))
    options = [
        "--data",
        dataset,
        "--out",
        tmp_path / "new",
        "--crop",
        CROP,
        "--weights",
        run,
        "--freeze",
        "features",
    ]
    done = train_here(*options, "--epochs", 1)
    assert done.exit_code == 0, done.output
    assert "starting from" in done.output and "frozen" in done.output
    assert reads == [run / "best.pt"]
    old, new = load(find(run))["model"], newest(tmp_path / "new")
    assert (new["variant"], new["network"]) == ("bn", {"pool": [2, 2]})
    for name, value in new["model"].items():
        frozen = name.startswith("features.")
        assert torch.equal(value, old[name]) == frozen, name
    (run / "best.pt").unlink()
    done = train_here("--out", tmp_path / "new", "--resume", "--epochs", 2)
    assert done.exit_code == 0 and newest(tmp_path / "new")["step"] == 2 * new["step"], done.output


def test_a_training_begins_with_torchvisions_weights(dataset: Path, tmp_path: Path) -> None:
    """Of seven classes, on photographs of four: with torchvision's mean and scale, and a new last layer."""
    state = torchvision_state(7)
    torch.save(state, tmp_path / "alexnet.pth")
    options = ["--data", dataset, "--out", tmp_path / "run", "--crop", CROP, "--freeze", "features"]
    done = train_here(*options, "--weights", tmp_path / "alexnet.pth", "--epochs", 1)
    assert (
        done.exit_code == 0 and "with new weights for classifier.6; the convolutions are froz" in done.output
    )
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["variant"], config["mean"], config["crop"]) == ("owt", "imagenet", CROP)
    trained = newest(tmp_path / "run")["model"]
    assert trained["classifier.6.weight"].shape == (4, 4096)
    # pixels are not divided by 255 and the deviation here, so the first convolution is
    scale = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    torch.testing.assert_close(trained["features.0.weight"] * scale, state["features.0.weight"])
    assert torch.equal(trained["features.3.weight"], state["features.3.weight"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {"activation": "tanh", "pool": "2,2", "stride": 1, "crop": 67, "lrn": False, "mean": "channel"}),
        (
            ["--activation", "relu", "--pool", "3,2", "--stride", "4", "--crop", "224", "--lrn"],
            {"activation": "relu", "pool": "3,2", "stride": 4, "crop": 224, "lrn": True, "mean": "channel"},
        ),
        (["--variant", "bn"], {"variant": "bn", "activation": "relu", "pool": "3,2", "lrn": None}),
        # files have all options: only what they change is given
        (
            ["--recipe", "paper"],
            {"activation": "tanh", "pool": "2,2", "stride": 1, "crop": 67, "mean": "pixel"},
        ),
        (
            ["--config", "FILE"],
            {"activation": "tanh", "pool": "2,2", "stride": 2, "crop": 67, "mean": "channel"},
        ),
    ],
)
def test_options_that_are_given_win_over_those_of_the_weights(
    given: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    """Also if they are the defaults."""
    (tmp_path / "config.json").write_text(json.dumps({"activation": "relu", "stride": 2, "crop": 224}))
    given = [str(tmp_path / "config.json") if option == "FILE" else option for option in given]
    taken: list[Config] = []

    def work(config: Config) -> None:
        options = {"activation": "tanh", "pool": (2, 2), "stride": 1, "lrn": False}
        config.take_network(given_options(), "paper", "channel", 67, options)
        taken.append(config)

    done = CliRunner().invoke(command(work), ["--out", "x", *given])
    assert done.exit_code == 0, done.output
    assert expected.items() <= vars(taken[0]).items()


def test_bad_use_writes_nothing(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--data", dataset, "--out", out, "--crop", 63]
    torch.save(torchvision_state(4), tmp_path / "a.pth")
    for arguments, code, message in (
        (["--freeze", "features"], 2, "give --weights too"),
        (["--recipe", "cifar-18pct"], 1, "for images of 32 pixels"),
        (["--weights", tmp_path / "none.pth"], 1, "cannot read"),
        (["--weights", tmp_path / "a.pth", "--variant", "paper"], 1, "weights of another network"),
        (["--init", "cuda-convnet"], 1, "cifar-80sec"),
    ):
        done = train_here(*options, *arguments)
        assert done.exit_code == code and message in done.output, done.output
        assert not out.exists()
