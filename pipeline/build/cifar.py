"""Unpacks the official CIFAR-10 archives, python or binary version, to one folder of PNGs per class.

https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import gzip
import io
import operator
import os
import pickle
import pickletools
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from base.errors import DataError, one_line
from base.files import lock, open_regular
from pipeline.build.images import encode

SIDE = 32
PIXELS = 3 * SIDE * SIDE  # values of an image: all red, then all green, then all blue
MAX_BYTES = 1 << 29  # of an unpacked archive; the official ones have 186 million
MAX_MEMO = 1 << 20  # entries of a pickle's memo; the official ones have 20 thousand
UNPACKED = ".unpacked"  # folder in OUT during a build

Batch = tuple[str, np.ndarray, list[int]]  # split, (N, 3072) uint8, N labels below the number of classes


def is_archive(path: Path) -> bool:
    """Whether `path` is named like a CIFAR-10 archive; it can be damaged."""
    return path.is_file() and path.name.startswith("cifar-10-") and path.name.endswith((".tar.gz", ".tar"))


@contextmanager
def unpacked(archive: Path, out: Path) -> Iterator[Path]:
    """Unpack into a hidden folder of `out`, and remove it afterwards. The next call removes what a kill leaves."""
    names, batches = _read(archive)
    folder = out / UNPACKED
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror}; give another OUT") from None
    with lock(folder, f"another build is running in {out}: wait for it, or stop it"):
        try:
            for leftover in folder.iterdir():
                shutil.rmtree(leftover)
            _write(names, batches, folder, archive)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def unpack(archive: Path, out: Path) -> None:
    """Unpack cifar-10-python.tar.gz or cifar-10-binary.tar.gz to out/{train,val}/<class>/NNNNN.png, without loss.

    Raises DataError before anything is written if the archive is neither of the two, or is damaged.
    """
    _write(*_read(archive), out, archive)


def _write(names: list[str], batches: list[Batch], out: Path, archive: Path) -> None:
    counts, changed = {"train": 0, "val": 0}, archive.stat().st_mtime_ns
    try:
        for split, pixels, labels in batches:
            for image, label in zip(pixels.reshape(-1, 3, SIDE, SIDE), labels, strict=True):
                folder = out / split / names[label]
                folder.mkdir(parents=True, exist_ok=True)
                png = encode(np.ascontiguousarray(image.transpose(1, 2, 0)), "png")
                file = folder / f"{counts[split]:05d}.png"
                file.write_bytes(png)
                os.utime(file, ns=(changed, changed))  # so that a resumed build sees unchanged images
                counts[split] += 1
    except OSError as error:
        raise DataError(f"cannot unpack {archive} in {out}: {error.strerror}; give another OUT") from None


def _read(archive: Path) -> tuple[list[str], list[Batch]]:
    """Return the class names, and the batches sorted by file name. Raises DataError if the archive is not valid."""
    try:
        names, batches = _parsed(_files(_content(archive)))
    except DataError:
        raise
    except Exception as error:  # unpickling damaged bytes can raise any type
        raise DataError(
            f"{archive} is not a CIFAR-10 archive, or is damaged ({one_line(error)}): download it again"
        ) from None
    counts = {split: sum(len(b[2]) for b in batches if b[0] == split) for split in ("train", "val")}
    if not all(counts.values()):
        raise DataError(
            f"{archive} holds {counts['train']} training and {counts['val']} test images: download it again"
        )
    return names, batches


def _content(archive: Path) -> bytes:
    """The bytes of the tar. Reads the gzip stream to its end, because its checksum follows the tar's end mark."""
    try:
        with open_regular(archive) as file, file if archive.suffix == ".tar" else gzip.open(file) as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, zlib.error, EOFError) as error:
        raise DataError(f"{archive} is damaged or truncated ({error}): download it again") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes in it")
    return content


