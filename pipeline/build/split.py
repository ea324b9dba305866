"""Builds one split: raw images -> shards, statistics and manifest; atomic, resumable, any number of workers.

Everything happens in OUT/<split>.partial. A finished shard there has its note in work/, written last and by a
rename: a build killed at any moment goes on without redoing those. The complete directory becomes OUT/<split> by
one rename.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import time
import uuid
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np

from base.errors import DataError
from base.files import fsync_directory, write_atomic
from pipeline.build.headers import RejectedError
from pipeline.build.images import encode_bgr, kernels, prepare_bgr
from pipeline.build.sources import RawImage, RawReader, Source
from pipeline.build.statistics import Statistics
from pipeline.build.workers import SECONDS_AN_ITEM, Crashed, Report, WorkerPool
from pipeline.shards import (
    DATABASE,
    FORMAT_VERSION,
    MANIFEST,
    MEAN,
    Manifest,
    ShardWriter,
    foreign,
    pca_of_moments,
    shard_name,
)

# At most so many images a shard: about 120 MB, a quarter of a minute of work to lose. Small sets are cut into
# MIN_SHARDS all the same, to keep the workers busy, but not into shards of fewer than MIN_IMAGES.
MAX_IMAGES_PER_SHARD, MIN_SHARDS, MIN_IMAGES = 5000, 16, 128
MAX_CRASHES = 5  # of one shard without one file to blame


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a data set, apart from the source."""

    size: int = 256
    encoding: str = "jpeg"
    quality: int | None = 90
    images_per_shard: int | None = None  # None: chosen from the number of images
    seed: int = 0


@dataclass(frozen=True)
class Summary:
    """What a build did; `accepted` + `rejected` is every image of the source."""

    split_dir: Path
    classes: int
    accepted: int
    rejected: list[dict[str, str]]
    resumed: int  # images in shards that an earlier, interrupted run had finished
    seconds: float


@dataclass(frozen=True)
class _ShardJob:
    """All that a worker has to know to write one shard."""

    number: int
    partial: Path
    token: str  # of the build, in the names of all that the job writes
    source: Path
    images: list[RawImage]
    options: Options
    crashers: Mapping[int, str] = field(
        default_factory=dict
    )  # positions in `images` not to be touched again: why


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
    """Build OUT/<split> from `source`, on `workers` processes, or on what make_pool(function, workers) gives.

    progress(images done, images in all) is called about ten times a second. DataError for everything that the
    user can put right, a full disk included; after it, or a kill, `resume` goes on.
    """
    started = time.monotonic()
    final = out / source.split
    partial = _partial(final)
    plan = _plan(source, options)
    fingerprint = _fingerprint(source, options, plan)
    total = len(source.images)
    try:
        if resume and not partial.exists() and (final / MANIFEST).exists():
            manifest = Manifest.load(final)
            if manifest.fingerprint == fingerprint:
                _remove_replaced(final)  # if it was killed before that
                return _summary(final, manifest, total, started)
            raise DataError(
                f"{final} was built from other images or with other options: replace it with --overwrite"
            )
        lock, token = _claim(final, partial, fingerprint, lambda: _stamp(source), resume, overwrite)
        try:
            resumed = 0
            if not (partial / MANIFEST).exists():
                resumed = _write_shards(source, partial, token, options, plan, workers, progress, make_pool)
                _write_manifest(source, partial, token, options, plan, fingerprint)
            _remove_unfinished(partial, all_of_it=True)  # nothing strange is to be published
            manifest = _publish(partial, final)
        finally:
            _remove_unfinished(partial)
            os.close(lock)
    except OSError as error:
        raise _disk_error(error, out) from None
    return _summary(final, manifest, resumed, started)


def _summary(final: Path, manifest: Manifest, resumed: int, started: float) -> Summary:
    seconds = time.monotonic() - started
    return Summary(final, len(manifest.classes), manifest.count, manifest.rejected, resumed, seconds)


def _plan(source: Source, options: Options) -> list[list[int]]:
    """Which images go into which shard: a seeded shuffle, cut into pieces of (nearly) one length."""
    count = len(source.images)
    # Sorting raw random numbers: unlike `permutation`, NumPy promises this stream for all versions.
    order = np.argsort(np.random.Philox(key=options.seed).random_raw(count), kind="stable")
    if options.images_per_shard:
        shards = math.ceil(count / options.images_per_shard)
    else:
        shards = max(math.ceil(count / MAX_IMAGES_PER_SHARD), min(MIN_SHARDS, math.ceil(count / MIN_IMAGES)))
    return [piece.tolist() for piece in np.array_split(order, shards)]


