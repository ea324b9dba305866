"""Where LMDB's records are: compared with LMDB's own answers, and with the pages that the kernel reads."""

import ctypes
import mmap
import os
import shutil
import time
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.lmdb_pages import RecordPages
from pipeline.shards import ShardReader, ShardWriter, record_key

LIBC = ctypes.CDLL(None)


def spans_and_values(folder: Path, count: int) -> list[tuple[int, int, int, int]]:
    """For each record: address and size of its pages as computed, and of its value according to LMDB."""
    env = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    with env.begin(buffers=True) as transaction:
        values: list[Any] = [transaction.get(record_key(position)) for position in range(count)]
        pages = RecordPages(folder / "data.mdb", values[0])
        spans = []
        for position in range(count):
            value = np.frombuffer(values[position], np.uint8)
            spans.append((*pages.span(position), value.ctypes.data, len(value)))
        assert pages.span(count) == (0, 0)
        del value, values
    env.close()
    return spans


@example(sizes=[1900] * 400, repeats=9)  # three levels of pages
@example(sizes=[70_000] * 100, repeats=2)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(
        st.sampled_from([0, 1, 40, 1900, 2100, 4050, 4080, 9000, 70_000]), min_size=1, max_size=400
    ),
    repeats=st.integers(1, 9),
)
def test_spans_are_those_of_lmdb(sizes: list[int], repeats: int, tmp_path: Path) -> None:
    """From one page for all records to three levels of pages, with values inside and outside of tree pages."""
    folder = tmp_path / f"shard-{time.monotonic_ns()}"
    writer = ShardWriter(folder, 64, encoded=True)
    for _ in range(repeats):
        for label, size in enumerate(sizes):
            writer.append(bytes(size), label)
    count = int(writer.close()["count"])
    for start, size, address, length in spans_and_values(folder, count):
        assert start % 4096 == 0 and size % 4096 == 0
        assert start <= address and address + length <= start + size
        assert address - start < 4096 and start + size - (address + length) < 4096
    shutil.rmtree(folder)


def test_a_file_with_damaged_pages_is_no_error(dataset: Path, tmp_path: Path) -> None:
    """Random bytes in its meta and tree pages: at worst, the wrong pages are prefetched."""
    original = (dataset / "train/shard-00000/data.mdb").read_bytes()
    value = memoryview(mmap.mmap(-1, 4096))
    path = tmp_path / "data.mdb"
    rng = np.random.default_rng(0)
    sound = 0
    for _ in range(300):
        content = np.frombuffer(original, np.uint8).copy()
        content[rng.integers(0, 300, 3)] = rng.integers(0, 256, 3)
        content[rng.integers(0, len(content), 3000)] = rng.integers(0, 256, 3000)
        path.write_bytes(content.tobytes()[: rng.integers(0, len(content))])
        pages = RecordPages(path, value)
        sound += pages.span(1) != (0, 0)
        pages.prefetch(1)
    assert 0 < sound < 300
    assert RecordPages(tmp_path / "none", value).span(1) == (0, 0)


def pages_in_memory(path: Path) -> int:
    """The number of a file's pages that the kernel holds in memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        flags = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        places = ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(flags.ctypes.data)
        assert LIBC.mincore(*places) == 0
    return int((flags & 1).sum())


def test_prefetch_reads_whole_records_and_little_else(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    reader = ShardReader(copy / "train")
    reader.prefetch([32])  # opens the second shard
    database = copy / "train/shard-00001/data.mdb"
    with database.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, total = pages_in_memory(database), database.stat().st_size // mmap.PAGESIZE
    if before > total // 2:
        pytest.skip("this file system keeps its files in memory")
    records = [40, 41, 50]
    reader.prefetch(records)
    sizes = [ShardReader(dataset / "train").stored_bytes(index) for index in records]  # from another copy
    wanted = sum(-(-(16 + size) // 4096) for size in sizes) * 4096 // mmap.PAGESIZE
    deadline = time.monotonic() + 30
    while pages_in_memory(database) < before + wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert before + wanted <= pages_in_memory(database) <= before + 2 * wanted < total
