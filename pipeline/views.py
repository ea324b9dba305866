"""Crop, mirror, colour shift and mean of decoded images in one pass, on the CPU.

DALI's operators for these each go over the batch in memory, which together takes longer than decoding it. The
kernel (native/views.cpp) gives what they give in a seventh of their time. On a GPU they are DALI's.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

import native

DTYPES = {torch.float32: "views_float32", torch.bfloat16: "views_bfloat16"}


def ten_views(size: int, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Anchors int32 (10, 2) and flips int32 (10,): the four corners and the centre, then mirrored (paper 4.1)."""
    edge = size - crop
    corners = [(0, 0), (0, edge), (edge, 0), (edge, edge), (edge // 2, edge // 2)]
    return np.array(corners * 2, np.int32), np.repeat(np.array([0, 1], np.int32), 5)


class Views:
    """Turns decoded images and the plan's numbers into the network's input.

    `mean`: (size, size, 3) float32, subtracted at the positions that a crop comes from. `threads` of them work on
    a batch. Use `Views.of`, which says where this can be done.
    """

    def __init__(
        self, library: ctypes.CDLL, mean: np.ndarray, crop: int, dtype: torch.dtype, threads: int
    ) -> None:
        self._kernel = library[DTYPES[dtype]]
        self._mean = torch.from_numpy(np.ascontiguousarray(mean, np.float32))
        self._size, self._crop, self._dtype, self._threads = len(mean), crop, dtype, threads

    @classmethod
    def of(cls, mean: np.ndarray, crop: int, dtype: torch.dtype, threads: int) -> Views | None:
        """None where the kernel cannot be built or does not know `dtype`: DALI's operators do it then."""
        library = native.library("views", "batches are cropped by DALI's operators, slower")
        return cls(library, mean, crop, dtype, threads) if library and dtype in DTYPES else None

    def __call__(
        self, images: torch.Tensor, anchors: torch.Tensor, flips: torch.Tensor, shifts: torch.Tensor
    ) -> torch.Tensor:
        """V views of each of N images: (N * V, crop, crop, 3), the views of an image one after the other.

        images: (N, size, size, 3) uint8. anchors: (N * V, 2) int32, top and left of the crop, not negative. flips:
        (N * V,) int32. shifts: (N * V, 3) float32, levels added to red, green and blue.
        """
        size, crop = self._size, self._crop
        count = len(flips)
        assert images.shape[1:] == (size, size, 3) and count % len(images) == 0
        assert anchors.shape == (count, 2) and shifts.shape == (count, 3)
        assert int(anchors.min()) >= 0 and int(anchors.max()) <= size - crop
        inputs = (images, self._mean, anchors, flips, shifts)
        types = (torch.uint8, torch.float32, torch.int32, torch.int32, torch.float32)
        for tensor, dtype in zip(inputs, types, strict=True):
            assert tensor.dtype == dtype and tensor.is_contiguous()
        out = torch.empty(count, crop, crop, 3, dtype=self._dtype)
        self._kernel(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (*inputs, out)),
            *(ctypes.c_int64(n) for n in (count, count // len(images), size, crop)),
            ctypes.c_int(self._threads),
        )
        return out
