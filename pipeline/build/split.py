"""Builds one split: raw images -> shards, statistics and manifest; atomic, resumable, any number of workers.

The build works in OUT/<split>.partial. The last step of each shard is an atomic write of a note in work/, so a
killed build resumes without redoing finished shards. One rename turns the complete directory into OUT/<split>.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import PIL

from base.errors import DataError
from base.files import check_stored, fsync_directory, read_regular, write_atomic
from pipeline.build.headers import RejectedError
from pipeline.build.images import DecoderWarnings, encode_bgr, kernels, prepare_bgr
from pipeline.build.listing import RawImage, RawReader
from pipeline.build.sources import Source, missing_classes
from pipeline.build.statistics import Statistics
from pipeline.build.workers import MAX_SECONDS_PER_ITEM, Crashed, Report, WorkerPool
from pipeline.build.workspace import (
    claim,
    disk_error,
    final_of,
    lock_shard,
    partial_of,
    refuse_foreign,
    remove_replaced,
    remove_unfinished,
    replaced_of,
    started_of,
)
from pipeline.shards import (
    DATABASE,
    FORMAT_VERSION,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MEAN,
    Manifest,
    ShardWriter,
    pca_of_moments,
    shard_name,
)

# A full shard has about 120 MB and takes a quarter of a minute, which is what a kill can lose. Small data sets
# still get MIN_SHARDS shards, to keep the workers busy, unless that makes shards of fewer than MIN_IMAGES.
MAX_IMAGES_PER_SHARD, MIN_SHARDS, MIN_IMAGES = 5000, 16, 128
MAX_CRASHES = 5  # of one shard that no single file explains


@dataclass(frozen=True)
class Options:
    """Everything besides the source that determines the bytes of a data set."""

    size: int = 256
    encoding: str = "jpeg"
    quality: int | None = 90
    images_per_shard: int | None = None  # None: depends on the number of images
    seed: int = 0
    strict: bool = False  # reject images that decode with warnings


@dataclass(frozen=True)
class Summary:
    """The result of a build. `accepted` and `rejected` together are all images of the source."""

    split_dir: Path
    classes: int
    accepted: int
    rejected: list[dict[str, str]]
    warned: list[dict[str, str]]  # accepted images that the decoder reported as damaged
    empty_classes: list[str]  # classes without an accepted image
    resumed: int  # images in shards that an earlier, interrupted build finished
    seconds: float


@dataclass(frozen=True)
class _ShardJob:
    """Everything that a worker needs to write one shard."""

    number: int
    partial: Path
    token: str  # of the build; part of the names of the files that the job writes
    source: Path
    images: list[RawImage]
    options: Options
    # {position in `images`: reason} of files that killed workers and are rejected
    crashers: Mapping[int, str] = field(default_factory=dict)


def build_split(
    source: Source,
    out: Path,
    options: Options,
    *,
    workers: int,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    make_pool: Callable[..., Any] | None = None,
) -> Summary:
    """Build OUT/<split> from `source` with `workers` processes, or with the pool make_pool(function, workers).

    progress(images done, images in total) is called about ten times a second. Raises UserError for everything that
    the user can fix, such as a full disk. `resume` continues after an error or a kill.
    """
    started = time.monotonic()
    final = final_of(out, source.split)
    partial = partial_of(final)
    plan = _plan(source, options)
    fingerprint = _fingerprint(source, options, plan)
    total = len(source.images)
    try:
        if resume and not partial.exists() and (final / MANIFEST).exists():
            manifest = Manifest.load(final)
            if manifest.fingerprint == fingerprint:
                remove_replaced(final)  # a build that was killed just before its end leaves this
                return _summary(source, out, manifest, total, started)
            raise DataError(
                f"{final} was built from other images or with other options: replace it with --overwrite"
            )
        with claim(final, partial, fingerprint, lambda: _stamp(source), resume, overwrite) as token:
            try:
                resumed = 0
                if not (partial / MANIFEST).exists():
                    resumed = _write_shards(
                        source, partial, token, options, plan, workers, progress, make_pool
                    )
                    _write_manifest(source, partial, token, options, plan, fingerprint)
                remove_unfinished(partial, everything=True)  # no leftovers in what is published
                manifest = _publish(partial, final)
            finally:
                remove_unfinished(partial)
    except OSError as error:
        raise disk_error(error, out) from None
    return _summary(source, out, manifest, resumed, started)


def _summary(source: Source, out: Path, manifest: Manifest, resumed: int, started: float) -> Summary:
    return Summary(
        out / source.split,
        len(manifest.classes),
        manifest.count,
        manifest.rejected,
        manifest.warned,
        missing_classes(source, {entry["source"] for entry in manifest.rejected}),
        resumed,
        time.monotonic() - started,
    )


def _plan(source: Source, options: Options) -> list[np.ndarray]:
    """Indices of the images of each shard: a seeded shuffle, cut into pieces of (nearly) equal length."""
    count = len(source.images)
    group = np.arange(count)
    if source.images[0].file.endswith(".parquet"):  # row groups are read whole, so each stays together
        groups: dict[tuple[str, int], int] = {}
        group[:] = [groups.setdefault((i.file, i.length), len(groups)) for i in source.images]
    # argsort of raw random numbers: NumPy guarantees this stream for all versions, unlike `permutation`
    shuffled = np.argsort(np.random.Philox(key=options.seed).random_raw(group.max() + 1), kind="stable")
    order = np.argsort(np.argsort(shuffled)[group], kind="stable")
    if options.images_per_shard:
        shards = math.ceil(count / options.images_per_shard)
    else:
        shards = max(math.ceil(count / MAX_IMAGES_PER_SHARD), min(MIN_SHARDS, math.ceil(count / MIN_IMAGES)))
    return np.array_split(order, shards)


def _fingerprint(source: Source, options: Options, plan: list[np.ndarray]) -> str:
    """A hash that is equal only if the data sets are equal, as far as can be known without reading the images."""
    digest = hashlib.sha256()
    chosen = {key: value for key, value in asdict(options).items() if key != "strict" or value}
    head = [FORMAT_VERSION, source.split, chosen, len(plan), cv2.__version__, PIL.__version__]
    digest.update(json.dumps([head, source.wnids, source.names, source.rejected], sort_keys=True).encode())
    for image in source.images:
        digest.update(json.dumps(image if image.file else image[:4]).encode())
    return digest.hexdigest()


def _stamp(source: Source) -> str:
    """A hash of the sizes and modification times of the source's files, stored with an unfinished build.

    It shows whether images changed before --resume. It is not in the manifest, because a copy of the images has
    other times but gives the same data set.
    """
    digest = hashlib.sha256()
    if not source.path.is_dir():
        paths: Iterable[str] = [os.fspath(source.path)]
    else:
        names: Iterable[str] = dict.fromkeys(i.file for i in source.images if i.file)
        paths = (os.path.join(source.path, name) for name in names or (i.name for i in source.images))  # noqa: PTH118
    for path in paths:
        try:
            file = os.stat(path)  # noqa: PTH116 - called a million times
            digest.update(b"%d %d\n" % (file.st_size, file.st_mtime_ns))
        except OSError:
            digest.update(b"gone\n")
    return digest.hexdigest()


# --- shards ------------------------------------------------------------------------------------------------


def _note(partial: Path, number: int, token: str) -> Path:
    """Path of a finished shard's contribution to the manifest: an npz file with the sums and a JSON text."""
    return partial / "work" / f"{shard_name(number)}.{token}.npz"


