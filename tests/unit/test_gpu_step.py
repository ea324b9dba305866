"""What training asks of a GPU, on fake CUDA tensors: the host never waits, layouts and types stay."""

import ctypes
import json
from pathlib import Path
from typing import Any

import fakecuda
import pytest
import torch

from model.dropout import KeyedDropout
from model.lrn import LRN
from model.parallel.ranks import Ranks
from model.training import step

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="fake CUDA tensors need torch's CPU build"
)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return fakecuda.build_guard(tmp_path_factory.mktemp("guard"))


OPTIONS = ("--label-smoothing", 0.1, "--train-error", "--global-batch", 8)
# kernels of forward pass and update, without autocast and with it (13 to 18 copies of weights and maps more)
LAUNCHES = {"paper": (55, 73), "owt": (55, 73), "bn": (65, 78)}
CASES = [
    *(
        (variant, amp, ("--accumulate", parts, "--mixup", mixup))
        for variant in LAUNCHES
        for amp in ("bf16", "fp16", "off")
        for parts in (1, 2)
        for mixup in (0, 0.2)
    ),
    ("paper", "bf16", ("--ema", 0.99)),
    ("paper", "bf16", ("--schedule", "cosine")),
    ("bn", "fp16", ("--optimizer", "lars", "--schedule", "cosine")),
]


def maps(calls: list[fakecuda.Call]) -> list[tuple[str, tuple[int, ...]]]:
    """Activations that are not channels-last: operator and (C, H, W)."""
    results = [(call.name, *result) for call in calls for result in call.results]
    return [
        (name, shape[1:])
        for name, shape, _, device, last in results
        if device == "cuda" and len(shape) == 4 and not last
    ]


