"""The machine: cores and the C library's memory."""

from __future__ import annotations

import ctypes
import os


def cpu_threads(ranks_here: int = 1) -> int:
    """This process's share of the cores it may use."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step, on the CPU about a fifth of the step's time.

    By default it hands large blocks back to the kernel, which clears every page anew for the next tensor, and
    threads have heaps of their own that are unmapped all the same: decoding is 6 % faster without them (two
    cores; on many, a heap for every four lest they wait for its lock). Call before other threads have begun. Does
    nothing where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for large tensors
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: keep all of the heap
        heaps = max(1, len(os.sched_getaffinity(0)) // 4)
        libc.mallopt(-8, heaps)  # M_ARENA_MAX
