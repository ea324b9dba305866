"""LMDB shards on disk: writer, reader, manifest and checksums.

A split is a directory::

    DATA/train/manifest.json          its content, with a checksum of each file
    DATA/train/mean.npy               (size, size, 3) float32 RGB, levels 0..255
    DATA/train/shard-00000/data.mdb   a Caffe LMDB: key "00000000", "00000001", ... -> Datum
    DATA/train/shard-00000/crc32.npy  (count,) uint32, the CRC-32 of each record, to find a damaged image

The global index of a sample counts through the shards in the manifest's order.
Light reader processes import this module: it must not import torch, DALI or OpenCV.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import io
import json
import math
import os
import re
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from shlex import quote
from typing import Any
from weakref import WeakValueDictionary

import lmdb
import numpy as np
from google.protobuf.message import DecodeError
from isal import isal_zlib

from base.errors import DataError
from base.files import file_sha256, fsync_directory, read_regular, write_atomic
from pipeline.datum_pb2 import Datum
from pipeline.lmdb_pages import RecordPages

FORMAT_VERSION = 1
# {encoding: last bytes of a complete file}: JPEG's end of image, PNG's last chunk
ENDS = {"jpeg": b"\xff\xd9", "png": b"IEND\xaeB`\x82", "raw": b""}
ENCODINGS = tuple(ENDS)
MANIFEST, MEAN, DATABASE, RECORD_CRCS = "manifest.json", "mean.npy", "data.mdb", "crc32.npy"
# Limits for a manifest, which is read into memory as a whole. ImageNet-21k has 21,841 classes.
MAX_CLASSES, MAX_SIZE, MAX_MANIFEST_BYTES = 100_000, 4096, 64 << 20
# Between two checks of the length of an open shard. A system call per record costs half as much as reading it.
SECONDS_BETWEEN_CHECKS = 0.1


def shard_name(number: int) -> str:
    """Directory name of shard `number`: "shard-00000", ..."""
    return f"shard-{number:05d}"


def record_key(local_index: int) -> bytes:
    """Key of a shard's `local_index`-th record; zero-padded, so that keys sort by number."""
    return b"%08d" % local_index


def find_foreign_entry(split_dir: Path) -> str | None:
    """Describe an entry that no build made: "holds n01440764", or "is a file"; None if `split_dir` may be deleted.

    Hidden files do not count: some systems create them.
    """
    if not split_dir.is_dir():
        return "is a file" if split_dir.exists() else None
    try:
        for entry in sorted(split_dir.iterdir()):
            folder = entry.is_dir()
            if not re.fullmatch(_OWN_FOLDER if folder else _OWN_FILE, entry.name):
                return f"holds {entry.name}"
            for inside in sorted(entry.iterdir()) if folder else ():
                if inside.is_dir() or not re.fullmatch(_OWN_FILE, inside.name):
                    return f"holds {entry.name}/{inside.name}"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


_OWN_FOLDER = r"work|shard-\d{5,}(\..+)?"
_OWN_FILE = (
    r"\..*|((manifest|build)\.json|mean\.npy|crc32\.npy|(data|lock)\.mdb|shard-\d{5,}\..+)"
    r"(\.[0-9a-f]{16})?(\.tmp)?"
)


