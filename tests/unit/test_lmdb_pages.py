"""Where LMDB's records are: compared with LMDB's own answers, and with the pages that the kernel reads."""

import ctypes
import mmap
import os
import pickle
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pipeline.lmdb_pages
from pipeline.lmdb_pages import RecordPages
from pipeline.shards import ShardReader, ShardWriter, record_key

LIBC = ctypes.CDLL(None)
PAGE = mmap.PAGESIZE  # which is LMDB's
NEAR_A_PAGE = st.integers(PAGE - 60, PAGE + 10)  # the record and its page's header fill one page or two
IN_A_TREE_PAGE = st.integers(PAGE // 2 - 60, PAGE // 2 + 10)  # the largest values that LMDB keeps in the tree


def write(folder: Path, sizes: list[int]) -> None:
    writer = ShardWriter(folder, 64, encoded=True)
    for label, size in enumerate(sizes):
        writer.append(bytes(size), label)
    assert writer.close()["count"] == len(sizes)


@example(sizes=[PAGE // 2 - 100] * 400, repeats=9)  # three levels of pages
@example(sizes=[200_000] * 20, repeats=1)
@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(0, 3 * PAGE), NEAR_A_PAGE, IN_A_TREE_PAGE), min_size=1, max_size=80),
    repeats=st.integers(1, 9),
)
def test_spans_are_those_of_lmdb(sizes: list[int], repeats: int) -> None:
    """The first page holds the first byte of the value, and the last page the last."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shard"
        write(folder, sizes * repeats)
        count = len(sizes) * repeats
        env = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
        with env.begin(buffers=True) as transaction:
            values: list[Any] = [transaction.get(record_key(position)) for position in range(count)]
            pages = RecordPages(folder / "data.mdb", count // 2, values[count // 2])
            for position, value in enumerate(values):
                address, (start, size) = np.frombuffer(value, np.uint8).ctypes.data, pages.span(position)
                assert start % PAGE == 0 == size % PAGE and 0 <= address - start < PAGE
                assert 0 <= start + size - (address + len(value)) < PAGE
            assert pages.span(count) == (0, 0)
            del value, values
        env.close()


def patched(content: bytes, *changes: tuple[int, bytes]) -> bytes:
    damaged = bytearray(content)
    for at, new in changes:
        damaged[at : at + len(new)] = new
    return bytes(damaged)


def cyclic(content: bytes) -> bytes:
    """A tree that is said to have 65,535 levels, and whose root names itself as its children."""
    meta = PAGE * max((0, 1), key=lambda n: struct.unpack_from("<Q", content, n * PAGE + 144)[0])
    (root,) = struct.unpack_from("<Q", content, meta + 128)
    (lower,) = struct.unpack_from("<H", content, root * PAGE + 12)
    nodes = struct.unpack_from(f"<{(lower - 16) // 2}H", content, root * PAGE + 16)
    changes = [(root * PAGE + node, struct.pack("<I", root)) for node in nodes]
    return patched(content, (meta + 94, b"\xff\xff"), *changes)


@pytest.fixture(scope="module")
def two_levels(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file whose tree has a branch page and eight leaf pages."""
    folder = tmp_path_factory.mktemp("lmdb") / "shard"
    write(folder, [PAGE] * 1000)
    return (folder / "data.mdb").read_bytes()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "text": lambda content: b"not a database\n" * 1000,
    "cut": lambda content: content[: len(content) // 2],
    "magic": lambda content: patched(content, (16, bytes(4)), (PAGE + 16, bytes(4))),
    "version": lambda content: patched(content, (20, b"\3"), (PAGE + 20, b"\3")),
    "page size 0": lambda content: patched(content, (40, bytes(4))),
    "page size 32768": lambda content: patched(content, (40, struct.pack("<I", 1 << 15))),
    "entries": lambda content: patched(content, (120, b"\7"), (PAGE + 120, b"\7")),
    "cycle": cyclic,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_another_format_has_no_records(damage: str, two_levels: bytes, tmp_path: Path) -> None:
    path, value = tmp_path / "data.mdb", memoryview(mmap.mmap(-1, PAGE))
    path.write_bytes(two_levels)
    assert RecordPages(path, 0, value).span(999)[1] == 2 * PAGE
    path.write_bytes(DAMAGE[damage](two_levels))
    pages = RecordPages(path, 0, value)
    assert pages.span(0) == pages.span(999) == (0, 0)
    pages.prefetch(0)
    assert RecordPages(tmp_path / "none", 0, value).span(0) == (0, 0)


def test_damaged_tree_pages_are_no_error(two_levels: bytes, tmp_path: Path) -> None:
    """At worst, the wrong pages are prefetched."""
    path, value = tmp_path / "data.mdb", memoryview(mmap.mmap(-1, PAGE))
    original = np.frombuffer(two_levels, np.uint8)
    headers = original[: len(original) // PAGE * PAGE].reshape(-1, PAGE)[:, 10]
    tree = np.flatnonzero((headers & 3) > 0)
    assert len(tree) > 5
    rng, known = np.random.default_rng(0), 0
    for _ in range(60):
        content = original.copy()
        for page in rng.choice(tree, 2):
            at = page * PAGE + rng.integers(0, PAGE, 20)
            content[at] = rng.integers(0, 256, 20)
        path.write_bytes(content.tobytes())
        pages = RecordPages(path, 0, value)
        known += pages.span(0) != (0, 0)
        for position in (0, 500, 999, 1000):
            pages.prefetch(position)
    assert known > 0


def in_memory(start: int, size: int) -> np.ndarray:
    """Which pages of mapped memory are there."""
    flags = np.zeros(size // PAGE, np.uint8)
    places = ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_void_p(flags.ctypes.data)
    assert LIBC.mincore(*places) == 0
    return (flags & 1).astype(bool)


def test_prefetch_reads_the_records_from_disk_and_no_others(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    reader = ShardReader(copy / "train")
    reader.prefetch([32])  # opens the second shard
    with (copy / "train/shard-00001/data.mdb").open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    pages = reader._pages[1]
    assert pages is not None
    wanted, others = [8, 9, 18], [11, 15, 22, 27]
    if any(in_memory(*pages.span(local)).any() for local in wanted + others):
        pytest.skip("this file system keeps its files in memory")
    reader.prefetch([32 + local for local in wanted])
    deadline = time.monotonic() + 60
    while not all(in_memory(*pages.span(local)).all() for local in wanted):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not any(in_memory(*pages.span(local)).any() for local in others)


def test_hints_follow_the_file_after_closing_and_pickling(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request covers the record where LMDB has it mapped now."""
    requests: list[tuple[int, int]] = []
    monkeypatch.setattr(pipeline.lmdb_pages, "_madvise", lambda at, size, _: requests.append((at, size)))
    reader = ShardReader(dataset / "train")
    for change in ("none", "close", "pickle"):
        if change == "close":
            reader.close()
        elif change == "pickle":
            reader = pickle.loads(pickle.dumps(reader))
        for index in (0, 40, 41, 95):
            requests.clear()
            reader.prefetch([index])
            shard, local = divmod(index, 32)
            value = np.frombuffer(reader._stored(shard, local), np.uint8)
            (start, size), address = requests[0], value.ctypes.data
            assert len(requests) == 1 and start <= address and address + len(value) <= start + size
            assert start % PAGE == 0
            del value
