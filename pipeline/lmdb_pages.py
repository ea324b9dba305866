"""Where the records of an LMDB file are, so that many of them can be read from disk at the same time.

py-lmdb touches a record's pages one after the other, and the kernel reads each page when it is touched: a JPEG of
22 kB waits for the disk six times, raw pixels 49 times. Naming all pages of a batch first lets the kernel read them
in parallel.

The format is that of liblmdb 0.9 on 64-bit little-endian machines: MDB_meta, MDB_db, MDB_page, MDB_node in mdb.c.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_MAGIC, _VERSION = 0xBEEFC0DE, 1  # MDB_MAGIC, MDB_DATA_VERSION
_HEADER = 16  # bytes of a page's header
_DATABASES = _HEADER + 24  # position of MDB_meta.mm_dbs, two of 48 bytes: free pages, records
_TRANSACTION = _DATABASES + 2 * 48 + 8  # position of MDB_meta.mm_txnid
_BRANCH, _LEAF = 1, 2  # flags of a page
_MAX_DEPTH = 32  # CURSOR_STACK
_IN_OWN_PAGES = 1  # F_BIGDATA: the value is in pages of its own, and `page` is the first
# a node with a key of eight bytes; in branch pages, low, high and flags are the number of the child page
_NODE = np.dtype(
    [("low", "<u2"), ("high", "<u2"), ("flags", "<u2"), ("key_size", "<u2"), ("key", "S8"), ("page", "<u8")]
)

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_WILL_NEED = 3  # MADV_WILLNEED of sys/mman.h
_AT_ONCE = 128 << 10  # bytes; the kernel cuts a longer request to the device's read-ahead, by default this


class RecordPages:
    """The pages of each record of an LMDB file that is mapped into memory, in the order of the keys.

    Holds no records if the file has another format, or larger pages than the system; `prefetch` then does nothing.
    It also does nothing useful, and no harm, after the file was unmapped.

    Args:
        path: the file. Its keys have eight bytes.
        position: the position of any key.
        value: its value in the mapped file.
    """

    def __init__(self, path: Path, position: int, value: memoryview) -> None:
        self._start, self._page_size = 0, mmap.PAGESIZE
        self._first, self._count = np.zeros(0, np.uint32), np.zeros(0, np.uint16)  # pages of each record
        try:
            self._page_size, self._first, self._count = _record_pages(path)
        except (OSError, OverflowError, ValueError, IndexError, struct.error):
            return
        address: int = np.frombuffer(value, np.uint8).__array_interface__["data"][0]
        self._start = address - address % self._page_size - int(self._first[position]) * self._page_size

    def span(self, position: int) -> tuple[int, int]:
        """Address and size in bytes of the pages of the record at `position`; size 0 if they are not known."""
        if position >= len(self._first):
            return 0, 0
        first, count = int(self._first[position]), int(self._count[position])
        return self._start + first * self._page_size, count * self._page_size

    def prefetch(self, position: int) -> None:
        """Ask the kernel to read the record at `position` from disk, without waiting for it."""
        start, size = self.span(position)
        end = start + size
        start -= start % mmap.PAGESIZE
        for part in range(start, end, _AT_ONCE):
            _madvise(part, min(_AT_ONCE, end - part), _WILL_NEED)


def _record_pages(path: Path) -> tuple[int, np.ndarray, np.ndarray]:
    """The page size in bytes, and for each record its first page (uint32) and its number of pages (uint16).

    Raises ValueError, or one of the errors of reading and unpacking, if the file has another format.
    """
    with path.open("rb") as file:
        descriptor = file.fileno()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no pages between those of the tree
        (page_size,) = struct.unpack_from("<I", os.pread(descriptor, 4096, 0), _DATABASES)
        if page_size not in (512, 1024, 2048, 4096, 8192, 16384, 32768) or page_size > mmap.PAGESIZE:
            raise ValueError(f"pages of {page_size} bytes")  # larger ones need not be aligned in memory
        metas = [os.pread(descriptor, _TRANSACTION + 8, number * page_size) for number in (0, 1)]
        newest = max(metas, key=lambda meta: struct.unpack_from("<Q", meta, _TRANSACTION))
        depth, entries, root = struct.unpack_from("<6xH24xQQ", newest, _DATABASES + 48)
        if struct.unpack_from("<II", newest, _HEADER) != (_MAGIC, _VERSION) or not 1 <= depth <= _MAX_DEPTH:
            raise ValueError("not LMDB 0.9")
        most = os.fstat(descriptor).st_size // page_size
        level = [root]
        for _ in range(depth - 1):
            children = []
            for nodes, _ in _read_level(descriptor, level, page_size, _BRANCH):
                high, flags = nodes["high"].astype(np.int64), nodes["flags"].astype(np.int64)
                children += (nodes["low"] | high << 16 | flags << 32).tolist()
                if len(children) > most:
                    raise ValueError("more pages than the file has")
            level = children
        firsts, counts = [], []
        for nodes, page in _read_level(descriptor, level, page_size, _LEAF):
            own = (nodes["flags"] & _IN_OWN_PAGES).astype(bool)
            size = nodes["low"] | nodes["high"].astype(np.int64) << 16
            firsts.append(np.where(own, nodes["page"].astype(np.uint32), np.uint32(page)))
            counts.append(np.where(own, -(-(_HEADER + size) // page_size), 1).astype(np.uint16))
        first, count = np.concatenate(firsts), np.concatenate(counts)
        if len(first) != entries:
            raise ValueError(f"{len(first)} records instead of {entries}")
        return page_size, first, count


def _read_level(
    descriptor: int, pages: list[int], page_size: int, kind: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Each page of one level of the tree: its nodes in the order of their keys, (n,) of `_NODE`, and its number."""
    for page in pages:
        os.posix_fadvise(descriptor, page * page_size, page_size, os.POSIX_FADV_WILLNEED)
    for page in pages:
        content = os.pread(descriptor, page_size, page * page_size)
        flags, lower = struct.unpack_from("<HH", content, 10)
        if not flags & kind:
            raise ValueError(f"page {page} is of another kind")
        positions = np.frombuffer(content, "<u2", (lower - _HEADER) // 2, _HEADER).astype(np.int64)
        padded = np.frombuffer(content + bytes(_NODE.itemsize), np.uint8)
        yield padded[positions[:, None] + np.arange(_NODE.itemsize)].view(_NODE)[:, 0], page