@dataclass(frozen=True)
class Manifest:
    """The metadata of one split, used by the trainer and all tools.

    `channel_mean` is RGB in levels 0..255. `pca_eigenvalues` (descending) and `pca_eigenvectors` (3x3, column i
    belongs to eigenvalue i; its largest component is positive) are those of the RGB covariance of all pixels scaled
    to [0, 1], which the colour shift of the AlexNet paper (section 4.1) uses.
    """

    format_version: int
    split: str  # "train" or "val"
    count: int
    size: int  # images are size x size pixels
    encoding: str  # one of ENCODINGS
    quality: int | None  # of the JPEGs, None for lossless encodings
    seed: int  # of the shuffle at build time
    classes: list[dict[str, str | None]]  # {"wnid", "name"}; the label is the position in this list
    shards: list[dict[str, Any]]  # {"name", "count", "bytes", "sha256", "crc32_sha256"}
    rejected: list[dict[str, str]]  # {"source", "reason"}
    channel_mean: list[float]
    pca_eigenvalues: list[float]
    pca_eigenvectors: list[list[float]]
    mean_sha256: str  # of mean.npy
    fingerprint: str  # hash of the list of images and the options; if it is equal, --resume has nothing to do
    # {"source", "reason"} of accepted images that decoded with a warning; not in the file if empty
    warned: list[dict[str, str]] = field(default_factory=list)

    @staticmethod
    def load(split_dir: str | Path) -> Manifest:
        """Read and check `split_dir`/manifest.json. Raises DataError if it is missing or damaged."""
        path = Path(split_dir) / MANIFEST
        try:
            content = read_regular(path, MAX_MANIFEST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(_no_data_set(Path(split_dir))) from None
        except OSError as error:
            _check_open_files(error, path)
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        damaged = f"{path} is damaged: restore it from a copy or build the data set again"
        try:
            values = json.loads(content)
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise DataError(
                    f"{path} has format {version}, but this program reads format {FORMAT_VERSION}: build it again"
                )
            optional: dict[str, Any] = {"warned": []}
            manifest = Manifest(**{f.name: (optional | values)[f.name] for f in fields(Manifest)})
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(damaged) from None
        # Comparing the whole file also finds a changed bit in white space or in the checksum itself.
        if content != manifest._serialise():
            raise DataError(damaged)
        # The checksum shows that the file is complete, not that a build wrote it.
        if problem := manifest._problem():
            raise DataError(f"{path} has an invalid value ({problem}): build the data set again")
        return manifest

    def _problem(self) -> str | None:
        """The first invalid value, or None. The rest of the program relies on the types and ranges checked here."""
        expected = {
            "split": self.split in ("train", "val"),
            "count": _whole(self.count, 1),
            "size": _whole(self.size, 1, MAX_SIZE),
            "encoding": self.encoding in ENCODINGS,
            "quality": self.quality is None or _whole(self.quality, 1, 100),
            "seed": _whole(self.seed, most=2**64 - 1),
            "classes": isinstance(self.classes, list)
            and 1 <= len(self.classes) <= MAX_CLASSES
            and all(_keys(entry, wnid=str, name=(str, type(None))) for entry in self.classes),
            "shards": isinstance(self.shards, list)
            and all(
                _keys(entry, name=str, count=int, bytes=int, sha256=str, crc32_sha256=str)
                and re.fullmatch(_SHARD_NAME, entry["name"])
                and _whole(entry["count"], 1)
                and _whole(entry["bytes"], 1)
                for entry in self.shards
            ),
            "rejected": isinstance(self.rejected, list)
            and all(_keys(entry, source=str, reason=str) for entry in self.rejected),
            "warned": isinstance(self.warned, list)
            and all(_keys(entry, source=str, reason=str) for entry in self.warned),
            "channel_mean": _numbers(self.channel_mean, 0, 255),
            "pca_eigenvalues": _numbers(self.pca_eigenvalues, 0, 1),
            "pca_eigenvectors": isinstance(self.pca_eigenvectors, list)
            and len(self.pca_eigenvectors) == 3
            and all(_numbers(row, -1.001, 1.001) for row in self.pca_eigenvectors),
            "mean_sha256": isinstance(self.mean_sha256, str),
            "fingerprint": isinstance(self.fingerprint, str),
        }
        for name, holds in expected.items():
            if not holds:
                return (
                    f"its {name}" if len(f"{getattr(self, name)}") > 60 else f"{name} {getattr(self, name)!r}"
                )
        names = [shard["name"] for shard in self.shards]
        if len(set(names)) != len(names):
            return "a shard is listed twice"
        if (total := sum(shard["count"] for shard in self.shards)) != self.count:
            return f"{self.count} images, but {total} in its shards"
        return None

    @property
    def content_sha256(self) -> str:
        """Hash of the records and the mean image; equal for equal data sets, whatever the source."""
        return hashlib.sha256(
            "".join([*(s["sha256"] for s in self.shards), self.mean_sha256]).encode()
        ).hexdigest()

    def save(self, split_dir: str | Path) -> None:
        """Write manifest.json atomically; equal values give equal bytes."""
        write_atomic(Path(split_dir) / MANIFEST, self._serialise())

    def load_mean(self, split_dir: str | Path) -> np.ndarray:
        """Read mean.npy: (size, size, 3) float32 RGB, levels 0..255. Raises DataError if it is damaged."""
        path, shape = Path(split_dir) / MEAN, (self.size, self.size, 3)
        try:
            content = read_regular(path, 12 * self.size**2 + _NPY_HEADER)
        except OSError as error:
            _check_open_files(error, path)
            raise DataError(f"cannot read {path}: {error.strerror}; build the data set again") from None
        if hashlib.sha256(content).hexdigest() != self.mean_sha256:
            raise DataError(
                f"{path} is damaged (its checksum differs): restore it or build the data set again"
            )
        try:
            mean = read_array(content, np.float32, shape)
        except ValueError as error:
            raise DataError(f"{path} is not a mean image ({error}): build the data set again") from None
        if not ((mean >= 0) & (mean <= 255)).all():
            raise DataError(f"{path} is not a mean image (levels outside 0..255): build the data set again")
        return mean

    def _serialise(self) -> bytes:
        values = asdict(self)
        if not values["warned"]:
            del values["warned"]
        body = json.dumps(values, sort_keys=True).encode()
        values["manifest_sha256"] = hashlib.sha256(body).hexdigest()
        return (json.dumps(values, sort_keys=True, indent=1) + "\n").encode()


_SHARD_NAME = r"shard-\d{5,9}"
_NPY_HEADER = 4096  # maximum size in bytes; np.save writes 128


def _whole(value: object, least: int = 0, most: int = 2**63 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _numbers(values: object, least: float, most: float) -> bool:
    """Whether `values` is a list of three numbers in that range; NaN is not."""
    return (
        isinstance(values, list)
        and len(values) == 3
        and all(isinstance(value, int | float) and least <= value <= most for value in values)
    )


def _keys(entry: object, **types: type | tuple[type, ...]) -> bool:
    """Whether `entry` is a dictionary with these keys and types."""
    return isinstance(entry, dict) and all(
        name in entry and isinstance(entry[name], kind) for name, kind in types.items()
    )


def read_array(content: bytes, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    """Read the content of an .npy file; ValueError unless it is complete and has this type and shape.

    np.load would allocate memory for any shape that the header claims.
    """
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("unknown version of the .npy format")
    try:
        found = np.lib.format.read_array_header_1_0(file)
    except Exception:  # it is a Python expression, whose parser raises many types
        raise ValueError("its header is damaged") from None
    if found != (shape, False, np.dtype(dtype)):
        raise ValueError(f"{found[2]} {found[0]} instead of {np.dtype(dtype)} {shape}")
    if len(content) - file.tell() != np.dtype(dtype).itemsize * math.prod(shape):
        raise ValueError("its length is wrong")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape).copy()


def read_crcs(directory: Path, shard: dict[str, Any]) -> np.ndarray:
    """Read the CRC-32 of every record of a shard, (count,) uint32. Raises DataError if missing or damaged."""
    path = directory / RECORD_CRCS
    try:
        content = read_regular(path, 4 * shard["count"] + _NPY_HEADER)
        if hashlib.sha256(content).hexdigest() != shard["crc32_sha256"]:
            raise ValueError("its checksum differs")
        return read_array(content, np.uint32, (shard["count"],))
    except OSError as error:
        _check_open_files(error, path)
        problem = str(error.strerror)
    except ValueError as error:
        problem = str(error)
    raise DataError(f"{path} cannot be used ({problem}): restore it or build the data set again")


def _check_open_files(error: OSError | lmdb.Error, path: Path) -> None:
    """Raise DataError with the remedy if opening `path` failed because too many files are open."""
    code = error.errno if isinstance(error, OSError) else getattr(error, "code", None)
    if code in (errno.EMFILE, errno.ENFILE):
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise DataError(
            f"cannot open {path}: too many open files (one per shard, and the limit is {allowed}): "
            "raise the limit with `ulimit -n 65536`, in Docker with `--ulimit nofile=65536`"
        ) from None


def _no_data_set(split_dir: Path) -> str:
    """The error message if there is no manifest."""
    out, split = split_dir.parent, split_dir.name if split_dir.name in ("train", "val") else "train|val"
    build, place = "python tools/build_lmdb.py", quote(str(split_dir.parent))
    this = f"`{build} {place} OUT`, then give OUT"
    if (out / MANIFEST).exists():
        whole = out.resolve().parent
        return f"no data set in {split_dir}: {out} is one split of a data set; give {whole}"
    missing = f"no data set in {split_dir} ({MANIFEST} is missing)"
    if any(split_dir.glob("shard-*/data.mdb")):
        return f"{missing}, only shards: restore it from a copy or build the data set again"
    if other := find_foreign_entry(split_dir):
        return f"{missing}, which {other}: build one with {this}"
    entries = [] if (out / "train").exists() else sorted(out.glob("[!.]*"))
    folders = [entry for entry in entries if entry.is_dir()]
    if sets := [folder for folder in folders if (folder / "train" / MANIFEST).exists()]:
        return f"{missing}; there is a data set in {sets[0]}: give that folder"
    if classes := [folder.name for folder in folders if folder.name not in ("val", "lost+found")]:
        return (
            f"{missing}; {out} holds {classes[0]}/: if these are photographs, build a data set with "
            f"`{build} {place} OUT --val-fraction 0.2`, then give OUT"
        )
    if archives := [entry for entry in entries if ".tar" in entry.suffixes]:
        return f"{missing}; {out} holds {archives[0].name}: build one with {this}"
    command = f"{build} SOURCE {place}"
    built = [name for name in ("train", "val") if (out / name / MANIFEST).exists()]
    remedy = f"{missing}: build it with `{command}{f' --split {split}' if built else ''}`"
    if split == "val" and built:
        remedy += f"; without validation images, build both with `{command} --val-fraction 0.2 --overwrite`"
    return remedy


class ShardWriter:
    """Writes one shard: call `append` for each record, then `close`. Equal records give equal files."""

    BATCH = 64  # records per transaction: limits memory, and shares the cost of a commit

    def __init__(self, directory: Path, size: int, encoded: bool) -> None:
        """Create `directory`, which must not exist, for `size` x `size` records."""
        directory.mkdir()
        self.directory = directory
        self.count = 0
        self._size, self._encoded = size, encoded
        self._pending: list[bytes] = []
        self._crcs: list[int] = []
        # Nobody else uses the file before the final sync, so it needs neither syncs nor a lock file. No `writemap`:
        # it would turn a full disk into SIGBUS.
        self._env = lmdb.open(
            os.fsencode(directory), map_size=1 << 24, sync=False, metasync=False, lock=False
        )

    def append(self, data: bytes, label: int) -> None:
        """Store one image under the next key. `data` has the split's encoding."""
        datum = Datum(channels=3, height=self._size, width=self._size, data=data, label=label)
        datum.encoded = self._encoded
        record = datum.SerializeToString(deterministic=True)
        self._pending.append(record)
        self._crcs.append(isal_zlib.crc32(record))
        if len(self._pending) == self.BATCH:
            self._commit()

    def close(self) -> dict[str, Any]:
        """Finish the shard on disk; return its manifest entry without the name."""
        self._commit()
        self._env.sync(True)
        self._env.close()
        crcs = self.directory / RECORD_CRCS
        np.save(crcs, np.array(self._crcs, np.uint32))
        with crcs.open("rb") as file:
            os.fsync(file.fileno())
        fsync_directory(self.directory)
        database = self.directory / DATABASE
        return {
            "count": self.count,
            "bytes": database.stat().st_size,
            "sha256": file_sha256(database),
            "crc32_sha256": file_sha256(crcs),
        }

    def abort(self) -> None:
        """Close the file, finished or not. The caller removes the directory."""
        self._env.close()

    def _commit(self) -> None:
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    for offset, record in enumerate(self._pending):
                        transaction.put(record_key(self.count + offset), record, append=True)
                break
            except lmdb.MapFullError:
                # Doubling depends only on the records, so every build gives the same file.
                self._env.set_mapsize(2 * self._env.info()["map_size"])
        self.count += len(self._pending)
        self._pending.clear()


# LMDB allows one environment per file and process. Readers share it; it closes when the last of them is gone.
_environments: WeakValueDictionary[tuple[int, int], Any] = WeakValueDictionary()


def _close_inherited() -> None:
    """Runs in a forked child: LMDB cannot open a file twice, and the parent's readers may have it open."""
    for env in list(_environments.values()):
        env.close()
    _environments.clear()


os.register_at_fork(after_in_child=_close_inherited)


def _environment(directory: Path) -> Any:
    file = (directory / DATABASE).stat()
    key = (file.st_dev, file.st_ino)
    env = _environments.get(key)
    if env is None:
        # Every shard stays open, and a data set can have more than the default limit of open files.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        # readahead=False: reads are random; `prefetch` names the pages instead
        try:
            env = lmdb.open(os.fsencode(directory), readonly=True, lock=False, readahead=False, create=False)
        except lmdb.Error as error:
            _check_open_files(error, directory)
            raise
        _environments[key] = env
    return env


class ShardReader:
    """Random access to the records of a split by global index.

    Opens shards on first use, read-only and without lock files, so it works on read-only media and with many
    processes at once. Can be pickled and forked: each process opens its own files. Use one reader per thread.
    `checksums`: compare each record that is read with the CRC-32 from the build.
    """

    def __init__(self, split_dir: str | Path, checksums: bool = True) -> None:
        """Check the manifest and the size of every shard. DataError names what is missing or damaged."""
        self.split_dir = Path(split_dir)
        self.manifest = Manifest.load(self.split_dir)
        self._checksums = checksums
        self._classes = len(self.manifest.classes)
        self._end = ENDS[self.manifest.encoding]
        self._ends: list[int] = []  # _ends[s]: first global index after shard s
        end = 0
        for shard in self.manifest.shards:
            path = self.split_dir / shard["name"] / DATABASE
            try:
                actual = path.stat().st_size
            except OSError as error:
                raise DataError(
                    f"cannot read shard {path}: {error.strerror}; restore it or build the data set again"
                ) from None
            # Reading past the end of a truncated file would kill the process.
            if actual != shard["bytes"]:
                raise DataError(
                    f"shard {path} has {actual:,} bytes instead of {shard['bytes']:,}: "
                    "restore it or build the data set again"
                )
            end += shard["count"]
            self._ends.append(end)
        self._reset()

    def __len__(self) -> int:
        return self.manifest.count

    def locate(self, index: int) -> tuple[str, bytes]:
        """Return (shard name, key) of global `index`; IndexError outside 0..len-1."""
        shard, local = self._split_index(index)
        return self.manifest.shards[shard]["name"], record_key(local)

    def stored_bytes(self, index: int) -> int:
        """Size of the record of global `index` in its shard, a few bytes more than its data.

        IndexError outside 0..len-1; DataError if the record is missing.
        """
        return len(self._stored(*self._split_index(index)))

    def prefetch(self, indices: Iterable[int]) -> None:
        """Ask the kernel to read these records from disk, all at the same time, without waiting for them.

        Without it, `read` waits for each page of a record that is not in memory, one after the other. IndexError
        outside 0..len-1; DataError if a shard cannot be opened or a record is missing.
        """
        self._reset_after_fork()
        for index in indices:
            shard, local = self._split_index(index)
            pages = self._pages[shard]
            if pages is None:
                value = self._stored(shard, local)
                pages = self._pages[shard] = RecordPages(self._files[shard][0], local, value)
            pages.prefetch(local)

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Return (data, label) of global `index`.

        data: read-only uint8, either 1-d (the bytes of the JPEG or PNG file) or (size, size, 3) RGB (raw encoding).
        IndexError outside 0..len-1; DataError with shard and key if the record is damaged.
        """
        shard, local = self._split_index(index)
        record = bytes(self._stored(shard, local))
        crcs = self._crcs[shard]
        if crcs is not None and isal_zlib.crc32(record) != crcs[local]:
            raise DataError(self._damage(shard, local, "its checksum differs"))
        try:
            datum = Datum.FromString(record)
        except DecodeError as error:
            raise DataError(self._damage(shard, local, str(error))) from None
        if not 0 <= datum.label < self._classes:
            what = f"label {datum.label}, but there are {self._classes} classes"
            raise DataError(self._damage(shard, local, what))
        content = datum.data
        if not content.endswith(self._end):
            raise DataError(self._damage(shard, local, "it ends too early"))
        data = np.frombuffer(content, np.uint8)
        if not datum.encoded:
            try:
                data = data.reshape(datum.height, datum.width, datum.channels)
            except ValueError:
                raise DataError(self._damage(shard, local, f"{data.size} bytes of pixels")) from None
        return data, datum.label

    def _stored(self, shard: int, local: int) -> memoryview:
        """The record in the memory-mapped file. Valid only until the next call."""
        self._reset_after_fork()
        try:
            transaction = self._transactions[shard] or self._open(shard)
            self._check_length(shard)
            value: memoryview | None = transaction.get(record_key(local))
        except lmdb.Error as error:
            raise DataError(self._damage(shard, local, str(error))) from None
        if value is None:
            raise DataError(self._damage(shard, local, "the record is missing"))
        return value

    def _check_length(self, shard: int) -> None:
        """Raise DataError if the open file was truncated: reading past its end would kill the process."""
        now = time.monotonic()
        if now - self._checked_at[shard] < SECONDS_BETWEEN_CHECKS:
            return
        self._checked_at[shard] = now
        path, number = self._files[shard]
        try:
            file = path.stat()
        except OSError:
            return  # moved or deleted: the open file stays readable
        if file.st_ino == number and file.st_size != self.manifest.shards[shard]["bytes"]:
            expected = self.manifest.shards[shard]["bytes"]
            raise DataError(
                f"shard {path} was changed while in use, from {expected:,} to {file.st_size:,} bytes: "
                "restore it or build the data set again"
            )

    def check_counts(self) -> None:
        """Open every shard and check its number of records. Raises DataError that names a shard with another."""
        for shard in range(len(self._ends)):
            try:
                self._open(shard)
            except lmdb.Error as error:
                where = self.split_dir / self.manifest.shards[shard]["name"]
                raise DataError(
                    f"cannot read shard {where} ({error}): restore it or build the data set again"
                ) from None

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        for transaction in self._transactions:
            if transaction is not None:
                transaction.abort()
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        open_files = ("_transactions", "_crcs", "_pages", "_files", "_checked_at", "_pid")
        return {name: value for name, value in self.__dict__.items() if name not in open_files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset_after_fork(self) -> None:
        """In a forked child, forget the files that the parent has open."""
        if os.getpid() != self._pid:
            self._reset()

    def _reset(self) -> None:
        self._transactions: list[Any] = [None] * len(self._ends)
        self._crcs: list[np.ndarray | None] = [None] * len(self._ends)
        self._pages: list[RecordPages | None] = [None] * len(self._ends)
        self._files = [(Path(), 0)] * len(self._ends)  # path and inode of each open file
        self._checked_at = [0.0] * len(self._ends)  # when its length was last checked
        self._pid = os.getpid()

    def _split_index(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.manifest.count:
            raise IndexError(f"index {index} outside 0..{self.manifest.count - 1}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _open(self, shard: int) -> Any:
        entry = self.manifest.shards[shard]
        directory = self.split_dir / entry["name"]
        env = _environment(directory)
        database = directory / DATABASE
        self._files[shard] = (database, database.stat().st_ino)
        entries = env.stat()["entries"]
        if entries != entry["count"]:
            raise DataError(
                f"shard {directory} holds {entries} records instead of "
                f"{entry['count']}: restore it or build the data set again"
            )
        if self._checksums:
            self._crcs[shard] = read_crcs(directory, entry)
        # An open read transaction costs nothing, because nobody writes to a finished shard.
        transaction = env.begin(buffers=True)
        self._transactions[shard], self._pages[shard] = transaction, None
        return transaction

    def _damage(self, shard: int, local: int, what: str) -> str:
        where = self.split_dir / self.manifest.shards[shard]["name"]
        return (
            f"shard {where}, key {record_key(local).decode()} is damaged ({what}): "
            f"check with `python tools/verify_lmdb.py {self.split_dir}`"
        )


def pca_of_moments(
    pixels: int, sums: Sequence[int], products: Sequence[Sequence[int]]
) -> tuple[list[float], list[float], list[list[float]]]:
    """Compute (channel mean, eigenvalues, eigenvectors) for the manifest from exact integer moments.

    pixels: number of pixels; sums: (3,) and products: (3, 3) integers, over RGB levels 0..255.
    """
    mean = [int(total) / pixels for total in sums]
    # n·Σxy − Σx·Σy is an exact integer and only one division rounds, so the order of summation does not matter.
    scale = (255 * pixels) ** 2
    covariance = np.array(
        [
            [(pixels * int(products[i][j]) - int(sums[i]) * int(sums[j])) / scale for j in range(3)]
            for i in range(3)
        ]
    )
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    # The sign of an eigenvector is arbitrary: make the largest component of each column positive.
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.where(vectors[largest, range(3)] < 0, -1.0, 1.0)
    assert all(math.isfinite(value) for value in mean)
    return mean, [max(0.0, float(value)) for value in values], vectors.tolist()
