"""Local response normalisation across channels (Krizhevsky, Sutskever, Hinton, NIPS 2012, section 3.3).

    b[i] = a[i] / (k + alpha * sum(a[j]² for j in i - size//2 .. i + size//2, within the channels)) ** beta

`alpha` multiplies the sum, as in the paper; `torch.nn.functional.local_response_norm` divides it by `size`.

The ReLU before it can be computed in the same pass over memory. A training step then reads or writes these maps
five times instead of ten. The native backend also computes the max pool after it, which leaves three.

The formula is cheap, but in torch's operators each term is a pass over memory, which would take four fifths of a
training step on the CPU. There are three backends with equal results:

    native  a C++ kernel for the CPU (native/lrn.cpp): bfloat16 and float32, channels-last, beta 0.75; compiled on
            first use in about a second
    triton  kernels for NVIDIA GPUs (model/triton_kernels.py): float32, float16 and bfloat16, channels-last,
            beta 0.75
    eager   torch's operators: any device, dtype and memory format, without a compiler

"auto" is triton on a GPU and native on the CPU if the machine and the input support it, else eager. The environment
variable ALEXNET_LRN=eager (or native, triton), read at import, replaces "auto".
"""

import ctypes
import math
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import native
from base.errors import ModelError
from model.kernels import kernels_for

BACKENDS = ("auto", "native", "triton", "eager")
DEFAULT_BACKEND = os.environ.get("ALEXNET_LRN", "auto")


