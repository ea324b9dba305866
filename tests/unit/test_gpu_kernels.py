"""The Triton kernels without a GPU: their results in Triton's interpreter, and their machine code for each card.

The interpreter truncates to bfloat16, which GPUs round to, so results are tested in float32 and float16.
"""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import model.dropout
import model.lrn
from model import kernels
from model.dropout import KeyedDropout
from model.lrn import local_response_norm

triton = pytest.importorskip("triton", reason="needs Triton: pip install -c .venv/pins.txt -e '.[triton]'")


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """model.triton_kernels for CPU tensors: Triton reads this setting when a kernel is defined."""
    spec = importlib.util.find_spec("model.triton_kernels")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_the_cpu(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """LRN and dropout take the interpreted kernels for CPU tensors."""
    monkeypatch.setattr(kernels, "triton_kernels", lambda device: interpreted)
    # Triton 3.5's interpreter leaves its functions in triton.language, after which no kernel compiles
    language = triton.language
    places = [language, language.core, language.math, language.tensor, language.dtype]
    places.append(language.core.tensor_descriptor_base)
    before = [dict(vars(place)) for place in places]
    yield interpreted
    for place, members in zip(places, before, strict=True):
        for name, member in dict(vars(place)).items():
            if name not in members:
                delattr(place, name)
            elif members[name] is not member:
                setattr(place, name, members[name])


def noise(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# float16 has 11 significant bits: rounding once changes a result by at most 2**-11 of it
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float16, 2**-11)])
@pytest.mark.parametrize(("channels", "size"), [(1, 5), (2, 5), (3, 5), (5, 3), (16, 1), (96, 5), (260, 5)])
@pytest.mark.parametrize("relu", [False, True])
def test_lrn_is_the_formula(
    on_the_cpu: ModuleType, channels: int, size: int, dtype: torch.dtype, rounding: float, relu: bool
) -> None:
    x = noise(2, channels, 3, 1, spread=30).to(dtype).contiguous(memory_format=torch.channels_last)
    grad = noise(2, channels, 3, 1, seed=1).to(dtype)  # not channels-last
    wide = x.double().requires_grad_()
    exact = local_response_norm(wide.relu() if relu else wide, size, 1e-3, 0.75, 2.0, "eager")
    (exact_grad,) = torch.autograd.grad(exact, wide, grad.double())
    x.requires_grad_()
    y = local_response_norm(x, size, 1e-3, 0.75, 2.0, "triton", relu)
    (x_grad,) = torch.autograd.grad(y, x, grad)
    for found, expected in ((y, exact), (x_grad, exact_grad)):
        assert found.dtype == dtype and found.stride() == x.stride()
        torch.testing.assert_close(found.double(), expected.detach(), rtol=rounding, atol=2e-6)


