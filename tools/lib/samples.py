"""Single images: photographs with their predictions and neighbours, and the images of a training batch.

Imports DALI only to read a whole data set.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from base.errors import DataError, ModelError
from pipeline.build.images import RejectedError, prepare
from pipeline.build.labels import readable
from pipeline.build.listing import RawImage, RawReader, looks_like_image
from pipeline.load.plan import Plan, Views
from pipeline.preprocess import Preprocess, network_input, stored_image
from pipeline.shards import ShardReader
from tools.lib.cli import TOP, echo, printable
from tools.lib.runs import Run, class_names

# the headers of image files; the zero bytes of BMP tell it from a path that begins with BM
IMAGE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{4}\0{4}|RIFF.{4}WEBP", re.DOTALL)
BATCH = 32
NEIGHBOURS = 6  # as in figure 4 of the paper
BAR = 30  # characters of a bar for 100 %


@dataclass
class Neighbour:
    """A stored image that is similar to a photograph; `distance` is the Euclidean distance of fc7 activations."""

    index: int
    label: int
    name: str
    distance: float


@dataclass
class Prediction:
    """The network's prediction for one photograph."""

    path: str
    rgb: np.ndarray | None  # (size, size, 3) uint8; None if it is not kept for the sheet
    top: list[tuple[int, float]]  # (label, probability), best first
    truth: int | None  # the label, if the photograph's folder is named after a class
    neighbours: list[Neighbour] = field(default_factory=list)


class Photograph(NamedTuple):
    """A file to classify. `sure`: it must be an image, since the user or its suffix says so."""

    path: str
    sure: bool


# --- finding and reading photographs -------------------------------------------------------------------------


def find_images(arguments: Iterable[str]) -> Iterator[Photograph]:
    """The given files, the files in given folders (recursively, sorted, not hidden), and for "-" those on stdin."""
    for argument in arguments:
        if argument == "-":
            yield from (Photograph(path, True) for path in _paths_of(sys.stdin.buffer.read()))
        elif Path(argument).is_dir():
            for path in sorted(p for p in Path(argument).rglob("*") if p.is_file()):
                if not any(part.startswith(".") for part in path.relative_to(argument).parts):
                    yield Photograph(str(path), looks_like_image(path.name))
        else:
            yield Photograph(argument, True)


def _paths_of(listing: bytes) -> list[str]:
    """The paths on standard input: separated by NUL, as `find -print0` writes them, or one per line."""
    if IMAGE.match(listing):
        raise DataError("standard input is an image, not a list of paths: give the file's name instead of -")
    if b"\0\0" in listing:
        raise DataError("standard input is binary data, not a list of paths: give file names instead of -")
    lines = listing.split(b"\0") if b"\0" in listing else listing.splitlines()
    return [os.fsdecode(line) for line in lines if line]


def read_photograph(path: str, size: int) -> np.ndarray:
    """Read a file as the build does: (size, size, 3) uint8 RGB. Raises RejectedError with the reason."""
    try:
        return prepare(RawReader(".").read(RawImage(path, -1)), size)
    except OSError as error:
        raise RejectedError(error.strerror or str(error)) from None
    except ValueError as error:  # too large, or a path with a NUL byte
        raise RejectedError(str(error)) from None


# --- guesses -------------------------------------------------------------------------------------------------


