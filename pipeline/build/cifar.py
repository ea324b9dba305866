"""CIFAR's official archives, python or binary version -> folders of PNGs, one a class.

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

from base.errors import DataError
from base.files import lock, open_regular
from pipeline.build.images import encode

SIDE = 32
PIXELS = 3 * SIDE * SIDE  # an image: all red, then all green, then all blue values
MAX_BYTES = 1 << 29  # of an unpacked archive; the official ones have 186 million
MAX_MEMO = 1 << 20  # values that a pickle refers back to; the official ones have 20 thousand
UNPACKED = ".unpacked"  # in OUT, while a build is at work

Batch = tuple[str, np.ndarray, list[int]]  # split, (N, 3072) uint8, N labels below the number of classes


def is_archive(path: Path) -> bool:
    """Whether `path` is a CIFAR-10 archive, by its name: a damaged one is one too."""
    return path.is_file() and path.name.startswith("cifar-10-") and path.name.endswith((".tar.gz", ".tar"))


@contextmanager
def unpacked(archive: Path, out: Path) -> Iterator[Path]:
    """`unpack` into a hidden folder of `out` that goes afterwards, or with the next call after a kill."""
    names, batches = _read(archive)
    folder = out / UNPACKED
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror}; name another OUT") from None
    with lock(folder, f"another build is running in {out}: wait for it, or stop it"):
        try:
            for leftover in folder.iterdir():
                shutil.rmtree(leftover)
            _write(names, batches, folder, archive)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def unpack(archive: Path, out: Path) -> None:
    """cifar-10-python.tar.gz or cifar-10-binary.tar.gz -> out/{train,val}/<class>/NNNNN.png, without loss.

    DataError for an archive that is none of the two or damaged, before anything is written.
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
                os.utime(file, ns=(changed, changed))  # a resumed build recognises changed images by it
                counts[split] += 1
    except OSError as error:
        raise DataError(f"{archive} could not be unpacked in {out}: {error.strerror}") from None


def _read(archive: Path) -> tuple[list[str], list[Batch]]:
    """Names of the classes, and the batches in the order of their names; DataError says what is wrong."""
    try:
        names, batches = _parsed(_files(_content(archive)))
    except DataError:
        raise
    except Exception as error:  # an unpickler of damaged bytes raises whatever their code comes upon
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{archive} is no archive of CIFAR-10, or is damaged ({reason}): fetch it again"
        ) from None
    counts = {split: sum(len(b[2]) for b in batches if b[0] == split) for split in ("train", "val")}
    if not all(counts.values()):
        raise DataError(
            f"{archive} holds {counts['train']} training and {counts['val']} test images: fetch it again"
        )
    return names, batches


def _content(archive: Path) -> bytes:
    """The tar, read to the end of its gzip stream: the checksum is there, behind the tar's own end mark."""
    try:
        with open_regular(archive) as file, file if archive.suffix == ".tar" else gzip.open(file) as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, zlib.error, EOFError) as error:
        raise DataError(f"{archive} is damaged, or cut short ({error}): fetch it again") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes in it")
    return content


def _files(content: bytes) -> dict[str, bytes]:
    """Name without folders -> bytes of the plain files in a tar; a sparse one may claim any size."""
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
        raise ValueError("two classes of one name")
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
    """Names become folders: ValueError unless `name` is the name of a visible one."""
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


# --- the python version: a pickle, of which only plain values and the bytes of arrays are taken -------------------


@dataclass
class _Array:
    """Stands for numpy.ndarray: what an unpickler may do to it is to hand over a state, which is checked."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def pixels(self) -> np.ndarray:
        """The array; ValueError unless it is one of rows of bytes, as many as its shape says."""
        _, shape, dtype, fortran, content = self.state
        if not isinstance(dtype, _Type) or not dtype.is_bytes or not isinstance(content, bytes):
            raise ValueError(f"images that are not rows of {PIXELS} bytes")
        rows, columns = shape
        if columns != PIXELS or not isinstance(rows, int) or rows * PIXELS != len(content):
            raise ValueError(f"images that are not rows of {PIXELS} bytes")
        return np.frombuffer(content, np.uint8).reshape(rows, PIXELS, order="F" if fortran else "C")


class _Type:
    """Stands for numpy.dtype."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.is_bytes = code in ("u1", b"u1")

    def __setstate__(self, state: Any) -> None:
        """The byte order, which bytes do not have."""


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes as Python 3 pickles them for Python 2: `_codecs.encode`, for the one encoding that it uses."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding} has no place in it")
    return text.encode("latin1")


class _Plain(pickle.Unpickler):
    """Unpickles plain values; none of NumPy's own classes, whose `__setstate__` trusts what it is given."""

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
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def _plain(content: bytes) -> dict[str, Any]:
    """A dictionary with text keys, whether Python 2 wrote it or 3."""
    for opcode, argument, _ in pickletools.genops(content):
        # the unpickler makes room for as many entries as the largest index says
        if opcode.name.endswith("PUT") and int(argument or 0) > MAX_MEMO:
            raise pickle.UnpicklingError(f"the index {argument} has no place in it")
    read = _Plain(io.BytesIO(content), encoding="bytes").load()

    def text(value: Any) -> Any:
        return value.decode() if isinstance(value, bytes) else value

    return {
        text(k): [text(v) for v in value] if isinstance(value, list) else value for k, value in read.items()
    }