def _fingerprint(source: Source, options: Options, plan: list[list[int]]) -> str:
    """Equal only when the finished data set would be equal, so far as can be told without reading images."""
    digest = hashlib.sha256()
    head = [FORMAT_VERSION, source.split, asdict(options), len(plan), cv2.__version__]
    digest.update(json.dumps([head, source.wnids, source.names, source.rejected], sort_keys=True).encode())
    for image in source.images:
        digest.update(json.dumps(image).encode())
    return digest.hexdigest()


def _stamp(source: Source) -> str:
    """Sizes and times of change of the source's files: kept with an unfinished build, whose images must stay.

    Not in the manifest: a copy of the images has other times, and is the same data set.
    """
    digest = hashlib.sha256()
    paths = (source.path / i.name for i in source.images) if source.path.is_dir() else [source.path]
    for path in map(os.fspath, paths):
        try:
            file = os.stat(path)  # noqa: PTH116 - a million times
            digest.update(b"%d %d\n" % (file.st_size, file.st_mtime_ns))
        except OSError:
            digest.update(b"gone\n")
    return digest.hexdigest()


# --- the directory of an unfinished build ------------------------------------------------------------------


def _claim(
    final: Path, partial: Path, fingerprint: str, stamp: Callable[[], str], resume: bool, overwrite: bool
) -> tuple[int, str]:
    """Make or take over `partial`; returns the descriptor of its lock and the token of the build.

    `stamp` looks at every image: it is called after the refusals only.
    Jobs of a cluster can outlive the build that sent them, and its directory: they know files of other names.
    """
    refuse_taken(final, resume, overwrite)
    started = _started(partial)
    work = started.parent
    if partial.exists():
        lock = _lock(partial)
        if overwrite:
            _remove_tree(partial)
            os.close(lock)
        else:
            try:
                known = json.loads(started.read_bytes())
            except (FileNotFoundError, ValueError):
                known = {"fingerprint": None, "overwrite": True}
                if (partial / MANIFEST).exists():
                    known["fingerprint"] = Manifest.load(partial).fingerprint
                elif not any(partial.glob("shard-*")):
                    known["fingerprint"] = fingerprint  # killed before it had begun
            if known["fingerprint"] != fingerprint:
                os.close(lock)
                raise DataError(
                    f"{partial} was begun from other images or with other options: "
                    "repeat those, or start afresh with --overwrite"
                )
            if "stamp" in known and known["stamp"] != stamp():
                os.close(lock)
                raise DataError(
                    f"images have changed since {partial} was begun: start afresh with --overwrite"
                )
            if final.exists() and not known["overwrite"]:
                os.close(lock)
                raise DataError(f"{final} already exists beside {partial}: replace both with --overwrite")
            work.mkdir(exist_ok=True)
            for place in work.glob("*.at"):
                place.unlink()  # jobs that a killed build left on a cluster stop when they miss it
            if "token" not in known:
                known.update(fingerprint=fingerprint, stamp=stamp(), token=uuid.uuid4().hex)
                write_atomic(started, json.dumps(known).encode())
            return lock, known["token"]
    token = uuid.uuid4().hex
    content = {"fingerprint": fingerprint, "stamp": stamp(), "overwrite": overwrite, "token": token}
    partial.mkdir(parents=True)
    lock = _lock(partial)
    work.mkdir()
    write_atomic(started, json.dumps(content).encode())
    return lock, token


def refuse_taken(final: Path, resume: bool, overwrite: bool) -> None:
    """DataError where OUT/<split> is not to be built: it is there, or begun, or what no build has made is.

    Names of files tell that, so that it can be known before a million images are listed.
    """
    try:
        _refuse_taken(final, resume, overwrite)
    except OSError as error:
        raise _disk_error(error, final.parent) from None


def _refuse_taken(final: Path, resume: bool, overwrite: bool) -> None:
    partial = _partial(final)
    ours = _started(partial).exists() and not overwrite  # goes on, and nothing in it is deleted
    for directory in (final, _replaced(final), *([] if ours else [partial])):
        _refuse_foreign(directory)
    if not (resume or overwrite):
        if partial.exists():
            raise DataError(
                f"{partial} is an unfinished build: continue it with --resume, or use --overwrite"
            )
        if final.exists():
            raise DataError(f"{final} already exists: replace it with --overwrite, or name another OUT")


def _partial(final: Path) -> Path:
    return final.with_name(f"{final.name}.partial")


def _started(partial: Path) -> Path:
    return partial / "work" / "build.json"


def _refuse_foreign(directory: Path) -> None:
    """DataError instead of deleting what no build has made."""
    if other := foreign(directory):
        raise DataError(f"{directory} {other}, which no build made: move it away, or name another OUT")


def _remove_tree(directory: Path) -> None:
    """rmtree, also while a job that is about to stop still makes or renames something in there."""
    for _ in range(20):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)
    shutil.rmtree(directory)