def predict_all(
    run: Run,
    photographs: list[Photograph],
    device: torch.device,
    *,
    top: int = TOP,
    keep: int = 0,
    features: bool = False,
    progress: bool = True,
) -> tuple[list[Prediction], Tensor, list[dict[str, str]], int]:
    """Classify photographs; prints a line for each one that cannot be read.

    Args:
        run: the network.
        photographs: the files.
        device: the network's device.
        top: number of guesses.
        keep: number of predictions that keep their pixels.
        features: whether to return fc7 activations.
        progress: whether to show a progress bar.

    Returns:
        The predictions, their fc7 activations (N, 4096), the failures as {"image", "error"}, and the number of
        other files in folders.
    """
    predictions: list[Prediction] = []
    activations: list[Tensor] = [torch.zeros(0, device=device)]
    failed: list[dict[str, str]] = []
    others = 0
    hidden = not progress or len(photographs) <= BATCH  # a few images need no progress bar
    with tqdm(total=len(photographs), desc="images", unit=" images", disable=hidden, leave=False) as bar:
        for start in range(0, len(photographs), BATCH):
            part = photographs[start : start + BATCH]
            loaded: list[tuple[str, np.ndarray]] = []
            for path, sure in part:
                try:
                    loaded.append((path, read_photograph(path, run.preprocess.size)))
                except RejectedError as error:
                    if not sure:
                        others += 1
                        continue
                    failed.append({"image": path, "error": str(error)})
                    with tqdm.external_write_mode(sys.stderr):
                        echo(f"{printable(path)}: {printable(str(error))}", err=True)
            if loaded:
                new, fc7 = predict(run, loaded, top, device)
                for prediction in new[max(0, keep - len(predictions)) :]:
                    prediction.rgb = None
                predictions += new
                if features:
                    activations.append(fc7)
            bar.update(len(part))
    return predictions, torch.cat(activations[1:] or activations), failed, others


