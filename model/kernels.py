"""Which fused kernels a GPU can use."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor


def kernels_for(x: Tensor) -> ModuleType | None:
    """The Triton kernels if x is a tensor that they take, on a GPU that runs them."""
    kernels = triton_kernels(x.device)
    return kernels if kernels and x.dtype in kernels.DTYPES and x.is_contiguous() else None


@functools.cache
def triton_kernels(device: torch.device) -> ModuleType | None:
    """`model.triton_kernels` where they run on `device`; None elsewhere, on a GPU with a warning.

    Triton comes with torch's CUDA builds. It needs a C compiler and Python's headers when it first runs, so a
    kernel is run here.
    """
    if device.type != "cuda":
        return None
    try:
        from model import triton_kernels

        triton_kernels.lrn_forward(torch.ones(1, 5, device=device), 5, 1e-4, 2.0)
    except Exception as error:  # of many kinds, from many layers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"LRN and dropout use torch's operators, which are slower: {reason}", stacklevel=2)
        return None
    return triton_kernels
