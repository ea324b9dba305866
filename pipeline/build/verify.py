"""Checks every checksum, record and image of a finished split; finds any changed byte."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import lmdb
import numpy as np
from google.protobuf.message import DecodeError
from isal import isal_zlib

from base.errors import DataError
from base.files import file_sha256
from pipeline.build.workers import Crashed, Report, WorkerPool
from pipeline.datum_pb2 import Datum
from pipeline.preprocess import decode
from pipeline.shards import DATABASE, Manifest, read_crcs, record_key

MAX_PROBLEMS = 20  # reported per shard; a broken disk can damage thousands of records


@dataclass
class ShardReport:
    """The result of checking one shard, which is intact if `problems` is empty."""

    name: str
    count: int  # records that were read
    problems: list[str]
    digests: np.ndarray  # (count,) uint64, hashes of the image bytes; duplicates have equal ones


@dataclass(frozen=True)
class _ShardCheck:
    split_dir: Path
    manifest: Manifest
    number: int


def verify_split(
    split_dir: Path, workers: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Manifest, list[ShardReport], list[str]]:
    """Return (manifest, a report for each shard in order, problems of the split as a whole).

    progress(records checked, records in total) is called about ten times a second. Raises DataError if the manifest
    is missing or damaged, because nothing can be compared then.
    """
    manifest = Manifest.load(split_dir)
    problems = [
        f"{name}: not in the manifest, so it is not read: delete it" for name in _strays(split_dir, manifest)
    ]
    try:
        manifest.load_mean(split_dir)
    except DataError as error:
        problems.append(error.message)
    reports: dict[int, ShardReport] = {}
    done = 0
    with WorkerPool(check_shard, max(1, min(workers, len(manifest.shards)))) as pool:

        def tick() -> None:
            progress(done + pool.items_started(), manifest.count)

        for number in range(len(manifest.shards)):
            pool.submit(number, _ShardCheck(split_dir, manifest, number))
        for number, event in pool.events(tick):
            shard = manifest.shards[number]
            if isinstance(event, Crashed):
                # LMDB trusts the pages of its file: damaged ones can crash the process.
                where = f"key {record_key(event.position).decode()}" if event.position >= 0 else DATABASE
                problem = f"{where}: so damaged that reading it crashes"
                reports[number] = ShardReport(shard["name"], 0, [problem], np.empty(0, np.uint64))
            else:
                reports[number] = event.result
            done += shard["count"]
    progress(manifest.count, manifest.count)
    return manifest, [reports[number] for number in range(len(manifest.shards))], problems


def _strays(split_dir: Path, manifest: Manifest) -> list[str]:
    """Folders of a split that are not in its manifest, except hidden ones."""
    known = {shard["name"] for shard in manifest.shards}
    folders = (path for path in split_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path.name for path in folders if path.name not in known)


def count_duplicates(reports: list[ShardReport]) -> int:
    """The number of images that are byte-identical to an earlier one."""
    digests = np.concatenate([report.digests for report in reports])
    return len(digests) - len(np.unique(digests))


def check_shard(check: _ShardCheck, report: Report) -> ShardReport:
    """Check one shard. Runs in a worker."""
    cv2.setNumThreads(1)
    manifest, shard = check.manifest, check.manifest.shards[check.number]
    directory = check.split_dir / shard["name"]
    result = ShardReport(shard["name"], 0, [], np.empty(0, np.uint64))
    problems = result.problems
    crcs: np.ndarray | None = None
    try:
        crcs = read_crcs(directory, shard)
    except DataError as error:
        problems.append(error.message)
    try:
        if (actual := (directory / DATABASE).stat().st_size) != shard["bytes"]:
            problems.append(f"{DATABASE}: {actual:,} bytes instead of {shard['bytes']:,}")
            return result  # reading past the end of a truncated file would kill the process
        whole = file_sha256(directory / DATABASE) == shard["sha256"]
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}")
        return result
    digests = []
    try:
        with (
            lmdb.open(os.fsencode(directory), readonly=True, lock=False, create=False) as env,
            env.begin(buffers=True) as transaction,
        ):
            if (entries := env.stat()["entries"]) != shard["count"]:
                problems.append(f"{DATABASE}: {entries} records instead of {shard['count']}")
            for index in range(shard["count"]):
                report(index)
                value = transaction.get(record_key(index))
                if value is None:
                    problem: str | None = "missing"
                else:
                    record = bytes(value)
                    result.count += 1
                    problem = _check_record(record, manifest, crcs[index] if crcs is not None else None)
                    digests.append(hashlib.blake2b(_payload(record), digest_size=8).digest())
                if problem:
                    problems.append(f"key {record_key(index).decode()}: {problem}")
                if len(problems) >= MAX_PROBLEMS:
                    problems.append("there may be more: the rest of this shard was not checked")
                    break
    except lmdb.Error as error:
        problems.append(f"{DATABASE}: {error}")
    if not whole and not problems:
        problems.append(
            f"{DATABASE}: its checksum differs, but all records are intact: the damage is between them"
        )
    result.digests = np.frombuffer(b"".join(digests), np.uint64)
    return result


def _payload(record: bytes) -> bytes:
    try:
        return Datum.FromString(record).data
    except DecodeError:
        return record


def _check_record(record: bytes, manifest: Manifest, crc: int | None) -> str | None:
    """What is wrong with one record, or None."""
    try:
        datum = Datum.FromString(record)
    except DecodeError:
        return "not a Datum"
    size = manifest.size
    if (datum.channels, datum.height, datum.width) != (3, size, size):
        return f"{datum.height}x{datum.width}x{datum.channels} instead of {size}x{size}x3"
    if not 0 <= datum.label < len(manifest.classes):
        return f"label {datum.label}, but there are {len(manifest.classes)} classes"
    if not datum.HasField("encoded") or datum.encoded != (manifest.encoding != "raw"):
        return "`encoded` does not match the manifest"
    if not datum.encoded and len(datum.data) != 3 * size * size:
        return f"{len(datum.data)} bytes of pixels instead of {3 * size * size}"
    if datum.encoded and decode(np.frombuffer(datum.data, np.uint8), size) is None:
        return f"does not decode to {size}x{size} pixels"
    if crc is not None and isal_zlib.crc32(record) != crc:
        return "its checksum differs"
    return None