def _lock(directory: Path, name: str = "", wait: bool = False) -> int:
    """Keep others out of `directory`, or of the file `name` in it, until the descriptor is closed or a kill."""
    flags = os.O_RDWR | os.O_CREAT if name else os.O_RDONLY
    descriptor = os.open(directory / name, flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"another build is at work in {directory}: wait for it, or stop it") from None
    except OSError:
        pass  # a file system without locks: better to build than to refuse
    return descriptor


def _remove_unfinished(partial: Path, all_of_it: bool = False) -> None:
    """What stopped workers were writing: useless, and on a full disk in the way.

    Where a worker of a cluster may be at it still, that worker or --resume removes it, unless `all_of_it` is to go.
    """
    for path in [*partial.glob("*.tmp"), *partial.glob("work/*.tmp")]:
        lock = None
        try:
            if not all_of_it and path.name.startswith("shard-"):
                lock = _lock(partial / "work", f"{path.name.partition('.')[0]}.lock")
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except (DataError, OSError):  # at work there, or the disk is read-only
            continue
        finally:
            if lock is not None:
                os.close(lock)


def _disk_error(error: OSError, out: Path) -> DataError:
    if error.errno == errno.ENOSPC or error.errno == errno.EDQUOT:
        return DataError(f"the disk of {out} is full: make room, then continue with --resume")
    if error.errno == errno.EROFS or error.errno == errno.EACCES:
        return DataError(f"cannot write to {error.filename or out}: {error.strerror}; name another OUT")
    return DataError(f"{error.filename or out}: {error.strerror}; continue with --resume when that is solved")


# --- shards ------------------------------------------------------------------------------------------------


def _note(partial: Path, number: int, token: str) -> Path:
    """What a finished shard adds to the manifest: an npz with the sums and a JSON text."""
    return partial / "work" / f"{shard_name(number)}.{token}.npz"


