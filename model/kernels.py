"""Selects the fused kernels that a GPU can run."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor


def kernels_for(x: Tensor) -> ModuleType | None:
    """The Triton kernels if they support x and run on its device, else None."""
    kernels = triton_kernels(x.device)
    return kernels if kernels and x.dtype in kernels.DTYPES and x.is_contiguous() else None


@functools.cache
def triton_kernels(device: torch.device) -> ModuleType | None:
    """`model.triton_kernels` if they run on `device`, else None, with a warning if it is a GPU.

    Triton comes with torch's CUDA builds. It needs a C compiler and Python's headers when it first runs a kernel,
    so this runs one.
    """
    if device.type != "cuda":
        return None
    try:
        from model import triton_kernels

        triton_kernels.lrn_forward(torch.ones(1, 5, device=device), 5, 1e-4, 2.0, 0.0)
    except Exception as error:  # Triton, the compiler and the driver raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"LRN and dropout use torch's operators, which are slower: {reason}", stacklevel=2)
        return None
    return triton_kernels
