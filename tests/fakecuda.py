"""Runs train.py's `train` on fake CUDA tensors and records every operator: what a GPU would be asked to do.

Fake tensors have a shape, a type, a device and strides, but no memory. torch's CPU build accepts them with three
changes: a device guard (fakecuda.cpp); cuDNN as the backend of convolutions, which torch would ask the device for;
and a `backward` that gives gradients the layout that autograd gives them. The loaders are replaced by batches with
DALI's memory layout. So backward kernels, cuDNN's choices and timings are not tested.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import train
from model.alexnet import AlexNet
from model.parallel.ranks import Ranks
from model.training.config import Config

ROOT = Path(__file__).parents[1]
STEPS = 3  # in the traced epoch; the log line is written after the last
ONE_GPU = Ranks(gpu=True)
STEADY = "step 1"  # the first step may allocate state, the last waits for the log line
aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.item.default)
SIZED_BY_VALUES = ("nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount")
# views, allocations and queries, which launch no kernel
FREE = {
    "view",
    "t",
    "detach",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "expand",
    "transpose",
    "_unsafe_view",
}
FREE |= {
    "alias",
    "permute",
    "unbind",
    "split",
    "as_strided",
    "empty",
    "empty_like",
    "new_empty",
    "lift_fresh",
}
FREE |= {"empty_strided", "new_empty_strided", "_reshape_alias", "set_", "is_pinned", "chunk", "prim::device"}
FREE |= {"profiler::_record_function_enter_new", "profiler::_record_function_exit"}


@dataclass
class Call:
    """An operator and its results, without references to tensors, which would change what autograd does."""

    phase: str
    name: str
    results: list[tuple[tuple[int, ...], torch.dtype, str, bool]]  # shape, dtype, device, channels-last
    where: str


@dataclass
class Trace:
    """The record of one training."""

    calls: list[Call] = field(default_factory=list)
    waits: list[tuple[str, str, str]] = field(default_factory=list)  # phase, what makes the host wait, where
    refused: list[str] = field(default_factory=list)  # the fused optimiser's lists that CUDA's kernel rejects
    saved: list[dict[str, Any]] = field(default_factory=list)

    def steady(self) -> list[Call]:
        return [call for call in self.calls if call.phase == STEADY]


class _Recorder(TorchDispatchMode):
    """Runs operators on fake tensors, records them, and returns numbers for reads from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.trace, self.phase = Trace(), "setup"

    def wait(self, what: str) -> None:
        self.trace.waits.append((self.phase, what, _caller()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [a for a in _pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        devices = {t.device.type for t in inputs}
        name = func._schema.name.removeprefix("aten::")
        if func in READS:
            if "cuda" in devices:
                self.wait("item")
            value = 0.0 if self.phase == "setup" else 1.0
            dtype = args[0].dtype
            return value if dtype.is_floating_point else dtype == torch.bool or int(value)
        if name == "_fused_sgd_":
            self._check_fused(args)
            outputs: list[Tensor] = []
            result = None
        else:
            result = func(*args, **kwargs)
            outputs = [a for a in _pytree.tree_leaves(result) if isinstance(a, Tensor)]
        masks = inputs[1:] if name in ("index", "index_put_", "index_put") else []
        if "cuda" in devices and (name in SIZED_BY_VALUES or any(t.dtype == torch.bool for t in masks)):
            self.wait(name)
        crossing = devices | {t.device.type for t in outputs} == {"cpu", "cuda"}
        # CPU tensors without dimensions are passed as kernel arguments
        if crossing and (
            name in ("_to_copy", "copy_") or any(t.device.type == "cpu" and t.dim() for t in inputs)
        ):
            pinned = name == "_to_copy" and kwargs.get("non_blocking") and getattr(inputs[0], "pinned", False)
            if not pinned:
                self.wait(f"{name} between devices")
        results = [(tuple(t.shape), t.dtype, t.device.type, _channels_last(t)) for t in outputs]
        self.trace.calls.append(Call(self.phase, name, results, _caller()))
        return result

    def _check_fused(self, args: Any) -> None:
        """The requirements of CUDA's list kernels (check_fast_path_restrictions in ForeachUtils.h)."""
        lists = [tensors for tensors in args[:3] if tensors]
        for tensors in zip(*lists, strict=True):
            kinds = {(t.dtype, t.device, t.shape, t.stride()) for t in tensors}
            if len(kinds) > 1:
                self.trace.refused.append(str(kinds))


def _channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def _caller() -> str:
    """The innermost line of the project on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and "tests" not in path.parts and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def build_guard(folder: Path) -> ctypes.CDLL:
    """Compiles fakecuda.cpp with torch's headers, which takes seconds."""
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = sysconfig.get_config_var("CXX") or "c++"
    library = folder / "fakecuda.so"
    includes = [f"-I{path}" for path in include_paths()]
    command = [*compiler.split(), "-O1", "-shared", "-fPIC", "-std=c++20", *includes]
    command += [
        str(Path(__file__).with_suffix(".cpp")),
        f"-L{library_paths()[0]}",
        "-lc10",
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


class _Enough(Exception):
    """Ends training after its steady step."""


class _Batches:
    """A loader of fake batches: NHWC memory, permuted, as DALI's batches arrive through dlpack."""

    def __init__(self, recorder: _Recorder, name: str, sizes: list[int], crop: int, **kind: Any) -> None:
        self.recorder, self.name, self.sizes, self.crop, self.kind = recorder, name, sizes, crop, kind
        self.stops = False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, size in enumerate(self.sizes):
            self.recorder.phase = "loader"
            images = torch.empty(size, self.crop, self.crop, 3, **self.kind).movedim(-1, 1)
            labels = torch.empty(size, dtype=torch.int64, device=self.kind["device"])
            self.recorder.phase = f"{self.name} {number}"
            yield images, labels
        self.recorder.phase = "after"
        if self.stops:
            raise _Enough

    def __next__(self) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "_iterator"):
            self._iterator = iter(self)
        return next(self._iterator)

    def close(self) -> None:
        pass


def _apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """nn.Module._apply without swapping the memory of tensors: fake tensors have none."""
    for child in self.children():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                self._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


@contextmanager
def fake_gpu(guard: ctypes.CDLL) -> Iterator[_Recorder]:
    """A context in which "cuda" tensors are fake and the recorder sees their operators."""
    recorder, networks = _Recorder(), []
    make = AlexNet.__init__

    def noted(self: AlexNet, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        networks.append(self)

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        for parameter in networks[0].parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)

    def memory_format(input: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
        """cuDNN's rule: the result is channels-last if either tensor is."""
        either = any(_channels_last(t) and t.stride(1) == 1 for t in (input, weight))
        return torch.channels_last if either else torch.contiguous_format

    def pinned(self: Tensor) -> Tensor:
        self.pinned = True  # type: ignore[attr-defined]
        return self

    def read(self: Tensor) -> list[float]:
        recorder.wait("tolist")
        return [1.0] * self.numel()

    def deepcopy(self: Tensor, memo: dict[int, Any]) -> Tensor:
        """A copy without the real tensor that a fake constant keeps: copying that too breaks the heap."""
        return memo.setdefault(id(self), self.detach().clone())

    def new_tensor(self: Tensor, data: list[Any], **_: Any) -> Tensor:
        recorder.wait("new_tensor")
        return torch.empty(len(data), dtype=self.dtype, device=self.device)

    patches: dict[str, Any] = {
        "torch.nn.Module._apply": _apply,
        "model.alexnet.AlexNet.__init__": noted,
        "torch.Tensor.backward": backward,
        "torch.Tensor.pin_memory": pinned,
        "torch.Tensor.tolist": read,
        "torch.Tensor.new_tensor": new_tensor,
        "torch.Tensor.__deepcopy__": deepcopy,
        "torch._C._select_conv_backend": lambda *_, **__: torch._C._ConvBackend.Cudnn,  # type: ignore[attr-defined]
        "torch._C._conv_determine_backend_memory_format": memory_format,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.get_device_name": lambda *_: "a card that is not there",
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    }
    with ExitStack() as stack:
        guard.install()  # never removed: tensors freed later need it too
        for target, substitute in patches.items():
            stack.enter_context(mock.patch(target, substitute))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorder)
        yield recorder


def trace_training(
    guard: ctypes.CDLL, data: Path, out: Path, *options: object, ranks: Ranks = ONE_GPU
) -> Trace:
    """Runs one epoch of STEPS steps and its validation with `train.train` and train.py's `options`.

    If `ranks` has several ranks, one of them runs, on torch's fake process group, whose collectives return at once.
    DDP is left out, and training ends after STEADY.
    """
    given = [
        "--data",
        data,
        "--out",
        out,
        "--epochs",
        1,
        "--no-progress",
        "--no-tensorboard",
        "--decoder",
        "mixed",
        *options,
    ]
    with train.main.make_context("train.py", list(map(str, given))) as context:
        config = Config(**context.params)
    config.fill(1000)
    out.mkdir()
    batch = config.global_batch
    assert batch is not None
    with fake_gpu(guard) as recorder:

        def train_batches(*_: Any, world_size: int, dtype: torch.dtype, **__: Any) -> _Batches:
            sizes = [batch // world_size] * (STEPS if ranks.world_size == 1 else 2)
            batches = _Batches(recorder, "step", sizes, config.crop, dtype=dtype, device=ranks.device)
            batches.stops = ranks.world_size > 1
            return batches

        def val_batches(*_: Any, dtype: torch.dtype, **__: Any) -> _Batches:
            sizes = [batch, batch // 2]
            return _Batches(recorder, "validation", sizes, config.crop, dtype=dtype, device=ranks.device)

        def save(path: Path, state: dict[str, Any]) -> None:
            recorder.trace.saved.append(state)
            path.touch()

        substitutes = {
            "pipeline.load.loader.train_loader": train_batches,
            "pipeline.load.loader.eval_loader": val_batches,
            "pipeline.load.plan.Plan.steps_per_epoch": property(lambda self: STEPS),
            "pipeline.load.loader.time_decoders": lambda *_, **__: [1.0, 2.0],
            "model.parallel.ranks.Ranks.sum_of": lambda _, numbers: numbers,
            "model.training.checkpoint.save": save,
            # DDP's reducer is C++ that wants memory
            "model.parallel.layouts.distribute": lambda network, *_: network,
        }
        with ExitStack() as stack, suppress(_Enough):
            if ranks.world_size > 1:
                dist.init_process_group(
                    "fake", store=FakeStore(), rank=ranks.rank, world_size=ranks.world_size
                )
                stack.callback(dist.destroy_process_group)
            for target, substitute in substitutes.items():
                stack.enter_context(mock.patch(target, substitute))
            train.train(ranks, config)
    return recorder.trace


def launches(calls: list[Call]) -> int:
    """About how many kernels a GPU would run for `calls`, which do not include backward."""
    more = {"convolution": 2, "_foreach_lerp_": 2, "_fused_sgd_": 2}
    return sum(more.get(call.name, 1) for call in calls if call.name not in FREE)
