"""Triton kernels for NVIDIA GPUs: LRN (with the ReLU before it) forward and backward, and keyed dropout.

Each kernel reads its inputs from memory once, writes its output once and stores nothing else. Import this module
through `model.kernels`, since Triton is optional.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _place(numel, BLOCK: tl.constexpr):
    """The start of this program's elements, their offsets from it, and a mask of those inside the tensor.

    Offsets are 32-bit for tensors of any size, since 32-bit division is several times faster.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    return start, offset, offset < tl.minimum(numel - start, BLOCK).to(tl.int32)


@triton.jit
def _load(pointer, offset, c, inside, d: tl.constexpr, C: tl.constexpr):
    """The element `d` channels away as float32; 0 outside the channels."""
    there = inside & (c + d >= 0) & (c + d < C)
    return tl.load(pointer + (offset + d), mask=there, other=0.0).to(tl.float32)


@triton.jit
def _activation(x_ptr, offset, c, inside, d: tl.constexpr, floor, C: tl.constexpr):
    """The activation `d` channels away, max(x, floor); NaN stays NaN."""
    x = _load(x_ptr, offset, c, inside, d, C)
    return tl.where(x < floor, floor, x)


@triton.jit
def _bracket(x_ptr, offset, c, inside, d: tl.constexpr, alpha, k, floor, C: tl.constexpr, HALF: tl.constexpr):
    """k + alpha * the sum of squares around the channel `d` away; neighbours come from the cache."""
    x = _activation(x_ptr, offset, c, inside, d, floor, C)
    total = x * x
    for j in tl.static_range(1, HALF + 1):
        below = _activation(x_ptr, offset, c, inside, d - j, floor, C)
        above = _activation(x_ptr, offset, c, inside, d + j, floor, C)
        total += below * below + above * above
    return k + alpha * total


@triton.jit
def _lrn_forward(
    x_ptr, y_ptr, numel, alpha, k, floor, C: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    start, offset, inside = _place(numel, BLOCK)
    c = ((start % C).to(tl.int32) + offset) % C
    x_ptr += start
    root = tl.rsqrt(_bracket(x_ptr, offset, c, inside, 0, alpha, k, floor, C, HALF))
    y = _activation(x_ptr, offset, c, inside, 0, floor, C) * (root * tl.sqrt(root))
    tl.store(y_ptr + start + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lrn_backward(
    x_ptr, g_ptr, out_ptr, numel, alpha, k, floor, C: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """With s = k + alpha * sum: g s^-0.75 - 1.5 alpha x window_sum(g x s^-1.75)."""
    start, offset, inside = _place(numel, BLOCK)
    c = ((start % C).to(tl.int32) + offset) % C
    x_ptr += start
    g_ptr += start
    root = tl.rsqrt(_bracket(x_ptr, offset, c, inside, 0, alpha, k, floor, C, HALF))
    x = _activation(x_ptr, offset, c, inside, 0, floor, C)
    own = _load(g_ptr, offset, c, inside, 0, C) * (root * tl.sqrt(root))
    total = own * x * (root * root)
    for d in tl.static_range(-HALF, HALF + 1):
        if d != 0:
            root = tl.rsqrt(_bracket(x_ptr, offset, c, inside, d, alpha, k, floor, C, HALF))
            there = _load(g_ptr, offset, c, inside, d, C) * (root * tl.sqrt(root))
            total += there * _activation(x_ptr, offset, c, inside, d, floor, C) * (root * root)
    out = tl.where(x <= floor, 0.0, own - 1.5 * alpha * x * total)
    tl.store(out_ptr + start + offset, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hash(value):
    """`model.dropout._hash` for uint32 values, whose right shifts insert zeros."""
    value ^= value >> 16
    value *= 0x7FEB352D
    value ^= value >> 15
    value *= 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def _dropout(
    x_ptr,
    y_ptr,
    numel,
    position_ptr,
    scale,
    threshold,
    salt,
    first_unit,
    part_rows,
    stride,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the mask of `KeyedDropout.keep` and scales the kept elements."""
    start, offset, inside = _place(numel, BLOCK)
    within = (start % UNITS).to(tl.int32) + offset
    row = start // UNITS + within // UNITS
    unit = (first_unit + within % UNITS).to(tl.uint32)
    key = tl.load(position_ptr)
    first = tl.load(position_ptr + 1)
    if PARTS > 1:
        first = first % stride
        row = row // part_rows * stride + row % part_rows
    state = key.to(tl.uint32) ^ 0x80000000  # the formula's (key & 0xFFFFFFFF) - 2**31
    state = _hash(state) ^ (key >> 32).to(tl.uint32)
    state = _hash(state) ^ salt.to(tl.uint32)
    state = _hash(state) ^ (first + row).to(tl.uint32)
    value = _hash(_hash(state) ^ _hash(unit))
    keep = (value & 0x7FFFFFFF).to(tl.int64) >= threshold
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(keep, (x * scale).to(y_ptr.dtype.element_ty), 0.0)
    tl.store(y_ptr + start + offset, y, mask=inside)


def _launch(kernel: Any, block: int, x: Tensor, *arguments: Any) -> None:
    """Launches one program of 128 threads per `block` elements of x."""
    if x.numel():
        with torch.cuda.device_of(x):
            kernel[(triton.cdiv(x.numel(), block),)](x, *arguments, block)


def lrn_forward(rows: Tensor, size: int, alpha: float, k: float, floor: float) -> Tensor:
    """LRN with beta 0.75 of max(rows, floor) over the last dimension of a contiguous tensor of one of DTYPES."""
    y = torch.empty_like(rows)
    _launch(_lrn_forward, 1024, rows, y, rows.numel(), alpha, k, floor, rows.shape[-1], size // 2)
    return y


def lrn_backward(rows: Tensor, grad: Tensor, size: int, alpha: float, k: float, floor: float) -> Tensor:
    """The gradient of `lrn_forward`; `grad` has the shape and type of `rows`."""
    out = torch.empty_like(rows)
    constants = (alpha, k, floor, rows.shape[-1], size // 2)
    _launch(_lrn_backward, 512, rows, grad, out, rows.numel(), *constants)
    return out


def dropout(
    x: Tensor, position: Tensor, p: float, salt: int, unit_slice: int, parts: int, stride: int
) -> Tensor:
    """`KeyedDropout` for a contiguous (rows, ...) tensor of one of DTYPES."""
    y, rows = torch.empty_like(x), max(1, len(x))
    units, part_rows = x.numel() // rows, max(1, rows // parts)
    integers = (round(p * 2**31), salt, unit_slice * units, part_rows, stride)
    _launch(_dropout, 1024, x, y, x.numel(), position, 1 / (1 - p), *integers, units, parts)
    return y
