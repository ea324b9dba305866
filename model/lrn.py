"""Local response normalisation across channels (Krizhevsky, Sutskever, Hinton, NIPS 2012, section 3.3).

    b[i] = a[i] / (k + alpha * sum(a[j]² for j in i - size//2 .. i + size//2, within the channels)) ** beta

`alpha` multiplies the sum, as in the paper; `torch.nn.functional.local_response_norm` divides it by `size`.

The arithmetic is light, but torch's operators walk over memory for every term of it, which would cost four
fifths of a training step on the CPU. Hence three backends with one result:

    native    a C++ kernel for the CPU: bfloat16 and float32, channels-last, beta 0.75. The machine's compiler
              ($CXX, c++ or g++) builds it when it is first used, in about a second; later processes load it
              in milliseconds from $XDG_CACHE_HOME/alexnet-dali (~/.cache/alexnet-dali)
    compiled  the formula through torch.compile, which makes fused kernels of it on a GPU
    eager     the formula in torch's operators: any device, dtype and layout, no compiler

"auto" is compiled on a GPU with Triton, native on the CPU where machine and input allow, and eager otherwise.
The environment variable ALEXNET_LRN=eager (or native, compiled), read at import, replaces "auto".
"""

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelError

BACKENDS = ("auto", "native", "compiled", "eager")
DEFAULT_BACKEND = os.environ.get("ALEXNET_LRN", "auto")


