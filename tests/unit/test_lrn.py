"""Local response normalisation against the paper's formula, written as slow loops in float64."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import needs_compiler
from torch._subclasses import FakeTensorMode

import native
from base.errors import ModelError
from model.lrn import LRN, local_response_norm


def paper(
    a: torch.Tensor, n: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
) -> torch.Tensor:
    """Section 3.3, index by index: kernel i of N, over j = max(0, i-n/2) .. min(N-1, i+n/2)."""
    x = a.detach().double().numpy()
    channels = x.shape[1]
    b = np.empty_like(x)
    for i in range(channels):
        total = np.zeros_like(x[:, i])
        for j in range(max(0, i - n // 2), min(channels - 1, i + n // 2) + 1):
            total += x[:, j] ** 2
        b[:, i] = x[:, i] / (k + alpha * total) ** beta
    return torch.from_numpy(b)


def activations(
    *shape: int, dtype: torch.dtype = torch.float32, spread: float = 30.0, channels_last: bool = True
) -> torch.Tensor:
    """Random activations, large enough for the sum to matter compared with k = 2."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(spread).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else x


backends = pytest.mark.parametrize("backend", ["eager", pytest.param("native", marks=needs_compiler)])


@backends
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 16, 33, 96, 256, 700])
def test_forward_is_the_papers_formula(backend: str, channels: int) -> None:
    x = activations(2, channels, 3, 7)
    y = local_response_norm(x, backend=backend)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    torch.testing.assert_close(y.double(), paper(x), rtol=1e-6, atol=1e-6)


@backends
@pytest.mark.parametrize("size", [1, 3, 5, 7, 11])
def test_window_sizes(backend: str, size: int) -> None:
    x = activations(2, 8, 3, 5)
    y = local_response_norm(x, size=size, alpha=3e-4, k=1.0, backend=backend)
    torch.testing.assert_close(y.double(), paper(x, size, 3e-4, 0.75, 1.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_other_powers_fall_back_on_the_formula(beta: float) -> None:
    x = activations(2, 8, 3, 5)
    torch.testing.assert_close(
        local_response_norm(x, beta=beta).double(), paper(x, beta=beta), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(4, 7), (2, 7, 9), (2, 7, 3, 4), (2, 7, 3, 4, 2), (0, 7, 3, 4)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    x = activations(*shape)
    torch.testing.assert_close(local_response_norm(x).double(), paper(x), rtol=1e-6, atol=1e-6)


def test_layouts() -> None:
    x = activations(3, 16, 6, 5)
    for y in (x.contiguous(), x, x[:, :, ::2], x[:, 2:9]):
        out = local_response_norm(y)
        torch.testing.assert_close(out.double(), paper(y), rtol=1e-6, atol=1e-6)
    assert local_response_norm(x.contiguous()).is_contiguous()
    assert local_response_norm(x).is_contiguous(memory_format=torch.channels_last)


# with 8 and 11 significant bits, rounding the exact result once has an error of at most 2**-8 and 2**-11
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@backends
def test_half_precision_is_rounded_once(backend: str, dtype: torch.dtype, rounding: float) -> None:
    if backend == "native" and dtype is torch.float16:
        pytest.skip("the native kernel takes bfloat16 and float32")
    x = activations(2, 96, 9, 9, dtype=dtype)
    y = local_response_norm(x, backend=backend)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), paper(x), rtol=rounding, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("k", [1e-3, 0.5, 1.0, 2.0, 7.3, 1e4])
def test_native_power_over_its_range(k: float) -> None:
    x = torch.logspace(-6, 15, 20_000).view(-1, 1, 1, 1)
    y = local_response_norm(x, k=k, backend="native")
    torch.testing.assert_close(y.double(), paper(x, k=k), rtol=5e-7, atol=0)


@backends
def test_nan_stays_and_the_largest_values_do_no_harm(backend: str) -> None:
    x = torch.zeros(1, 16, 1, 2)
    x[0, 8, 0, 0] = torch.nan
    x[0, 8, 0, 1] = 3e38
    y = local_response_norm(x.contiguous(memory_format=torch.channels_last), backend=backend)
    assert y[0, :, 0, 0].isnan().sum() == 5  # the window around it
    assert y[0, :, 0, 1].isfinite().all()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 96, 700])