def local_response_norm(
    x: Tensor,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 2.0,
    backend: str = "auto",
    relu: bool = False,
    pool: tuple[int, int] | None = None,
) -> Tensor:
    """Normalise each activation by the sum of squares over `size` neighbouring channels (the formula above).

    Args:
        x: (N, C) or (N, C, ...) in floating point and any memory format; channels-last is the fastest. Sums are
            computed in float32, or in float64 for float64.
        size: number of channels in the window, odd. The window is cut off at the first and last channel.
        alpha, beta, k: the constants of the formula; k > 0 avoids divisions by zero.
        backend: "auto", "native", "triton" or "eager" (see the module).
        relu: whether to normalise relu(x) instead of x.
        pool: kernel size and stride of a max pool of the result, without padding; x must be (N, C, H, W).

    Returns:
        A tensor of the same dtype, memory format and, without `pool`, shape, which can be differentiated once.

    Raises:
        ModelError: an invalid option, or a backend that does not support this input on this machine.
    """
    backend = DEFAULT_BACKEND if backend == "auto" else backend
    if backend not in BACKENDS:
        raise ModelError(f"no LRN backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if size < 1 or size % 2 == 0:
        raise ModelError(f"LRN size is {size}: choose an odd number")
    if k <= 0:
        raise ModelError(f"LRN k is {k}: choose a value above 0, which avoids divisions by zero")
    if x.dim() < 2 or not x.is_floating_point():
        raise ModelError(
            f"LRN takes a floating-point tensor (N, C, ...), not {x.dtype} with {x.dim()} dimensions"
        )
    if pool and (x.dim() != 4 or min(pool) < 1 or pool[0] > min(x.shape[2:])):
        raise ModelError(f"LRN cannot pool {tuple(x.shape)} with kernel size and stride {tuple(pool)}")

    constants = (size, alpha, beta, k, relu, backend)
    if pool and _pools_natively(x, pool[0], size, beta, backend):
        return torch.ops.alexnet.lrn_pool(x, *pool, size, alpha, k, relu)[0]
    y = torch.ops.alexnet.lrn(x, *constants)
    return F.max_pool2d(y, *pool) if pool else y


class LRN(nn.Module):
    """`local_response_norm` as a layer without parameters."""

    def __init__(
        self,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        backend: str = "auto",
        relu: bool = False,
        pool: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.backend, self.relu, self.pool = backend, relu, pool

    def forward(self, x: Tensor) -> Tensor:
        constants = (self.size, self.alpha, self.beta, self.k)
        return local_response_norm(x, *constants, self.backend, self.relu, self.pool)

    def extra_repr(self) -> str:
        return (
            f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, backend={self.backend!r}, "
            f"relu={self.relu}, pool={self.pool}"
        )


# --- the formula in torch's operators ----------------------------------------------------------------------


def _activations(x: Tensor, relu: bool) -> Tensor:
    """What is normalised, in float32 or float64."""
    a = x.to(torch.promote_types(x.dtype, torch.float32))
    return a.relu() if relu else a


def _window_sum(values: Tensor, size: int) -> Tensor:
    """Sum over `size` neighbouring channels of (N, C, ...); `narrow` preserves the memory format."""
    padded = F.pad(values, [0, 0] * (values.dim() - 2) + [size // 2, size // 2])
    total = padded.narrow(1, 0, values.shape[1]).clone()
    for shift in range(1, size):
        total += padded.narrow(1, shift, values.shape[1])
    return total


def _inverse_power(s: Tensor, beta: float) -> Tensor:
    if beta != 0.75:
        return s**-beta
    root = s.rsqrt()  # two square roots are twice as fast as pow
    return root * root.sqrt()


def _formula(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    a = _activations(x, relu)
    return (a * _inverse_power(k + alpha * _window_sum(a * a, size), beta)).to(x.dtype)


def _formula_gradient(
    x: Tensor, grad: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool
) -> Tensor:
    """grad s^-beta - 2 alpha beta a window_sum(grad a s^(-beta - 1)), where s is the term in parentheses."""
    a = _activations(x, relu)
    s = k + alpha * _window_sum(a * a, size)
    own = grad * _inverse_power(s, beta)
    out = own - 2 * alpha * beta * a * _window_sum(own * a / s, size)
    return (out.masked_fill(x <= 0, 0) if relu else out).to(x.dtype)


def _in_cache(formula: Callable[..., Tensor], tensors: list[Tensor], *constants: float) -> Tensor:
    """Apply `formula` to a few images at a time on the CPU: 8 times faster, as temporaries fit in the cache."""
    x = tensors[0]
    images = max(1, 2**18 // max(1, math.prod(x.shape[1:]))) if x.device.type == "cpu" else max(1, len(x))
    out = torch.empty_like(x)
    for target, *parts in zip(out.split(images), *(t.split(images) for t in tensors), strict=True):
        target.copy_(formula(*parts, *constants))
    return out


# --- the fused kernels --------------------------------------------------------------------------------------

_NATIVE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _kernel(x: Tensor, size: int, beta: float, backend: str) -> ctypes.CDLL | ModuleType | None:
    """The native library or the Triton kernels for x; None for torch's operators."""
    if backend == "eager":
        return None
    rows = x.movedim(1, -1)
    found: ctypes.CDLL | ModuleType | None = None
    if beta == 0.75 and rows.is_contiguous():
        if backend != "triton" and x.device.type == "cpu" and x.dtype in _NATIVE_DTYPES:
            found = _library(size)
        elif backend != "native":
            found = kernels_for(rows)
    if found is None and backend != "auto":
        raise ModelError(
            f"LRN's {backend} backend needs {_NEEDS[backend]}, not beta {beta}, {x.device.type}, "
            f"{x.dtype}: use backend 'auto'"
        )
    return found


_NEEDS = {
    "native": "a C++ compiler, ALEXNET_NATIVE other than 0, beta 0.75 and a channels-last CPU tensor of bfloat16 "
    "or float32",
    "triton": "Triton, beta 0.75 and a channels-last CUDA tensor of float32, float16 or bfloat16",
}


def _library(size: int) -> ctypes.CDLL | None:
    """The kernel for windows of `size` channels; None if it cannot be compiled."""
    slower = "LRN falls back on torch's operators, which is many times slower"
    # -fno-trapping-math lets the compiler vectorise comparisons: 4 to 7 times faster with AVX2
    return native.library("lrn", slower, "-fopenmp", "-fno-trapping-math", f"-DSIZE={size}")


def _run(
    kernel: ctypes.CDLL | ModuleType,
    direction: str,
    inputs: list[Tensor],
    size: int,
    alpha: float,
    k: float,
    relu: bool,
) -> Tensor:
    """Run "forward" on [x] or "backward" on [x, grad]; tensors (N, C, ...) and the result are channels-last."""
    floor = _floor(relu)
    rows = [tensor.movedim(1, -1).contiguous() for tensor in inputs]
    if isinstance(kernel, ModuleType):
        run = kernel.lrn_forward if direction == "forward" else kernel.lrn_backward
        return run(*rows, size, alpha, k, floor).movedim(-1, 1)
    out = torch.empty_like(rows[0])
    *leading, channels = out.shape
    _call(kernel, direction, [*rows, out], [math.prod(leading), channels], alpha, k, floor)
    return out.movedim(-1, 1)


def _floor(relu: bool) -> float:
    """The lower bound of the activations."""
    return 0.0 if relu else -math.inf


def _call(
    library: ctypes.CDLL, name: str, tensors: list[Tensor], sizes: list[int], *constants: float
) -> None:
    """Call a function of native/lrn.cpp for contiguous tensors, the first of which determines the type."""
    library[f"{name}_{_NATIVE_DTYPES[tensors[0].dtype]}"](
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        *(ctypes.c_int64(value) for value in sizes),
        *(ctypes.c_float(value) for value in constants),
        ctypes.c_int64(torch.get_num_threads()),
    )


def _pools_natively(x: Tensor, side: int, size: int, beta: float, backend: str) -> bool:
    """Whether the native kernel computes the max pool, too; torch.compile cannot trace this choice."""
    if side > _LARGEST_SIDE or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return isinstance(_kernel(x, size, beta, backend), ctypes.CDLL)


# --- operators of torch's dispatcher -----------------------------------------------------------------------

# Operators are opaque to torch.compile, so the backend is chosen at run time. Only the input is saved for the
# backward pass.
_CONSTANTS = "int size, float alpha, float beta, float k, bool relu, str backend"
torch.library.define("alexnet::lrn", f"(Tensor x, {_CONSTANTS}) -> Tensor")
torch.library.define("alexnet::lrn_backward", f"(Tensor x, Tensor grad, {_CONSTANTS}) -> Tensor")


@torch.library.impl("alexnet::lrn", "CompositeExplicitAutograd")
def _forward(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool, backend: str) -> Tensor:
    if kernel := _kernel(x, size, beta, backend):
        return _run(kernel, "forward", [x], size, alpha, k, relu)
    return _in_cache(_formula, [x], size, alpha, beta, k, relu)


@torch.library.impl("alexnet::lrn_backward", "CompositeExplicitAutograd")
def _backward(
    x: Tensor, grad: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool, backend: str
) -> Tensor:
    if kernel := _kernel(x, size, beta, backend):
        return _run(kernel, "backward", [x, grad.to(x.dtype)], size, alpha, k, relu)
    return _in_cache(_formula_gradient, [x, grad], size, alpha, beta, k, relu)


@torch.library.register_fake("alexnet::lrn")
def _fake_forward(x: Tensor, *constants: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("alexnet::lrn_backward")
def _fake_backward(x: Tensor, grad: Tensor, *constants: Any) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.constants = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.alexnet.lrn_backward(x, grad, *ctx.constants), *[None] * len(ctx.constants)


torch.library.register_autograd("alexnet::lrn", _differentiate, setup_context=_save)


# --- with the max pool, in the native kernel -----------------------------------------------------------------

_LARGEST_SIDE = 16  # of a pool, because the position in a window is stored in 8 bits

# The second result, uint8, is the position of each maximum in its window.
_POOL = "int side, int stride, int size, float alpha, float k, bool relu"
torch.library.define("alexnet::lrn_pool", f"(Tensor x, {_POOL}) -> (Tensor, Tensor)")
torch.library.define(
    "alexnet::lrn_pool_backward", f"(Tensor x, Tensor grad, Tensor position, {_POOL}) -> Tensor"
)


def _call_pooled(
    direction: str,
    tensors: list[Tensor],
    side: int,
    stride: int,
    size: int,
    alpha: float,
    k: float,
    relu: bool,
) -> None:
    images, channels, height, width = tensors[0].shape
    sizes = [images, height, width, side, stride, channels]
    library = _library(size)
    assert library is not None  # see _pools_natively
    _call(library, f"{direction}_pooled", tensors, sizes, alpha, k, _floor(relu))


@torch.library.register_fake("alexnet::lrn_pool")
def _empty_pooled(x: Tensor, side: int, stride: int, *constants: Any) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], *((length - side) // stride + 1 for length in x.shape[2:]))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty_like(y, dtype=torch.uint8)


@torch.library.impl("alexnet::lrn_pool", "CPU")
def _forward_pooled(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    y, position = _empty_pooled(x, *options)
    _call_pooled("forward", [x, y, position], *options)
    return y, position


@torch.library.impl("alexnet::lrn_pool_backward", "CPU")
def _backward_pooled(x: Tensor, grad: Tensor, position: Tensor, *options: Any) -> Tensor:
    grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    _call_pooled("backward", [x, grad, position, out], *options)
    return out


torch.library.register_fake("alexnet::lrn_pool_backward", _fake_backward)


def _save_pooled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x, output[1])


def _differentiate_pooled(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, position = ctx.saved_tensors
    return torch.ops.alexnet.lrn_pool_backward(x, grad, position, *ctx.options), *[None] * len(ctx.options)


torch.library.register_autograd("alexnet::lrn_pool", _differentiate_pooled, setup_context=_save_pooled)