@pytest.mark.parametrize(("variant", "amp", "more"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_a_steady_step(
    variant: str, amp: str, more: tuple[object, ...], guard: ctypes.CDLL, dataset: Path, tmp_path: Path
) -> None:
    options = ("--variant", variant, "--amp", amp, *OPTIONS, *more)
    trace = fakecuda.trace_training(guard, dataset, tmp_path / "run", *options)
    steady, given = trace.steady(), dict(zip(more[::2], more[1::2], strict=True))
    parts = int(str(given.get("--accumulate", 1)))
    # the host does not wait for the device, until the log line after the last step
    assert [wait for wait in trace.waits if wait[0] == fakecuda.STEADY] == []
    assert any(phase == f"step {fakecuda.STEPS - 1}" for phase, *_ in trace.waits)
    # activations stay channels-last from the loader to the flatten before the first fully connected layer
    assert maps(steady) == [("clone", (256, 6, 6))] * parts
    on_gpu = [(call, result) for call in steady for result in call.results if result[2] == "cuda"]
    assert [call.name for call, (shape, dtype, *_) in on_gpu if dtype == torch.float64 and shape] == []
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    products = [dtype for call, (_, dtype, *_) in on_gpu if call.name in ("convolution", "addmm", "mm")]
    assert products == [wanted] * 8 * parts
    # CUDA's kernel takes the lists of the fused optimiser
    assert trace.refused == [] and sum(call.name == "_fused_sgd_" for call in steady) == 2
    # forward and update
    assert sum(call.name == "alexnet::dropout" for call in steady) == 2 * parts
    expected = (first := LAUNCHES[variant][amp != "off"]) + (parts - 1) * (first - 6) + 8 * (amp == "fp16")
    expected += (6 + 10 * parts) * bool(given.get("--mixup")) + 4 * ("--ema" in given) + 20 * ("lars" in more)
    assert expected - 3 <= fakecuda.launches(steady) <= expected
    assert torch.backends.cudnn.allow_tf32 == (amp != "off")  # off means float32
    devices = {tensor.device.type for tensor in trace.saved[0]["model"].values()}
    assert len(trace.saved) == 1 and devices == {"cuda"}  # `checkpoint.save` moves them to the CPU


def test_the_first_start_chooses_a_decoder_and_keeps_it(
    guard: ctypes.CDLL, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakecuda.trace_training(guard, dataset, tmp_path / "run", *OPTIONS, "--decoder", "auto")
    assert ", decoder cpu (mixed 1, cpu 2 images/s)" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/config.json").read_text())["decoder"] == "cpu"


def test_deterministic_asks_torch_and_cudnn_for_it(
    guard: ctypes.CDLL, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, warn_only: asked.append(on))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for number, extra in enumerate(([], ["--deterministic"])):
        out = tmp_path / str(number)
        trace = fakecuda.trace_training(guard, dataset, out, "--variant", "owt", *OPTIONS, *extra)
        assert torch.backends.cudnn.benchmark != bool(extra) and asked[-1] == bool(extra)
        # its gradient has no deterministic form
        assert "_adaptive_avg_pool2d" not in {call.name for call in trace.calls}


def test_the_trace_shows_faults(
    guard: ctypes.CDLL, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plants three faults: a copy from the host, a read in each step, a layer that loses the memory format."""
    forward, loss = LRN.forward, step.cross_entropy

    def copies(self: KeyedDropout, key: int, first_row: int) -> None:
        self.position.copy_(torch.tensor([key, first_row]))
        self.keyed = True

    def reads(*arguments: Any) -> torch.Tensor:
        value = loss(*arguments)
        float(value)
        return value

    monkeypatch.setattr(KeyedDropout, "set_position", copies)
    monkeypatch.setattr(step, "cross_entropy", reads)
    monkeypatch.setattr(LRN, "forward", lambda self, x: forward(self, x.contiguous()))
    trace = fakecuda.trace_training(guard, dataset, tmp_path / "run", "--variant", "paper", *OPTIONS)
    waits = [(what, where) for phase, what, where in trace.waits if phase == fakecuda.STEADY]
    assert [what for what, _ in waits] == ["copy_ between devices"] * 2 + ["item"]
    assert waits[-1][1].startswith("model/training/step.py:")
    assert ("alexnet::lrn", (96, 55, 55)) in maps(trace.steady())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("layout", "variant", "rank"),
    [
        ("data", "paper", 1),
        ("hybrid", "paper", 0),
        ("hybrid", "owt", 1),
        ("hybrid", "bn", 0),
        ("towers", "paper", 1),
        ("towers", "bn", 0),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_steady_step_of_one_of_two_ranks(
    layout: str,
    variant: str,
    rank: int,
    amp: str,
    optimizer: str,
    guard: ctypes.CDLL,
    dataset: Path,
    tmp_path: Path,
) -> None:
    options = ("--variant", variant, "--amp", amp, "--layout", layout, "--optimizer", optimizer, *OPTIONS)
    ranks = Ranks(rank, 2, 0, 1, gpu=True)
    trace = fakecuda.trace_training(guard, dataset, tmp_path / "run", *options, ranks=ranks)
    steady = trace.steady()
    assert [wait for wait in trace.waits if wait[0] == fakecuda.STEADY] == []
    computing = {"convolution", "alexnet::lrn", "max_pool2d_with_indices", "relu_", "native_batch_norm"}
    assert not computing & {name for name, _ in maps(steady)}
    names = [call.name for call in steady]
    assert computing & set(names)
    assert trace.refused == [] and names.count("_fused_sgd_") == 2
    # what is sent: inputs of fc6 and fc7, partial sums of fc8; by towers also maps and the edges of LRN
    gathered = {"data": 0, "hybrid": 2, "towers": 7 if variant == "bn" else 6}[layout]
    assert names.count("_c10d_functional::all_gather_into_tensor") == gathered
    assert names.count("_c10d_functional::reduce_scatter_tensor") == (layout != "data")
    # norms of slices, and whether any rank's gradients overflowed
    summed = (optimizer == "lars") + (amp == "fp16") if layout != "data" else 0
    assert names.count("c10d::allreduce_") == summed
    expected = LAUNCHES[variant][1] + 8 * (amp == "fp16") + 20 * (optimizer == "lars")
    assert fakecuda.launches(steady) <= expected + {"data": 0, "hybrid": 14, "towers": 36}[layout]