def local_response_norm(
    x: Tensor, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0, backend: str = "auto"
) -> Tensor:
    """Normalises each activation by the energy of its `size` neighbouring channels (the formula above).

    Args:
        x: (N, C) or (N, C, ...), floating point, any layout; channels-last is the fast one. Sums are taken in
            float32, those of float64 in float64.
        size: channels in the window, odd; the window ends where the channels end.
        alpha, beta, k: the constants of the formula; k > 0, or silent channels would divide by 0.
        backend: "auto", "native", "compiled" or "eager" (see the module).

    Returns:
        A tensor of x's shape, dtype and layout, differentiable once.

    Raises:
        ModelError: an unusable option, or a backend that cannot take this input on this machine.
    """
    backend = DEFAULT_BACKEND if backend == "auto" else backend
    if backend not in BACKENDS:
        raise ModelError(f"no LRN backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if size < 1 or size % 2 == 0:
        raise ModelError(f"LRN size is {size}: the window needs an odd number of channels, to have a centre")
    if k <= 0:
        raise ModelError(f"LRN k is {k}: it must be above 0, or silent channels divide by 0")
    if x.dim() < 2 or not x.is_floating_point():
        raise ModelError(f"LRN takes floating point (N, C, ...), not {x.dtype} of {x.dim()} dimensions")

    if backend == "compiled" or (backend == "auto" and x.is_cuda and _compiles(x.device)):
        formula = _formula if torch.compiler.is_compiling() else _compiled_formula()
        return formula(x, size, alpha, beta, k)
    return torch.ops.alexnet.lrn(x, size, alpha, beta, k, backend)


class LRN(nn.Module):
    """`local_response_norm` as a layer: (N, C, ...) to the same shape, dtype and layout; no parameters."""

    def __init__(
        self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k, self.backend = size, alpha, beta, k, backend

    def forward(self, x: Tensor) -> Tensor:
        return local_response_norm(x, self.size, self.alpha, self.beta, self.k, self.backend)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, backend={self.backend!r}"


# --- the formula in torch's operators ----------------------------------------------------------------------


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _window_sum(values: Tensor, size: int) -> Tensor:
    """The sum over `size` neighbouring channels of (N, C, ...); `narrow` keeps whatever layout there is."""
    padded = F.pad(values, [0, 0] * (values.dim() - 2) + [size // 2, size // 2])
    total = padded.narrow(1, 0, values.shape[1]).clone()
    for shift in range(1, size):
        total += padded.narrow(1, shift, values.shape[1])
    return total


def _inverse_power(s: Tensor, beta: float) -> Tensor:
    if beta != 0.75:
        return s**-beta
    root = s.rsqrt()  # two square roots take half the time of a general power
    return root * root.sqrt()


def _formula(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    a = _widen(x)
    return (a * _inverse_power(k + alpha * _window_sum(a * a, size), beta)).to(x.dtype)


def _formula_gradient(x: Tensor, grad: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """With s the sum in brackets: grad s^-beta - 2 alpha beta a window_sum(grad a s^(-beta - 1))."""
    a = _widen(x)
    s = k + alpha * _window_sum(a * a, size)
    own = grad * _inverse_power(s, beta)
    return (own - 2 * alpha * beta * a * _window_sum(own * a / s, size)).to(x.dtype)


def _in_cache(formula: Callable[..., Tensor], tensors: list[Tensor], *constants: float) -> Tensor:
    """`formula` over a few images at a time on the CPU: 8 times faster when its temporaries fit in the cache."""
    x = tensors[0]
    images = max(1, 2**18 // max(1, math.prod(x.shape[1:]))) if x.device.type == "cpu" else max(1, len(x))
    out = torch.empty_like(x)
    for target, *parts in zip(out.split(images), *(t.split(images) for t in tensors), strict=True):
        target.copy_(formula(*parts, *constants))
    return out


@functools.cache
def _compiled_formula() -> Callable[..., Tensor]:
    return torch.compile(_formula)


@functools.cache
def _compiles(device: torch.device) -> bool:
    """Whether torch.compile works there: Triton wants a C compiler and Python's headers when it first runs."""
    if torch.compiler.is_compiling():
        return True  # then it is being used anyway
    try:
        _compiled_formula()(torch.ones(1, 5, 1, 1, device=device), 5, 1e-4, 0.75, 2.0)
    except Exception as error:  # of many kinds, from many layers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"LRN falls back on torch's operators, slower: {reason}", stacklevel=2)
        return False
    return True


# --- the native kernel -------------------------------------------------------------------------------------

# Both directions read the activations and compute the sum in brackets anew: cheaper than the memory traffic
# of keeping it. Each pixel is a row of contiguous channels; a tile of rows stays in the first-level cache
# while plain loops, which compilers turn into vector instructions, go over it.
_SOURCE = r"""
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int HALF = SIZE / 2;
constexpr int TILE_VALUES = 512;

// bfloat16 travels as uint16_t: the upper half of a float, rounded to nearest even.
inline float load(float value) { return value; }
inline float load(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline void store(float* to, float value) { *to = value; }
inline void store(uint16_t* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    *to = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float window_sum(const float* values) {
    float sum = 0;
    for (int j = 0; j < SIZE; ++j) sum += values[j];
    return sum;
}

// s^-0.75 to float precision. Shifting the bits of a float by two divides its exponent by four, which gives y,
// s^-0.25 within 3.2%. With e = 1 - s y^4, |e| < 0.125, s^-0.75 is exactly y^3 (1 - e)^-0.75; the last factor is
// here the polynomial of degree 5 nearest to it.
inline float power(float s) {
    uint32_t bits;
    std::memcpy(&bits, &s, sizeof bits);
    bits = 0x4f581800 - (bits >> 2);
    float y;
    std::memcpy(&y, &bits, sizeof y);
    const float y2 = y * y, e = 1 - s * (y2 * y2);
    const float rest = 0.65617902f + e * (0.60145576f + e * (0.57610747f + e * 0.54945298f));
    return y2 * y * (1 + e * (0.75f + e * rest));
}

// Activations near the largest float would square to infinity, where `power` has no meaning; NaN stays NaN.
inline float scale(const float* squares, float alpha, float k) {
    return std::min(k + alpha * window_sum(squares), 1e36f);
}

template <class T>
void square(const T* a, float* squares, int channels) {
    for (int c = 0; c < channels; ++c) squares[c] = load(a[c]) * load(a[c]);
}

template <class T>
void forward(const T* x, T* y, int64_t rows, int channels, float alpha, float k, int threads) {
    const int64_t tile = std::max(1, TILE_VALUES / channels);
    const int padded = channels + 2 * HALF;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> squares(tile * padded);  // the padding on either side of a row stays 0
#pragma omp for
        for (int64_t first = 0; first < rows; first += tile) {
            const int64_t count = std::min(tile, rows - first);
            for (int64_t row = 0; row < count; ++row)
                square(x + (first + row) * channels, &squares[row * padded + HALF], channels);
            for (int64_t row = 0; row < count; ++row) {
                const T* a = x + (first + row) * channels;
                T* b = y + (first + row) * channels;
                const float* q = &squares[row * padded];
#pragma omp simd
                for (int c = 0; c < channels; ++c) store(b + c, load(a[c]) * power(scale(q + c, alpha, k)));
            }
        }
    }
}

template <class T>
void backward(const T* x, const T* gy, T* gx, int64_t rows, int channels, float alpha, float k, int threads) {
    const int64_t tile = std::max(1, TILE_VALUES / channels);
    const int padded = channels + 2 * HALF;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> squares(tile * padded), shared(tile * padded), own(tile * channels);
#pragma omp for
        for (int64_t first = 0; first < rows; first += tile) {
            const int64_t count = std::min(tile, rows - first);
            for (int64_t row = 0; row < count; ++row)
                square(x + (first + row) * channels, &squares[row * padded + HALF], channels);
            for (int64_t row = 0; row < count; ++row) {
                const T *a = x + (first + row) * channels, *g = gy + (first + row) * channels;
                const float* q = &squares[row * padded];
                float *d = &own[row * channels], *w = &shared[row * padded + HALF];
#pragma omp simd
                for (int c = 0; c < channels; ++c) {
                    const float s = scale(q + c, alpha, k);
                    const float through = load(g[c]) * power(s);
                    d[c] = through;
                    w[c] = through * load(a[c]) / s;
                }
            }
            for (int64_t row = 0; row < count; ++row) {
                const T* a = x + (first + row) * channels;
                T* out = gx + (first + row) * channels;
                const float *d = &own[row * channels], *w = &shared[row * padded];
#pragma omp simd
                for (int c = 0; c < channels; ++c)
                    store(out + c, d[c] - 1.5f * alpha * load(a[c]) * window_sum(w + c));
            }
        }
    }
}

}  // namespace

extern "C" {

void forward_float32(
    const float* x, float* y, int64_t rows, int channels, float alpha, float k, int threads) {
    forward(x, y, rows, channels, alpha, k, threads);
}
void forward_bfloat16(
    const uint16_t* x, uint16_t* y, int64_t rows, int channels, float alpha, float k, int threads) {
    forward(x, y, rows, channels, alpha, k, threads);
}
void backward_float32(
    const float* x, const float* gy, float* gx, int64_t rows, int channels, float alpha, float k,
    int threads) {
    backward(x, gy, gx, rows, channels, alpha, k, threads);
}
void backward_bfloat16(
    const uint16_t* x, const uint16_t* gy, uint16_t* gx, int64_t rows, int channels, float alpha, float k,
    int threads) {
    backward(x, gy, gx, rows, channels, alpha, k, threads);
}

}  // extern "C"
"""
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
_NATIVE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _kernel(x: Tensor, size: int, beta: float, backend: str) -> ctypes.CDLL | None:
    """The library to use for x, or None for torch's operators."""
    if backend == "eager":
        return None
    fits = (
        x.device.type == "cpu"
        and x.dtype in _NATIVE_DTYPES
        and x.movedim(1, -1).is_contiguous()
        and beta == 0.75
    )
    library = _library(size) if fits else None
    if library is None and backend == "native":
        raise ModelError(
            "LRN's native backend needs a C++ compiler, beta 0.75 and a channels-last CPU tensor of bfloat16 "
            f"or float32 (here beta {beta}, {x.device.type}, {x.dtype}): use backend 'auto'"
        )
    return library


@functools.cache
def _library(size: int) -> ctypes.CDLL | None:
    """The kernel for windows of `size` channels, built unless it is in the cache; None if that fails."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"
    flags = [*_FLAGS, f"-DSIZE={size}"]
    try:
        # The predefined macros tell the compiler's version and the instruction sets of this CPU, so that a
        # home shared by unlike machines holds a library for each.
        describe = [compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
        macros = subprocess.run(describe, capture_output=True, check=True).stdout
        key = hashlib.sha256(macros + " ".join(flags).encode() + _SOURCE.encode()).hexdigest()[:16]
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cached = Path(home, "alexnet-dali", f"lrn-{key}.so")
        if cached.exists():
            return ctypes.CDLL(str(cached))
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch, "lrn.so")
            build = [compiler, *flags, "-x", "c++", "-", "-o", str(built)]
            subprocess.run(build, input=_SOURCE.encode(), capture_output=True, check=True)
            # Ranks may build at once: each moves a whole file into place. If the home cannot be written, the
            # next process builds again.
            with suppress(OSError):
                cached.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(built, part := cached.with_name(uuid.uuid4().hex))
                part.replace(cached)
            return ctypes.CDLL(str(built))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        warnings.warn(f"LRN falls back on torch's operators, many times slower: {error}", stacklevel=2)
        return None


def _run(
    library: ctypes.CDLL, direction: str, inputs: list[Tensor], size: int, alpha: float, k: float
) -> Tensor:
    """Runs "forward" on [x] or "backward" on [x, grad]; x, (N, C, ...), is channels-last, so is the result."""
    out = torch.empty_like(inputs[0])
    rows = [tensor.movedim(1, -1).contiguous() for tensor in (*inputs, out)]
    *leading, channels = rows[0].shape
    library[f"{direction}_{_NATIVE_DTYPES[out.dtype]}"](
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in rows),
        ctypes.c_int64(math.prod(leading)),
        ctypes.c_int(channels),
        ctypes.c_float(alpha),
        ctypes.c_float(k),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out


# --- operators of torch's dispatcher -----------------------------------------------------------------------

# torch.compile takes an operator as it is, so the choice between kernel and formula is made when it runs.
# Only the input is kept for the backward pass: it is the output of a ReLU, which keeps the same tensor.
_CONSTANTS = "int size, float alpha, float beta, float k, str backend"
torch.library.define("alexnet::lrn", f"(Tensor x, {_CONSTANTS}) -> Tensor")
torch.library.define("alexnet::lrn_backward", f"(Tensor x, Tensor grad, {_CONSTANTS}) -> Tensor")


@torch.library.impl("alexnet::lrn", "CompositeExplicitAutograd")
def _forward(x: Tensor, size: int, alpha: float, beta: float, k: float, backend: str) -> Tensor:
    if library := _kernel(x, size, beta, backend):
        return _run(library, "forward", [x], size, alpha, k)
    return _in_cache(_formula, [x], size, alpha, beta, k)


@torch.library.impl("alexnet::lrn_backward", "CompositeExplicitAutograd")
def _backward(
    x: Tensor, grad: Tensor, size: int, alpha: float, beta: float, k: float, backend: str
) -> Tensor:
    if library := _kernel(x, size, beta, backend):
        return _run(library, "backward", [x, grad.to(x.dtype)], size, alpha, k)
    return _in_cache(_formula_gradient, [x, grad], size, alpha, beta, k)


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