def test_with_relu_it_is_bit_for_bit_that_of_torchs_relu(
    backend: str, dtype: torch.dtype, channels: int
) -> None:
    """Including the gradient at 0 and at NaN."""
    x, grad = activations(2, channels, 3, 5, dtype=dtype), activations(2, channels, 3, 5, dtype=dtype)
    x[0, 0, 0, :2] = torch.tensor([0.0, torch.nan])
    results = []
    for relu in (True, False):
        given = x.clone().requires_grad_()
        y = local_response_norm(given if relu else given.relu(), alpha=1e-3, backend=backend, relu=relu)
        results += [(y, *torch.autograd.grad(y, given, grad))]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert results[0][0].isnan().any() and (results[0][1] == 0).any()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", [(3, 2), (2, 2), (3, 1), (2, 3), (1, 1), (7, 5), (17, 1)])
@pytest.mark.parametrize(
    ("images", "channels", "relu"), [(2, 1, False), (9, 33, True), (1, 64, False), (2, 96, True)]
)
def test_with_the_max_pool_it_is_bit_for_bit_torchs(
    backend: str, dtype: torch.dtype, pool: tuple[int, int], images: int, channels: int, relu: bool
) -> None:
    """With many equal values, of which the first is the maximum. Lines and columns at the end are in no window."""
    x = activations(images, channels, 18, 19, dtype=dtype, spread=3).round().requires_grad_()
    outputs: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for together in (True, False):
        options: dict[str, Any] = {"alpha": 1e-2, "backend": backend, "relu": relu}
        y = local_response_norm(x, pool=pool if together else None, **options)
        if together:
            assert y.grad_fn is not None
            assert ("lrn_pool" in y.grad_fn.name()) == (backend == "native" and pool[0] <= 16)
        else:
            y = F.max_pool2d(y, *pool)
        outputs.append(y)
        # small integers, whose sums bfloat16 holds exactly
        weight = torch.randint(-4, 5, y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        gradients += torch.autograd.grad(y, x, weight)
    assert torch.equal(*outputs) and torch.equal(*gradients) and gradients[0].any()
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (outputs[0], gradients[0]))


@needs_compiler
def test_with_the_max_pool_gradients_in_bfloat16_are_rounded_once() -> None:
    x = activations(2, 96, 13, 13, dtype=torch.bfloat16).requires_grad_()
    y = local_response_norm(x, alpha=1e-3, pool=(3, 2))
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    (ours,) = torch.autograd.grad(y, x, weight)
    # the gradient of the same maxima, summed in float32
    maps = local_response_norm(x, alpha=1e-3).detach().float().requires_grad_()
    (grad,) = torch.autograd.grad(F.max_pool2d(maps, 3, 2), maps, weight.float())
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(
        local_response_norm(wide, alpha=1e-3, backend="eager"), wide, grad.double()
    )
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=2e-6)


@needs_compiler
@pytest.mark.parametrize("channels", [3, 40])
def test_the_max_pool_keeps_nan_and_infinities(channels: int) -> None:
    x = activations(1, channels, 9, 9)
    x[0, 0, 0, 0], x[0, 0, 8, 8], x[0, 1, 4, 4] = -torch.nan, torch.nan, torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        y = local_response_norm(x.to(dtype), backend="native", pool=(3, 2))
        expected = F.max_pool2d(local_response_norm(x.to(dtype), backend="native"), 3, 2)
        assert expected.isnan().any() and expected.isinf().any()
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_alpha_is_not_divided_by_the_window() -> None:
    x = activations(2, 16, 4, 4)
    ours = local_response_norm(x, alpha=1e-4)
    assert (ours - F.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=2.0)).abs().max() > 0.1
    torch.testing.assert_close(ours, F.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0))


@pytest.mark.parametrize("channels", [1, 2, 5, 9])
@pytest.mark.parametrize(("size", "beta"), [(5, 0.75), (3, 0.5)])
def test_gradient_of_the_formula(channels: int, size: int, beta: float) -> None:
    x = activations(2, channels, 2, 3, dtype=torch.float64).requires_grad_()
    # with a large alpha, the neighbours' part of the gradient exceeds the tolerance
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, size, 1e-2, beta, 2.0), x)


