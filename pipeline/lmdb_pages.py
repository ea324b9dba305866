"""Where the records of an LMDB file are, so that many of them can be read from disk at the same time.

py-lmdb touches a record's pages one after the other, and the kernel reads each page when it is touched: a JPEG of
22 kB waits for the disk six times, raw pixels 48 times. If the kernel is told the pages of a whole batch first, it
reads them at the same time.

The format is that of liblmdb 0.9 on 64-bit little-endian machines: MDB_meta, MDB_db, MDB_page and MDB_node in mdb.c
(MDB_DATA_VERSION 1).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from pathlib import Path

import numpy as np

_HEADER = 16  # bytes of a page's header
_DATABASES = _HEADER + 24  # position of MDB_meta.mm_dbs, two of 48 bytes: free pages, records
_TRANSACTION = _DATABASES + 2 * 48 + 8  # position of MDB_meta.mm_txnid
_IN_OWN_PAGES = 1  # F_BIGDATA: the value is in pages of its own, and `page` is the first
# a node with a key of eight bytes; in branch pages, low, high and flags are the number of the child page
_NODE = np.dtype(
    [("low", "<u2"), ("high", "<u2"), ("flags", "<u2"), ("key_size", "<u2"), ("key", "S8"), ("page", "<u8")]
)

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_WILL_NEED = 3  # MADV_WILLNEED of sys/mman.h


class RecordPages:
    """The pages of each record of an LMDB file, in the order of the keys.

    Without records if the file does not have the format above: then nothing is prefetched, and reading is slower.

    Args:
        path: the file. Its keys have eight bytes.
        first: the value of the first key, in the file as mapped into memory.
    """

    def __init__(self, path: Path, first: memoryview) -> None:
        try:
            self._page_size, self._pages = _record_pages(path)
        except (OSError, OverflowError, ValueError, IndexError, struct.error):
            self._page_size, self._pages = mmap.PAGESIZE, np.zeros((1, 2), np.uint32)
        address: int = np.frombuffer(first, np.uint8).__array_interface__["data"][0]
        self._start = address - address % self._page_size - int(self._pages[0, 0]) * self._page_size

    def span(self, position: int) -> tuple[int, int]:
        """Address and size in bytes of the pages in memory of the record at `position`; size 0 if unknown."""
        if position >= len(self._pages):
            return 0, 0
        page, count = self._pages[position].tolist()
        return self._start + page * self._page_size, count * self._page_size

    def prefetch(self, position: int) -> None:
        """Have the kernel read the record at `position` from disk, without waiting for it."""
        start, size = self.span(position)
        before = start % mmap.PAGESIZE
        _madvise(start - before, before + size, _WILL_NEED)


def _record_pages(path: Path) -> tuple[int, np.ndarray]:
    """The page size in bytes, and the first page and the number of pages of each record: (n, 2) uint32."""
    with path.open("rb") as file:
        descriptor = file.fileno()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no pages between those of the tree
        (page_size,) = struct.unpack_from("<I", os.pread(descriptor, 4096, 0), _DATABASES)
        metas = [os.pread(descriptor, _TRANSACTION + 8, number * page_size) for number in (0, 1)]
        newest = max(metas, key=lambda meta: struct.unpack_from("<Q", meta, _TRANSACTION))
        depth, root = struct.unpack_from("<6xH32xQ", newest, _DATABASES + 48)
        level = [root]
        for _ in range(depth - 1):
            children = [_child_pages(descriptor, page, page_size) for page in level]
            level = np.concatenate(children).tolist()
            if len(level) * page_size > os.fstat(descriptor).st_size:
                raise ValueError("more pages than the file has")
        return page_size, np.concatenate([_records_of(descriptor, page, page_size) for page in level])


def _child_pages(descriptor: int, page: int, page_size: int) -> np.ndarray:
    nodes = _nodes(os.pread(descriptor, page_size, page * page_size))
    return nodes["low"] | nodes["high"].astype(np.int64) << 16 | nodes["flags"].astype(np.int64) << 32


def _records_of(descriptor: int, page: int, page_size: int) -> np.ndarray:
    nodes = _nodes(os.pread(descriptor, page_size, page * page_size))
    size = nodes["low"] | nodes["high"].astype(np.int64) << 16
    own = (nodes["flags"] & _IN_OWN_PAGES).astype(bool)
    first = np.where(own, nodes["page"].astype(np.uint32), page)
    count = np.where(own, -(-(_HEADER + size) // page_size), 1)
    return np.stack([first, count], 1).astype(np.uint32)


def _nodes(page: bytes) -> np.ndarray:
    """The nodes of a branch or leaf page, in the order of their keys: (n,) of `_NODE`."""
    (lower,) = struct.unpack_from("<H", page, 12)
    positions = np.frombuffer(page, "<u2", (lower - _HEADER) // 2, _HEADER).astype(np.int64)
    content = np.frombuffer(page + bytes(_NODE.itemsize), np.uint8)
    return content[positions[:, None] + np.arange(_NODE.itemsize)].view(_NODE)[:, 0]