def _is_finished(partial: Path, number: int, token: str) -> bool:
    """Whether a shard has its note, and the file that the note speaks of is there."""
    try:
        with np.load(_note(partial, number, token)) as arrays:
            shard = json.loads(str(arrays["text"]))["shard"]
        return shard["count"] == 0 or (partial / shard["name"] / DATABASE).stat().st_size == shard["bytes"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def _write_shards(
    source: Source,
    partial: Path,
    token: str,
    options: Options,
    plan: list[list[int]],
    workers: int,
    progress: Callable[[int, int], None],
    make_pool: Callable[..., Any] | None = None,
) -> int:
    """Write every shard that has no note yet; returns how many images had been done before."""
    jobs = {}
    for number, piece in enumerate(plan):
        if not _is_finished(partial, number, token):
            images = [source.images[index] for index in piece]
            jobs[number] = _ShardJob(number, partial, token, source.path, images, options)
    total = len(source.images)
    resumed = done = total - sum(len(job.images) for job in jobs.values())
    if jobs and make_pool is None:
        kernels()  # built before the workers look for it, and with a warning if that fails: they say nothing
    progress(done, total)
    crashes: dict[int, list[int]] = {number: [] for number in jobs}
    with (make_pool or WorkerPool)(write_shard, min(workers, len(jobs))) as pool:

        def tick() -> None:
            progress(done + pool.items_begun(), total)

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
    """The job to try next. A file that kills two workers is to blame; else something from outside was."""
    crashes.append(crash.position)
    if crash.position >= 0 and crashes.count(crash.position) == 2:
        why = (
            f"takes more than {SECONDS_AN_ITEM:.0f} s to decode" if crash.too_long else "crashed the decoder"
        )
        return replace(job, crashers={**job.crashers, crash.position: why})
    if len(crashes) - 2 * len(job.crashers) >= MAX_CRASHES:
        raise DataError(
            f"worker processes were killed {len(crashes)} times in {shard_name(job.number)} (out of memory?): "
            "continue with --resume and fewer --workers"
        )
    return job


def write_shard(job: _ShardJob, report: Report) -> None:
    """In a worker: write one shard and, last, its note."""
    cv2.setNumThreads(1)  # one process a core already
    try:
        # After a kill of the main process its workers may live for a moment: never two in one shard.
        lock = _lock(job.partial / "work", f"{shard_name(job.number)}.lock", wait=True)
        try:
            if not _is_finished(job.partial, job.number, job.token):
                _write_shard(job, report)
        except lmdb.Error as error:
            # LMDB calls a write that a full disk cut short an I/O error: a plain one tells the true reason.
            (job.partial / f"{shard_name(job.number)}.probe.tmp").write_bytes(bytes(1 << 24))
            raise DataError(f"{job.partial}: {error}; continue with --resume when that is solved") from None
        finally:
            os.close(lock)
    except OSError as error:
        raise _disk_error(error, job.partial.parent) from None


def _write_shard(job: _ShardJob, report: Report) -> None:
    options, directory = job.options, job.partial / shard_name(job.number)
    unfinished = directory.with_name(f"{directory.name}.{job.token}.tmp")
    note_path = _note(job.partial, job.number, job.token)
    report(-1)  # raises if this job has been given up: then another one may be at work here
    note_path.unlink(missing_ok=True)
    for leftover in (unfinished, directory):
        if leftover.exists():
            shutil.rmtree(leftover)
    statistics = Statistics(options.size)
    rejected = []
    reader = RawReader(job.source)
    writer = ShardWriter(unfinished, options.size, encoded=options.encoding != "raw")
    try:
        for position, image in enumerate(job.images):
            report(position)
            try:
                if position in job.crashers:
                    raise RejectedError(job.crashers[position])
                bgr = prepare_bgr(_read(reader, image, job.source), options.size)
                data = encode_bgr(bgr, options.encoding, options.quality or 0)
            except RejectedError as error:
                rejected.append({"source": image.name, "reason": str(error)})
                continue
            writer.append(data, image.label)
            statistics.add_bgr(bgr)
        report(-1)
        entry = {"name": directory.name, **writer.close()}
        report(-1)
    except DataError:  # given up; whoever wants it later finds no rest, nor does a full disk
        writer.abort()
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        writer.abort()
        reader.close()
    statistics.flush()
    unfinished.rename(directory)
    fsync_directory(job.partial)
    text = json.dumps({"shard": entry, "products": statistics.products, "rejected": rejected})
    note = io.BytesIO()
    np.savez(note, sums=statistics.sums, text=np.array(text))
    report(-1)  # after the rename: whoever gave the job up and then tidied has tidied this shard, too
    write_atomic(note_path, note.getvalue())


def _read(reader: RawReader, image: RawImage, source: Path) -> bytes:
    try:
        return reader.read(image)
    except ValueError as error:
        raise RejectedError(str(error)) from None
    except OSError as error:
        # One bad file is its own fault; when the whole source has gone, nothing else would be left either.
        if not source.exists():
            raise DataError(f"{source} has gone: bring it back, then continue with --resume") from None
        raise RejectedError(f"cannot be read: {error.strerror}") from None


# --- the end -----------------------------------------------------------------------------------------------


def _write_manifest(
    source: Source, partial: Path, token: str, options: Options, plan: list[list[int]], fingerprint: str
) -> None:
    """Add up the shards' notes: mean.npy and the manifest, whose presence says that all is there."""
    sums = np.zeros((options.size, options.size, 3), np.int64)
    products = [[0] * 3 for _ in range(3)]
    shards: list[dict[str, Any]] = []
    rejected = [{"source": name, "reason": reason} for name, reason in source.rejected]
    for number in range(len(plan)):
        if not _is_finished(partial, number, token):
            raise DataError(f"{partial / shard_name(number)} is not whole: continue with --resume")
        with np.load(_note(partial, number, token)) as arrays:
            note = json.loads(str(arrays["text"]))
            shard_sums = arrays["sums"]
        rejected += note["rejected"]
        if note["shard"]["count"] == 0:
            shutil.rmtree(partial / note["shard"]["name"], ignore_errors=True)
            continue
        shards.append(note["shard"])
        sums += shard_sums
        products = [[products[i][j] + note["products"][i][j] for j in range(3)] for i in range(3)]
    rejected.sort(key=lambda entry: entry["source"])
    count = sum(shard["count"] for shard in shards)
    if count == 0:
        raise DataError(
            f"none of the {len(rejected)} images of {source.path} can be used; "
            f"{rejected[0]['source']}: {rejected[0]['reason']}"
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
    ).save(partial)


def _publish(partial: Path, final: Path) -> Manifest:
    """Make a complete build visible; safe to repeat after a kill at any line."""
    manifest = Manifest.load(partial)
    if final.exists():  # maybe it was not there when the build began, hours ago
        _refuse_foreign(final)
        started = _started(partial)
        if started.exists() and not json.loads(started.read_bytes())["overwrite"]:
            raise DataError(f"{final} has come meanwhile: move it away, then continue with --resume")
    shutil.rmtree(partial / "work", ignore_errors=True)
    if final.exists():
        _remove_replaced(final)
        final.rename(_replaced(final))
    partial.rename(final)
    fsync_directory(final.parent)
    _remove_replaced(final)
    return manifest


def _replaced(final: Path) -> Path:
    """Where --overwrite puts the old data set for the moment between two renames."""
    return final.with_name(final.name + ".replaced")


def _remove_replaced(final: Path) -> None:
    if _replaced(final).exists():
        _refuse_foreign(_replaced(final))
        shutil.rmtree(_replaced(final))
