"""Checkpoints with a valid checksum and malicious content: refused in one line, whoever reads them."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run
from torch import Tensor

from base.errors import ModelError
from model.parallel.ranks import Ranks
from model.training import checkpoint
from model.training.config import Config
from model.training.state import TrainState
from model.training.weights import load_weights
from pipeline.load.plan import Plan
from pipeline.preprocess import Preprocess
from pipeline.shards import Manifest
from tools.lib import samples
from tools.lib.runs import load_run

SIZE = 32  # of the crops: the networks for CIFAR are small
HUGE = 10**9


@pytest.fixture(scope="module")
def good(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = make_run(tmp_path_factory.mktemp("run"), dataset, "cifar-80sec", crop=SIZE)
    return checkpoint.load(run / "best.pt")


def check_line(error: ModelError, path: Path) -> None:
    assert "\n" not in error.message and error.message.startswith(f"{path} is not a checkpoint"), (
        error.message
    )


@pytest.mark.parametrize(
    "change",
    [
        {"variant": 5},
        {"variant": [1]},
        {"network": [1]},
        *({"network": {"pool": pool}} for pool in ("x", [0, 0], [3, HUGE], [3.5, 2], [3])),
        *({"network": {"stride": stride}} for stride in (0, "4", 1.5)),
        {"network": {"groups": 7}},
        {"network": {"lrn": [1]}},
        {"network": {"drop_layers": [5]}},
        {"network": {"activation": [1]}},
        {"network": {5: 1}},
        {"network": {"num_classes": HUGE}},
        {"network": {"image_size": HUGE}},
        {"classes": []},
        {"classes": [{"wnid": "x", "name": None}] * 12},
        {"ema": [1]},
        {"ema": 7},
        {"ema": {"model": {}}},
        {"best": "x"},
        {"preprocess": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", ["cifar-80sec", "paper"])
def test_networks_that_do_not_exist(
    good: dict[str, Any], tmp_path: Path, variant: str, change: dict[str, Any]
) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, good | {"variant": variant} | change)
    with pytest.raises(ModelError) as caught:
        load_run(path)
    check_line(caught.value, path)
    with contextlib.suppress(ModelError):  # --weights does not use all of these entries
        load_weights(path)


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "complex": lambda t: torch.complex(t, t),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "expanded": lambda t: torch.zeros(1).expand(t.shape),
    "cut": lambda t: t[:1],
}


@pytest.mark.parametrize("kind", [*WEIGHTS, "not finite", "empty", "numbers as names"])
def test_weights_that_are_none(good: dict[str, Any], tmp_path: Path, kind: str) -> None:
    path, model = tmp_path / "c.pt", good["model"]
    if kind in WEIGHTS:
        model = {name: WEIGHTS[kind](tensor) for name, tensor in model.items()}
    elif kind == "not finite":
        model = {name: tensor * float("nan") for name, tensor in model.items()}
    else:
        model = {} if kind == "empty" else {5: torch.zeros(1)}
    checkpoint.save(path, good | {"model": model})
    with pytest.raises(ModelError) as caught:
        load_run(path)
    if kind == "not finite":  # train.py wrote it
        assert caught.value.message.startswith(f"the weights in {path} are not finite: give")
    else:
        check_line(caught.value, path)
        network = load_run_of(good, tmp_path)
        with pytest.raises(ModelError) as caught:
            load_weights(path).into(network)
        assert "\n" not in caught.value.message


def load_run_of(state: dict[str, Any], folder: Path) -> torch.nn.Module:
    checkpoint.save(folder / "good.pt", state)
    return load_run(folder / "good.pt").network


def test_weights_that_overflow_give_no_guesses(good: dict[str, Any], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.pt", good | {"model": {n: t + 1e38 for n, t in good["model"].items()}})
    image = torch.full((256, 256, 3), 255, dtype=torch.uint8).numpy()
    with pytest.raises(ModelError, match="overflows on these images"):
        samples.predict(load_run(tmp_path / "c.pt"), [("x", image)], 2, torch.device("cpu"))


@pytest.fixture
def state(dataset: Path, tmp_path: Path) -> TrainState:
    manifest = Manifest.load(dataset / "train")
    config = Config(data=dataset, out=tmp_path, variant="cifar-80sec", crop=SIZE, amp="off")
    config.fill(manifest.count)
    preprocess = Preprocess.load(dataset / "train", SIZE)
    return TrainState(config, Ranks(), Plan(manifest.count, 16), manifest.classes, preprocess)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": None},
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"optimizer": {"state": {}, "param_groups": [{"params": [0]}] * 2}},
        {"schedule": {}},
        {"schedule": {"drops": "x", "best": 0.5, "bad_epochs": 0}},
        {"watch": {}},
        {"watch": [1]},
        {"watch": {"add": 1}},
        {"watch": {"learnt": False, "warned": False, "recent": [(1.0, float("inf"), torch.zeros(4))]}},
        {"identity": None},
        {"identity": {}},
        {"ema": {"model": {}}},
        {"ema": [1]},
        {"model": {}},
        {"step": None},
    ],
    ids=str,
)
def test_a_run_does_not_resume_from_them(state: TrainState, tmp_path: Path, change: dict[str, Any]) -> None:
    state.save()
    path = tmp_path / "checkpoint-000000000.pt"
    good = checkpoint.load(path)
    state.resume(print)
    checkpoint.save(path, good | change)
    with pytest.raises(ModelError) as caught:
        state.resume(print)
    assert "\n" not in caught.value.message and str(tmp_path) in caught.value.message


def test_a_run_does_not_resume_with_momentum_of_another_shape(state: TrainState, tmp_path: Path) -> None:
    state.save()
    path = tmp_path / "checkpoint-000000000.pt"
    good = checkpoint.load(path)
    good["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(1)
    checkpoint.save(path, good)
    with pytest.raises(ModelError, match=r"does not fit this run \(its optimiser state of features\.conv1"):
        state.resume(print)


def test_a_device_without_memory_is_not_blamed_on_the_checkpoint(
    state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    state.save()
    monkeypatch.setattr(state.layout, "load_optimizer_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError):
        state.resume(print)