def _files(content: bytes) -> dict[str, bytes]:
    """{base name: content} of the regular files in a tar. Skips sparse files, which can claim any size."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        return {
            Path(member.name).name: stream.read()
            for member in tar
            if member.isreg() and not member.issparse() and (stream := tar.extractfile(member)) is not None
        }


def _parsed(files: dict[str, bytes]) -> tuple[list[str], list[Batch]]:
    if "batches.meta" in files:
        names = list(_plain(files["batches.meta"])["label_names"])
        read = _from_pickle
    else:
        names = files["batches.meta.txt"].decode().split()
        read = _from_binary
    for name in names:
        _check_name(name)
    if len(set(names)) < len(names):
        raise ValueError("two classes with the same name")
    batches = []
    for prefix, split in (("data_batch_", "train"), ("test_batch", "val")):
        for file in sorted(name for name in files if name.startswith(prefix)):
            pixels, labels = read(files[file])
            if len(pixels) != len(labels):
                raise ValueError(f"{file} holds {len(pixels)} images and {len(labels)} labels")
            for label in labels:
                if not 0 <= label < len(names):
                    raise ValueError(f"label {label} in {file}, but {len(names)} classes")
            batches.append((split, pixels, labels))
    return names, batches


def _check_name(name: Any) -> None:
    """Raise ValueError unless `name` can be the name of a visible folder."""
    if not isinstance(name, str) or not name or name.startswith(".") or "/" in name or not name.isprintable():
        raise ValueError(f"{name!r} cannot be the name of a class")


def _from_binary(content: bytes) -> tuple[np.ndarray, list[int]]:
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0].tolist()


def _from_pickle(content: bytes) -> tuple[np.ndarray, list[int]]:
    batch = _plain(content)
    if not isinstance(batch["data"], _Array):
        raise ValueError(f"images that are not rows of {PIXELS} bytes")
    return batch["data"].pixels(), [operator.index(label) for label in batch["labels"]]


# --- the python version: a pickle, from which only plain values and the bytes of arrays are read ----------------


@dataclass
class _Array:
    """Replaces numpy.ndarray while unpickling. It stores the pickled state, which `pixels` checks."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def pixels(self) -> np.ndarray:
        """The array; ValueError unless it has rows of PIXELS bytes and its shape matches its content."""
        _, shape, dtype, fortran, content = self.state
        if not isinstance(dtype, _Type) or not dtype.is_bytes or not isinstance(content, bytes):
            raise ValueError(f"images that are not rows of {PIXELS} bytes")
        rows, columns = shape
        if columns != PIXELS or not isinstance(rows, int) or rows * PIXELS != len(content):
            raise ValueError(f"images that are not rows of {PIXELS} bytes")
        return np.frombuffer(content, np.uint8).reshape(rows, PIXELS, order="F" if fortran else "C")


class _Type:
    """Replaces numpy.dtype while unpickling."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.is_bytes = code in ("u1", b"u1")

    def __setstate__(self, state: Any) -> None:
        """Ignore the byte order, which bytes do not have."""


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _latin1(text: str, encoding: str) -> bytes:
    """Replaces `_codecs.encode`, with which Python 3 pickles bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding} is not allowed")
    return text.encode("latin1")


class _Plain(pickle.Unpickler):
    """Unpickles plain values only. NumPy's own classes are replaced, because they trust the pickled state."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _plain(content: bytes) -> dict[str, Any]:
    """Unpickle a dictionary with text keys, written by Python 2 or 3."""
    for opcode, argument, _ in pickletools.genops(content):
        # the unpickler allocates as many entries as the largest index
        if opcode.name.endswith("PUT") and int(argument or 0) > MAX_MEMO:
            raise pickle.UnpicklingError(f"the memo index {argument} is not allowed")
    read = _Plain(io.BytesIO(content), encoding="bytes").load()

    def text(value: Any) -> Any:
        return value.decode() if isinstance(value, bytes) else value

    return {
        text(k): [text(v) for v in value] if isinstance(value, list) else value for k, value in read.items()
    }
