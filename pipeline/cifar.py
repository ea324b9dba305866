"""CIFAR's official archives, python or binary version -> folders of PNGs, one a class.

https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import DataError
from pipeline.prepare import encode

SIDE = 32
PIXELS = 3 * SIDE * SIDE  # an image: all red, then all green, then all blue values


def is_archive(path: Path) -> bool:
    """Whether `path` is a CIFAR-10 archive, by its name and kind."""
    return path.is_file() and path.name.startswith("cifar-10-") and tarfile.is_tarfile(path)


def unpack(archive: Path, out: Path) -> None:
    """cifar-10-python.tar.gz or cifar-10-binary.tar.gz -> out/{train,val}/<class>/NNNNN.png, without loss.

    DataError for an archive that is none of the two or damaged.
    """
    try:
        names, batches = _read(archive)
        counts, changed = {"train": 0, "val": 0}, archive.stat().st_mtime_ns
        for split, pixels, labels in batches:
            for image, label in zip(pixels.reshape(-1, 3, SIDE, SIDE), labels, strict=True):
                folder = out / split / names[label]
                folder.mkdir(parents=True, exist_ok=True)
                png = encode(np.ascontiguousarray(image.transpose(1, 2, 0)), "png")
                file = folder / f"{counts[split]:05d}.png"
                file.write_bytes(png)
                os.utime(file, ns=(changed, changed))  # a build that goes on tells changed images by it
                counts[split] += 1
    except (tarfile.TarError, EOFError, KeyError, ValueError, IndexError, pickle.UnpicklingError) as error:
        raise DataError(
            f"{archive} is no archive of CIFAR-10, or is damaged ({error}): fetch it again"
        ) from None
    if not all(counts.values()):
        raise DataError(
            f"{archive} holds {counts['train']} training and {counts['val']} test images: fetch it again"
        )


Batch = tuple[str, np.ndarray, list[int]]  # split, (N, 3072) uint8, N labels


def _read(archive: Path) -> tuple[list[str], Iterator[Batch]]:
    """Names of the classes, and the batches in the order of their names."""
    with tarfile.open(archive) as tar:
        files = {
            Path(member.name).name: content.read()
            for member in tar
            if member.isfile() and (content := tar.extractfile(member)) is not None
        }
    if "batches.meta" in files:
        names = [str(name) for name in _plain(files["batches.meta"])["label_names"]]
        read = _from_pickle
    else:
        names = files["batches.meta.txt"].decode().split()
        read = _from_binary
    kinds = (("data_batch_", "train"), ("test_batch", "val"))
    members = [
        (split, files[name]) for prefix, split in kinds for name in sorted(files) if name.startswith(prefix)
    ]
    return names, ((split, *read(content)) for split, content in members)


def _from_binary(content: bytes) -> tuple[np.ndarray, list[int]]:
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0].tolist()


def _from_pickle(content: bytes) -> tuple[np.ndarray, list[int]]:
    batch = _plain(content)
    return np.asarray(batch["data"], np.uint8), [int(label) for label in batch["labels"]]


class _Plain(pickle.Unpickler):
    """Unpickles arrays of numbers and nothing that could run code."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype", "encode", "scalar")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def _plain(content: bytes) -> dict[str, Any]:
    """A dictionary with text keys, whether Python 2 wrote it or 3."""
    read = _Plain(io.BytesIO(content), encoding="bytes").load()

    def text(value: Any) -> Any:
        return value.decode() if isinstance(value, bytes) else value

    return {
        text(k): [text(v) for v in value] if isinstance(value, list) else value for k, value in read.items()
    }