@needs_compiler
@pytest.mark.parametrize("channels", [1, 3, 16, 96, 256, 700])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_native_gradient(channels: int, dtype: torch.dtype, tolerance: float) -> None:
    """Against the formula in float64, which gradcheck verifies: float32 to its precision, bfloat16 rounded once."""
    x = activations(2, channels, 3, 5, dtype=dtype).requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)  # not channels-last
    (ours,) = torch.autograd.grad(local_response_norm(x, alpha=1e-3, backend="native"), x, grad)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(
        local_response_norm(wide, alpha=1e-3, backend="eager"), wide, grad.double()
    )
    assert ours.dtype == dtype and ours.stride() == x.stride()
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=2e-6)


@backends
@pytest.mark.parametrize("pool", [None, (3, 2)])
def test_torch_compile_takes_it_whole(backend: str, pool: tuple[int, int] | None) -> None:
    layer = LRN(backend=backend, pool=pool)
    x = activations(2, 16, 5, 5).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (layer(x * 2) ** 2).sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("pool", [None, (3, 2)])
def test_tensors_without_memory_get_the_shapes_of_real_ones(pool: tuple[int, int] | None) -> None:
    def shapes(x: torch.Tensor) -> list[Any]:
        y = LRN(relu=True, pool=pool)(x.requires_grad_())
        (grad,) = torch.autograd.grad(y.sum(), x)
        return [(t.shape, t.stride(), t.dtype) for t in (y, grad)]

    x = activations(2, 16, 7, 9)
    with FakeTensorMode() as mode:
        fake = shapes(mode.from_tensor(x))
    assert fake == shapes(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["auto", "eager", "triton"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)]
)
def test_on_the_gpu(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    x = activations(2, 96, 9, 9, dtype=dtype)
    device = x.cuda().requires_grad_()
    y = local_response_norm(device, backend=backend)
    torch.testing.assert_close(y.cpu().double(), paper(x), rtol=tolerance, atol=1e-6)
    (grad,) = torch.autograd.grad(y, device, torch.ones_like(y))
    wide = x.double().requires_grad_()
    local_response_norm(wide, backend="eager").sum().backward()
    torch.testing.assert_close(grad.cpu().double(), wide.grad, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"size": 4}, "odd number"),
        ({"size": 0}, "odd number"),
        ({"k": 0.0}, "above 0"),
        ({"backend": "fast"}, "no LRN backend 'fast'"),
        ({"backend": "native", "beta": 0.5}, "beta 0.5"),
        ({"pool": (3, 2)}, "cannot pool"),  # larger than the maps
        ({"pool": (0, 1)}, "cannot pool"),
        ({"pool": (2, 0)}, "cannot pool"),
        ({"backend": "triton"}, "triton backend needs Triton, .* CUDA tensor"),
    ],
)
def test_unusable_options_are_refused_in_one_line(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint) as error:
        local_response_norm(torch.ones(1, 5, 2, 2), **options)
    assert "\n" not in error.value.message


def test_only_maps_can_be_pooled() -> None:
    with pytest.raises(ModelError, match="cannot pool"):
        local_response_norm(torch.ones(8, 9, 9), pool=(3, 2))


@pytest.mark.parametrize("x", [torch.ones(5), torch.ones(1, 5, dtype=torch.int64)])
def test_unusable_inputs_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="floating-point"):
        local_response_norm(x)


def test_without_a_compiler_it_falls_back_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.delenv("ALEXNET_NATIVE", raising=False)
    native._load.cache_clear()
    try:
        x = activations(2, 8, 3, 3)
        with pytest.warns(UserWarning, match="falls back"):
            y = local_response_norm(x)
        torch.testing.assert_close(y.double(), paper(x), rtol=1e-6, atol=1e-6)
        with pytest.raises(ModelError, match="C\\+\\+ compiler"):
            local_response_norm(x, backend="native")
    finally:
        native._load.cache_clear()


def test_the_environment_can_turn_the_kernel_off(tmp_path: Path) -> None:
    script = "import torch; from model.lrn import LRN; LRN()(torch.ones(1, 5, 2, 2))"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "ALEXNET_LRN": "eager"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_compiler
def test_processes_that_build_at_once_leave_one_library(tmp_path: Path) -> None:
    script = "import torch; from model.lrn import LRN; LRN(backend='native')(torch.ones(1, 5, 1, 1))"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    ranks = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    (library,) = (tmp_path / "alexnet-dali").iterdir()
    assert library.suffix == ".so"