def _read_note(
    partial: Path, number: int, token: str, images: int, size: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Read (text, sums) of a finished shard of `images` images; ValueError if `_write_shard` did not write it."""
    try:
        content = read_regular(_note(partial, number, token), 24 * size**2 + MAX_MANIFEST_BYTES)
        check_stored(content)
        with np.load(io.BytesIO(content)) as arrays:
            note, sums = json.loads(str(arrays["text"])), arrays["sums"]
        shard = note["shard"]
        good = (
            shard["name"] == shard_name(number)
            and shard["count"] + len(note["rejected"]) == images
            and np.shape(note["products"]) == (3, 3)
            and sums.shape == (size, size, 3)
            and sums.dtype == np.int64
        )
        if good and shard["count"]:
            good = (partial / shard["name"] / DATABASE).stat().st_size == shard["bytes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, zipfile.BadZipFile, MemoryError):
        good = False
    if not good:
        raise ValueError("not a finished shard")
    return note, sums


def _is_finished(partial: Path, number: int, token: str, images: int, size: int) -> bool:
    """Whether a shard has its note and its database."""
    try:
        _read_note(partial, number, token, images, size)
    except ValueError:
        return False
    return True


def _write_shards(
    source: Source,
    partial: Path,
    token: str,
    options: Options,
    plan: list[np.ndarray],
    workers: int,
    progress: Callable[[int, int], None],
    make_pool: Callable[..., Any] | None = None,
) -> int:
    """Write all unfinished shards; return the number of images in shards that were already finished."""
    jobs = {}
    for number, piece in enumerate(plan):
        if not _is_finished(partial, number, token, len(piece), options.size):
            images = [source.images[index] for index in piece.tolist()]
            jobs[number] = _ShardJob(number, partial, token, source.path, images, options)
    total = len(source.images)
    resumed = done = total - sum(len(job.images) for job in jobs.values())
    if jobs and make_pool is None:
        kernels()  # compile before the workers need it, and warn here if that fails: workers print nothing
    progress(done, total)
    crashes: dict[int, list[int]] = {number: [] for number in jobs}
    with (make_pool or WorkerPool)(write_shard, min(workers, len(jobs))) as pool:

        def tick() -> None:
            progress(done + pool.items_started(), total)

        for number, job in jobs.items():
            pool.submit(number, job)
        for number, event in pool.events(tick):
            if isinstance(event, Crashed):
                jobs[number] = _after_crash(jobs[number], event, crashes[number])
                pool.submit(number, jobs[number], first=True)
            else:
                done += len(jobs[number].images)
    progress(done, total)
    return resumed


def _after_crash(job: _ShardJob, crash: Crashed, crashes: list[int]) -> _ShardJob:
    """The job to retry. A file at which two workers died is rejected; a single death may have another cause."""
    crashes.append(crash.position)
    if crash.position >= 0 and crashes.count(crash.position) == 2:
        why = (
            f"takes more than {MAX_SECONDS_PER_ITEM:.0f} s to decode"
            if crash.too_long
            else "crashed the decoder"
        )
        return replace(job, crashers={**job.crashers, crash.position: why})
    if len(crashes) - 2 * len(job.crashers) >= MAX_CRASHES:
        raise DataError(
            f"worker processes were killed {len(crashes)} times in {shard_name(job.number)} (out of memory?): "
            "continue with --resume and fewer --workers"
        )
    return job


def write_shard(job: _ShardJob, report: Report) -> None:
    """Write one shard, then its note. Runs in a worker."""
    cv2.setNumThreads(1)  # there is one process per core
    try:
        # Workers can outlive a killed main process for a moment. The lock keeps two of them out of one shard.
        with lock_shard(job.partial, job.number, wait=True):
            try:
                if not _is_finished(job.partial, job.number, job.token, len(job.images), job.options.size):
                    _write_shard(job, report)
            except lmdb.Error as error:
                # LMDB reports a full disk as an I/O error. A plain write fails with the true reason.
                (job.partial / f"{shard_name(job.number)}.probe.tmp").write_bytes(bytes(1 << 24))
                raise DataError(f"{job.partial}: {error}; continue with --resume when it is fixed") from None
    except OSError as error:
        raise disk_error(error, job.partial.parent) from None


def _write_shard(job: _ShardJob, report: Report) -> None:
    options, directory = job.options, job.partial / shard_name(job.number)
    unfinished = directory.with_name(f"{directory.name}.{job.token}.tmp")
    note_path = _note(job.partial, job.number, job.token)
    report(-1)  # raises if this job was abandoned: another job may be writing the shard
    note_path.unlink(missing_ok=True)
    for leftover in (unfinished, directory):
        if leftover.exists():
            shutil.rmtree(leftover)
    statistics = Statistics(options.size)
    rejected, warned = [], []
    reader = RawReader(job.source)
    writer = ShardWriter(unfinished, options.size, encoded=options.encoding != "raw")
    decoder = DecoderWarnings()
    try:
        for position, image in enumerate(job.images):
            report(position)
            try:
                if position in job.crashers:
                    raise RejectedError(job.crashers[position])
                content = _read(reader, image, job.source)
                decoder.take()
                bgr = prepare_bgr(content, options.size)
                if warning := decoder.take():
                    if options.strict:
                        raise RejectedError(f"damaged: {warning}")
                    warned.append({"source": image.name, "reason": warning})
                data = encode_bgr(bgr, options.encoding, options.quality or 0)
            except RejectedError as error:
                rejected.append({"source": image.name, "reason": str(error)})
                continue
            writer.append(data, image.label)
            statistics.add_bgr(bgr)
        report(-1)
        entry = {"name": directory.name, **writer.close()}
        report(-1)
    except DataError:  # abandoned: leave no partial shard behind, which would also fill a full disk
        writer.abort()
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        writer.abort()
        reader.close()
        decoder.close()
    statistics.flush()
    unfinished.rename(directory)
    fsync_directory(job.partial)
    text = json.dumps(
        {"shard": entry, "products": statistics.products, "rejected": rejected, "warned": warned}
    )
    note = io.BytesIO()
    np.savez(note, sums=statistics.sums, text=np.array(text))
    # if the job was abandoned before the rename, the clean-up has removed the shard: write no note
    report(-1)
    write_atomic(note_path, note.getvalue())


def _read(reader: RawReader, image: RawImage, source: Path) -> bytes:
    try:
        return reader.read(image)
    except ValueError as error:
        raise RejectedError(str(error)) from None
    except OSError as error:
        # If the whole source is gone, all other files would be rejected as well.
        if not source.exists():
            raise DataError(f"{source} no longer exists: restore it, then continue with --resume") from None
        raise RejectedError(f"cannot be read: {error.strerror}") from None


# --- manifest ----------------------------------------------------------------------------------------------


def _write_manifest(
    source: Source, partial: Path, token: str, options: Options, plan: list[np.ndarray], fingerprint: str
) -> None:
    """Combine the shards' notes into mean.npy and the manifest, which marks a complete build."""
    sums = np.zeros((options.size, options.size, 3), np.int64)
    products = [[0] * 3 for _ in range(3)]
    shards: list[dict[str, Any]] = []
    rejected = [{"source": name, "reason": reason} for name, reason in source.rejected]
    warned: list[dict[str, str]] = []
    for number, piece in enumerate(plan):
        try:
            note, shard_sums = _read_note(partial, number, token, len(piece), options.size)
        except ValueError:
            raise DataError(f"{partial / shard_name(number)} is incomplete: continue with --resume") from None
        warned += note.get("warned", [])
        rejected += note["rejected"]
        if note["shard"]["count"] == 0:
            shutil.rmtree(partial / shard_name(number), ignore_errors=True)
            continue
        shards.append(note["shard"])
        sums += shard_sums
        products = [[products[i][j] + note["products"][i][j] for j in range(3)] for i in range(3)]
    rejected.sort(key=lambda entry: entry["source"])
    count = sum(shard["count"] for shard in shards)
    if count == 0:
        raise DataError(
            f"none of the {len(rejected)} images in {source.path} can be used, for example {rejected[0]['source']} "
            f"({rejected[0]['reason']}): give another SOURCE"
        )
    content = io.BytesIO()
    np.save(content, (sums / count).astype(np.float32))
    write_atomic(partial / MEAN, content.getvalue())
    channel_sums = [int(total) for total in sums.sum(axis=(0, 1))]
    mean, values, vectors = pca_of_moments(count * options.size**2, channel_sums, products)
    Manifest(
        format_version=FORMAT_VERSION,
        split=source.split,
        count=count,
        size=options.size,
        encoding=options.encoding,
        quality=options.quality if options.encoding == "jpeg" else None,
        seed=options.seed,
        classes=[{"wnid": wnid, "name": source.names.get(wnid)} for wnid in source.wnids],
        shards=shards,
        rejected=rejected,
        channel_mean=mean,
        pca_eigenvalues=values,
        pca_eigenvectors=vectors,
        mean_sha256=hashlib.sha256(content.getvalue()).hexdigest(),
        fingerprint=fingerprint,
        warned=sorted(warned, key=lambda entry: entry["source"]),
    ).save(partial)


def _publish(partial: Path, final: Path) -> Manifest:
    """Rename a complete build to its final name. A kill at any point is safe: --resume repeats the rest."""
    manifest = Manifest.load(partial)
    if final.exists():  # it may have been created since the build started
        refuse_foreign(final)
        started = started_of(partial)
        if started.exists() and not json.loads(started.read_bytes())["overwrite"]:
            raise DataError(
                f"{final} was created while this build ran: move it away, then continue with --resume"
            )
    shutil.rmtree(partial / "work", ignore_errors=True)
    if final.exists():
        remove_replaced(final)
        final.rename(replaced_of(final))
    partial.rename(final)
    fsync_directory(final.parent)
    remove_replaced(final)
    return manifest