def test_lrn_keeps_its_input_alone_and_takes_no_rows(on_the_cpu: ModuleType) -> None:
    kept: list[Tensor] = []
    x = noise(2, 8, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        local_response_norm(x, backend="triton")
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    assert local_response_norm(torch.ones(0, 8, 3, 3), backend="triton").shape == (0, 8, 3, 3)


@pytest.mark.parametrize(
    ("dtype", "shape", "beta"), [(torch.float64, (2, 8, 3, 3), 0.75), (torch.float32, (2, 8, 3, 3), 0.5)]
)
def test_lrn_that_the_kernels_do_not_take_is_the_formula(
    on_the_cpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    beta: float,
) -> None:
    monkeypatch.setattr(model.lrn, "_library", lambda size: None)
    x = noise(*shape).to(dtype).contiguous(memory_format=torch.channels_last)
    expected = local_response_norm(x, beta=beta, backend="eager")
    assert torch.equal(local_response_norm(x, beta=beta), expected)


# p, salt, key, first row, parts and their stride, slice of the units, rows, units
PLACES = [
    (0.5, 6, 2**63 - 1, 0, 1, 0, 0, 3, 4096),
    (0.5, 7, 0x1234_5678_9ABC_DEF, 96, 1, 0, 0, 5, 100),
    (0.01, 6, 5, 2**33 + 1, 1, 0, 0, 3, 64),
    (0.3, 6, 2**40 + 7, 64, 2, 64, 1, 8, 512),
    (0.9, 7, 0, 3, 4, 32, 3, 8, 1000),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("place", PLACES)
def test_dropout_is_bit_for_bit_the_formulas(
    on_the_cpu: ModuleType, place: tuple[Any, ...], dtype: torch.dtype
) -> None:
    p, salt, key, first_row, parts, stride, unit_slice, rows, units = place
    layer = KeyedDropout(p, salt)
    layer.parts, layer.stride, layer.unit_slice = parts, stride, unit_slice
    layer.set_position(key, first_row)
    x, grad = noise(rows, units).to(dtype).requires_grad_(), noise(rows, units, seed=1).to(dtype)
    expected = layer(x)  # on the CPU: the formula
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = torch.ops.alexnet.dropout(x, layer.position, *layer._options)
    (x_grad,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(y, expected) and torch.equal(x_grad, expected_grad)
    assert [t.data_ptr() for t in kept] == [layer.position.data_ptr()]  # and no mask


def test_a_gradient_after_the_position_has_moved_is_refused() -> None:
    layer, x = KeyedDropout(0.5, salt=6), noise(4, 8).requires_grad_()
    layer.set_position(1, 0)
    y = torch.ops.alexnet.dropout(x, layer.position, *layer._options)
    layer.set_position(2, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_where_the_kernels_do_not_run_a_gpu_uses_the_formulas_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler\nmore lines")

    from model import triton_kernels

    monkeypatch.setattr(triton_kernels, "lrn_forward", broken)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: None)
    with pytest.warns(
        UserWarning, match="use torch's operators, which are slower: Failed to find C compiler$"
    ):
        assert kernels.triton_kernels.__wrapped__(torch.device("cuda", 0)) is None
    assert kernels.triton_kernels.__wrapped__(torch.device("cpu")) is None


# --- machine code, which ptxas makes without a GPU ---------------------------------------------------------------

CARDS = {75: "*fp16", 80: "*bf16", 86: "*bf16", 90: "*bf16", 100: "*bf16", 120: "*bf16"}
ALIGNED = [["tt.divisibility", 16]]
KERNELS: dict[str, dict[str, int]] = {
    "_lrn_forward": {"C": 96, "HALF": 2, "BLOCK": 1024},
    "_lrn_backward": {"C": 256, "HALF": 2, "BLOCK": 512},
    "_dropout": {"UNITS": 4096, "PARTS": 1, "BLOCK": 1024},
}
FLOATS = {"alpha", "k", "floor", "scale"}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("card", CARDS)
def test_kernels_compile_for_every_card_without_spills(
    name: str, card: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import __file__ as backend
    from triton.compiler import ASTSource

    from model import triton_kernels

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    kernel, constants = getattr(triton_kernels, name), KERNELS[name]

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument.endswith("_ptr"):
            return "*i64" if argument == "position_ptr" else CARDS[card]
        return "fp32" if argument in FLOATS else "i32"

    names = kernel.arg_names
    aligned = {
        (i,): ALIGNED for i, argument in enumerate(names) if argument.endswith("_ptr") or argument == "numel"
    }
    source = ASTSource(kernel, {argument: kind(argument) for argument in names}, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(backend).parent / "bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    use = {what: int(count) for what, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert use["STACK"] == use["LOCAL"] == 0
    assert use["REG"] <= 80  # at least 24 warps on a multiprocessor with 65,536 registers
    width = {"_lrn_backward": "v2"}.get(name, "v4")  # 4 or 8 halves per thread: stores of 8 or 16 bytes
    assert re.search(rf"st\.global\.\S*{width}\.b32", compiled.asm["ptx"])