@torch.inference_mode()
def predict(
    run: Run, loaded: list[tuple[str, np.ndarray]], top: int, device: torch.device
) -> tuple[list[Prediction], Tensor]:
    """Classify images (path, (size, size, 3) uint8 RGB); also returns fc7 activations (N, 4096) float32."""
    images = network_input(np.stack([rgb for _, rgb in loaded]), run.preprocess).to(device)
    fc7 = run.network.forward_features(images)
    logp = F.log_softmax(run.network.classifier[-1](fc7).float(), dim=1)
    if logp.isnan().any():
        raise ModelError(f"the network of {run.path} overflows on these images: give another RUN")
    best = logp.exp().topk(min(top, len(run.classes)))
    labels = {c["wnid"]: i for i, c in enumerate(run.classes)}  # the build derives wnids from folders
    predictions = [
        Prediction(
            path, rgb, list(zip(guess, chance, strict=True)), labels.get(readable(Path(path).parent.name))
        )
        for (path, rgb), guess, chance in zip(
            loaded, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
    return predictions, fc7.float()


def guesses(run: Run, reader: ShardReader, count: int = 8) -> list[Prediction]:
    """Predictions for images that are evenly spaced in a split."""
    chosen = np.unique(np.linspace(0, len(reader) - 1, count).astype(int)).tolist()
    loaded = [(f"image {index}", stored_image(reader, index)) for index in chosen]
    device = next(run.network.parameters()).device
    predictions, _ = predict(run, loaded, TOP, device)
    for prediction, index in zip(predictions, chosen, strict=True):
        prediction.truth = reader.read(index)[1]
    return predictions


@torch.inference_mode()
def nearest(
    run: Run,
    features: Tensor,
    reader: ShardReader,
    device: torch.device,
    *,
    count: int = NEIGHBOURS,
    workers: int = 1,
    progress: bool = True,
) -> list[list[Neighbour]]:
    """The `count` stored images whose fc7 activations are nearest to each of `features` (M, 4096), nearest first.

    Reads the split once and keeps only the nearest images so far. Of equal distances, the lower index comes first.
    """
    from pipeline.load.loader import eval_loader

    loader = eval_loader(
        reader,
        run.preprocess,
        min(BATCH, len(reader)),
        device="gpu" if device.type == "cuda" else "cpu",
        device_id=device.index,
        workers=workers,
    )
    distances = torch.zeros(len(features), 0, device=device)
    indices, labels = torch.zeros(2, len(features), 0, dtype=torch.int64, device=device)
    first = 0
    with tqdm(total=len(reader), desc="neighbours", unit=" images", disable=not progress, leave=False) as bar:
        for images, batch_labels in loader:
            stored = run.network.forward_features(images).float()
            # a matrix product would be faster, but inaccurate for small distances
            gap = torch.cdist(features, stored, compute_mode="donot_use_mm_for_euclid_dist")
            index = torch.arange(first, first := first + len(stored), device=device)
            distances = torch.cat([distances, gap], 1)
            order = distances.argsort(dim=1, stable=True)[:, :count]
            distances = distances.gather(1, order)
            indices = torch.cat([indices, index.expand_as(gap)], 1).gather(1, order)
            labels = torch.cat([labels, batch_labels.expand_as(gap)], 1).gather(1, order)
            bar.update(len(stored))
    loader.close()
    names = class_names(reader.manifest.classes)
    return [
        [Neighbour(i, label, names[label], gap) for i, label, gap in zip(*row, strict=True)]
        for row in zip(indices.tolist(), labels.tolist(), distances.tolist(), strict=True)
    ]


def as_text(prediction: Prediction, names: list[str]) -> str:
    """Lines for the terminal: the path, a bar for each guess (* marks the true class), and the neighbours."""
    lines = [prediction.path]
    for label, chance in prediction.top:
        mark = " *" if label == prediction.truth else ""
        lines.append(f"  {chance:7.2%}  {'█' * round(BAR * chance):{BAR}}  {names[label]}{mark}")
    if prediction.neighbours:
        near = ", ".join(f"{n.name} {n.index} ({n.distance:.1f})" for n in prediction.neighbours)
        lines.append(f"  nearest: {near}")
    return "\n".join(map(printable, lines))


def as_json(prediction: Prediction, run: Run) -> dict[str, Any]:
    """{"image", "top": [{"label", "wnid", "name", "probability"}]}, with "neighbours" if there are any."""
    names = run.names
    top = [
        {"label": label, "wnid": run.classes[label]["wnid"], "name": names[label], "probability": chance}
        for label, chance in prediction.top
    ]
    result: dict[str, Any] = {"image": prediction.path, "top": top}
    if prediction.neighbours:
        result["neighbours"] = [vars(n) for n in prediction.neighbours]
    return result


# --- a training batch ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingBatch:
    """The first images of one training step: as stored, their random views, and the network's input."""

    step: int  # from the start of training
    epoch: int  # from 0
    stored: list[np.ndarray]  # (size, size, 3) uint8 RGB
    labels: list[int]
    views: Views
    inputs: np.ndarray  # (N, crop, crop, 3) float32, levels minus the mean


def training_batch(
    reader: ShardReader, plan: Plan, preprocess: Preprocess, step: int, images: int
) -> TrainingBatch:
    """The images, crops, flips and colours that train.py uses at `step` with the same options."""
    from pipeline.load.loader import train_loader

    loader = train_loader(reader, plan, preprocess, first_step=step, end_step=step + 1, workers=0)
    pixels, labels = next(loader)
    loader.close()
    epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
    chosen = plan.samples(epoch, step_in_epoch)[:images]
    return TrainingBatch(
        step=step,
        epoch=epoch,
        stored=[stored_image(reader, int(index)) for index in chosen],
        labels=labels[:images].tolist(),
        views=plan.views(epoch, step_in_epoch),
        inputs=pixels[:images].permute(0, 2, 3, 1).numpy(),
    )


def count_classes(reader: ShardReader, title: str, progress: bool = True) -> np.ndarray:
    """Images per class, (classes,) int64. Reads every record, because only records have labels."""
    counts = np.zeros(len(reader.manifest.classes), np.int64)
    hidden = not progress or len(reader) < 5000  # a few thousand images are quick
    for index in tqdm(range(len(reader)), desc=title, unit=" images", leave=False, disable=hidden):
        counts[reader.read(index)[1]] += 1
    return counts
