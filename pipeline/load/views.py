"""Subtracts the mean, crops, mirrors and shifts colours in one pass over decoded images, on the CPU.

DALI has one operator for each of these. Each passes over the batch in memory, and together they take longer than
decoding (docs/performance.md). The kernel in native/views.cpp gives the same result, bit for bit with a mean image.
With a mean per channel, DALI subtracts (mean - shift), which rounds differently by 1e-5 levels. GPUs use DALI's
operators.
"""

from __future__ import annotations

import ctypes
import math
import weakref

import numpy as np
import torch

import native

KERNELS = {torch.float32: "views_float32", torch.bfloat16: "views_bfloat16"}


def ten_views(size: int, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Anchors int32 (10, 2) and flips int32 (10,): the four corners and the centre, then mirrored (paper 4.1)."""
    edge = size - crop
    corners = [(0, 0), (0, edge), (edge, 0), (edge, edge), (edge // 2, edge // 2)]
    return np.array(corners * 2, np.int32), np.repeat(np.array([0, 1], np.int32), 5)


def with_mirror_image(mean: np.ndarray) -> np.ndarray:
    """The mean image and its mirror image side by side, (size, 2 * size, 3) float32.

    The mean of any crop, flipped or not, is then one slice: column x of the mean image is also column
    2 * size - 1 - x of the pair.
    """
    return np.ascontiguousarray(np.concatenate([mean, mean[:, ::-1]], axis=1), np.float32)


class Buffers:
    """Memory for batches. A buffer is reused when no tensor refers to it any longer.

    The C library returns large blocks to the kernel, which clears each page of a new one: for a batch of 128 that
    takes more than twice as long as filling it.
    """

    MAX_KEPT = 3  # buffers to keep: the batch in use, the next one, and one that is held for longer
    ALIGNMENT = 64  # bytes, as torch's own allocator aligns

    def __init__(self) -> None:
        # a buffer and the part of it that a tensor uses: from_numpy holds the part as long as its memory is in use
        self._kept: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with arbitrary content, in memory that no other tensor uses."""
        size = math.prod(shape) * dtype.itemsize
        for number, (buffer, user) in enumerate(self._kept):
            if user() is None and len(buffer) >= size + self.ALIGNMENT:
                del self._kept[number]
                break
        else:
            buffer = np.empty(size + self.ALIGNMENT, np.uint8)
            # drop free buffers: they are too small
            self._kept = [(old, user) for old, user in self._kept if user() is not None]
        start = -buffer.ctypes.data % self.ALIGNMENT
        part = buffer[start : start + size]
        if len(self._kept) < self.MAX_KEPT:
            self._kept.append((buffer, weakref.ref(part)))
        return torch.from_numpy(part).view(dtype).view(shape)


class ViewCutter:
    """Turns decoded images and the plan's random numbers into the network's input.

    `mean` is (size, size, 3) float32; its part at the crop's position is subtracted. `threads` is the number of
    threads per batch. Create it with `ViewCutter.of`, which returns None if there is no kernel.
    """

    def __init__(
        self, library: ctypes.CDLL, mean: np.ndarray, crop: int, dtype: torch.dtype, threads: int
    ) -> None:
        self._size, self._crop, self._dtype, self._threads = len(mean), crop, dtype, threads
        if mean.shape != (self._size, self._size, 3) or not 0 < crop <= self._size:
            raise ValueError(f"a crop of {crop} pixels does not fit a mean image of shape {mean.shape}")
        self._kernel = library[KERNELS[dtype]]
        self._means = torch.from_numpy(with_mirror_image(mean))
        self._buffers = Buffers()

    @classmethod
    def of(cls, mean: np.ndarray, crop: int, dtype: torch.dtype, threads: int) -> ViewCutter | None:
        """Create a ViewCutter; None if `dtype` has no kernel or it cannot be built. Use DALI's operators then."""
        if dtype not in KERNELS:
            return None
        slower = "batches are cropped by DALI's operators, which is slower"
        library = native.library("views", slower, "-fopenmp-simd", "-pthread")
        return cls(library, mean, crop, dtype, threads) if library else None

    def __call__(
        self, images: torch.Tensor, anchors: torch.Tensor, flips: torch.Tensor, shifts: torch.Tensor
    ) -> torch.Tensor:
        """Return V views of each of N images as (N * V, crop, crop, 3); the views of an image are consecutive.

        images: (N, size, size, 3) uint8. anchors: (N * V, 2) int32, top and left of each crop. flips: (N * V,)
        int32. shifts: (N * V, 3) float32, levels added to red, green and blue. Raises ValueError for anything else.
        """
        size, crop = self._size, self._crop
        count = len(flips)
        expected = (
            ("images", images, torch.uint8, (len(images), size, size, 3)),
            ("anchors", anchors, torch.int32, (count, 2)),
            ("flips", flips, torch.int32, (count,)),
            ("shifts", shifts, torch.float32, (count, 3)),
        )
        for name, tensor, dtype, shape in expected:  # the kernel does not check
            if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous() or tensor.is_cuda:
                found = f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
                raise ValueError(f"{name} are {found}; expected contiguous {dtype} {shape} on the CPU")
        if (
            not count
            or not len(images)
            or count % len(images)
            or anchors.min() < 0
            or anchors.max() > size - crop
        ):
            raise ValueError(f"{count} anchors for {len(images)} images, or a crop outside its image")
        out = self._buffers.empty((count, crop, crop, 3), self._dtype)
        failed = self._kernel(
            *(ctypes.c_void_p(t.data_ptr()) for t in (images, self._means, anchors, flips, shifts, out)),
            *(ctypes.c_int64(n) for n in (count, count // len(images), size, crop, self._threads)),
        )
        if failed:
            raise MemoryError("no memory for a row of pixels")
        return out
