"""What is in these photographs? python tools/predict.py RUN IMAGE...|FOLDER|-"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base.errors import DataError
from model.training.evaluation import log_probabilities
from pipeline.build.images import RejectedError, prepare
from pipeline.load.loader import eval_loader
from pipeline.preprocess import network_input, stored_image
from pipeline.shards import ShardReader
from tools.common import (
    CONTEXT,
    TOP,
    Run,
    check_size,
    class_names,
    file_option,
    load_run,
    one_device,
    option,
    run_argument,
    write_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = {".jpeg", ".jpg", ".png", ".gif", ".bmp", ".webp"}  # what counts as an image in a folder
BATCH = 32
NEIGHBOURS = 6  # as in figure 4 of the paper
BAR = 30  # characters of a bar for 100 %
SHEET = 48  # images on one sheet; more would be too small to read, or too large to open


@dataclass
class Neighbour:
    """A stored image near the photograph: `distance` is Euclidean, between activations of fc7."""

    index: int
    label: int
    name: str
    distance: float


@dataclass
class Prediction:
    """What the network makes of one photograph."""

    path: str
    rgb: np.ndarray | None  # (size, size, 3) uint8 as prepared; kept for the sheet only
    top: list[tuple[int, float]]  # (label, probability), best first
    truth: int | None  # the label, if the photograph's folder is named after a class
    neighbours: list[Neighbour] = field(default_factory=list)


@click.command(context_settings=CONTEXT)
@run_argument()
@click.argument("images", metavar="IMAGE...|FOLDER|-", nargs=-1, required=True)
@option("--top", type=click.IntRange(1), default=TOP, help="Guesses for each image.")
@file_option("--json", "The results; - is the standard output.")
@file_option("--sheet", f"Contact sheet (PNG) of the first {SHEET} images, like the paper's figure 4.")
@option(
    "--neighbours",
    type=click.Path(path_type=Path),
    default=None,
    show_default="none",
    help="Also find the most similar images of this data set, by the activations of fc7.",
)
@option("--split", type=click.Choice(["train", "val"]), default="train", help="The part of --neighbours.")
@option("--gpus", type=click.IntRange(0, 1), default=None, show_default="1 if there is one", help="0: CPU.")
@option("--workers", type=click.IntRange(0), default=1, help="Processes that read --neighbours; 0: none.")
@option("--progress/--no-progress", default=True)
def main(
    run: Path,
    images: tuple[str, ...],
    top: int,
    json_path: Path | None,
    sheet_path: Path | None,
    neighbours: Path | None,
    split: str,
    gpus: int | None,
    workers: int,
    progress: bool,
) -> None:
    """Name what RUN, a folder that train.py wrote or a checkpoint, sees in photographs.

    Photographs are files of any size (JPEG, PNG, GIF, BMP, WebP), folders of them, or - for paths on the
    standard input, one a line. They are scaled, cropped and shifted by the mean exactly as in training. An
    image that cannot be read gets one line and the others go on; then the exit code is 1.
    """
    device = one_device(gpus)
    trained = load_run(run, device)
    reader = ShardReader(neighbours / split) if neighbours else None
    if reader:
        check_size(trained, reader.manifest, reader.split_dir)
    paths = list(find_images(images))
    if not paths:
        raise DataError(f"no images in {', '.join(images)}: files called *.jpg, *.png, ... are looked for")

    predictions: list[Prediction] = []
    failed: list[dict[str, str]] = []
    features: list[Tensor] = []
    # a screen of results in a moment needs no bar
    hidden = not progress or len(paths) <= BATCH
    with tqdm(total=len(paths), desc="images", unit=" images", disable=hidden, leave=False) as bar:
        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            loaded: list[tuple[str, np.ndarray]] = []
            for path in part:
                try:
                    loaded.append((path, prepare(Path(path).read_bytes(), trained.preprocess.size)))
                except (RejectedError, OSError) as error:
                    reason = error.strerror if isinstance(error, OSError) else str(error)
                    failed.append({"image": path, "error": str(reason)})
                    tqdm.write(f"{path}: {reason}", file=sys.stderr)
            if loaded:
                new, fc7 = predict(trained, loaded, top, device)
                keep = max(0, SHEET - len(predictions)) if sheet_path else 0
                for prediction in new[keep:]:
                    prediction.rgb = None
                predictions += new
                if reader:
                    features.append(fc7)
            bar.update(len(part))
    if reader and features:
        found = nearest(trained, torch.cat(features), reader, device, workers=workers, progress=progress)
        for prediction, near in zip(predictions, found, strict=True):
            prediction.neighbours = near

    if str(json_path) != "-":
        for prediction in predictions:
            click.echo(as_text(prediction, trained.names))
    if json_path:
        listed = [as_json(p, trained) for p in predictions] + failed
        write_text(json_path, json.dumps(listed, indent=1, ensure_ascii=False) + "\n")
    if sheet_path and predictions:
        from tools.pictures import save

        save(sheet(predictions[:SHEET], trained.names, reader), sheet_path)
    if failed:
        click.echo(f"{len(failed)} of {len(paths)} images could not be read", err=True)
        sys.exit(1)


def find_images(arguments: Iterable[str]) -> Iterator[str]:
    """Files as they are, a folder's images (subfolders too, sorted), and for "-" the lines of standard input."""
    for argument in arguments:
        if argument == "-":
            yield from (line for raw in sys.stdin if (line := raw.rstrip("\r\n")))
        elif Path(argument).is_dir():
            found_all = (p for p in Path(argument).rglob("*") if p.is_file())
            files = sorted(
                p for p in found_all if not any(x.startswith(".") for x in p.relative_to(argument).parts)
            )
            found = [str(p) for p in files if p.suffix.lower() in SUFFIXES]
            if len(found) < len(files):
                others = f"{len(files) - len(found)} files not called {', '.join(sorted(SUFFIXES))}"
                click.echo(f"{argument}: {others} left out", err=True)
            yield from found
        else:
            yield argument


@torch.inference_mode()
def predict(
    run: Run, loaded: list[tuple[str, np.ndarray]], top: int, device: torch.device
) -> tuple[list[Prediction], Tensor]:
    """Guesses for prepared images (path, (size, size, 3) uint8 RGB), and fc7 activations (N, 4096) float32."""
    images = network_input(np.stack([rgb for _, rgb in loaded]), run.preprocess).to(device)
    fc7 = run.network.forward_features(images)
    best = log_probabilities(run.network, images).exp().topk(min(top, len(run.classes)))
    labels = {c["wnid"]: i for i, c in enumerate(run.classes)}
    predictions = [
        Prediction(path, rgb, list(zip(guess, chance, strict=True)), labels.get(Path(path).parent.name))
        for (path, rgb), guess, chance in zip(
            loaded, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
    return predictions, fc7.float()


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

    Reads the whole split once and keeps only the best so far: memory does not grow with the data set. Equal
    distances go to the lower index.
    """
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
            # the quick way, by a matrix product, would find small distances only roughly
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
    """The path, a line with a bar for each guess (* marks the true class), and the neighbours' classes."""
    lines = [prediction.path]
    for label, chance in prediction.top:
        mark = " *" if label == prediction.truth else ""
        lines.append(f"  {chance:7.2%}  {'█' * round(BAR * chance):{BAR}}  {names[label]}{mark}")
    if prediction.neighbours:
        near = ", ".join(f"{n.name} {n.index} ({n.distance:.1f})" for n in prediction.neighbours)
        lines.append(f"  nearest: {near}")
    return "\n".join(lines)


def as_json(prediction: Prediction, run: Run) -> dict[str, Any]:
    """{"image", "top": [{"label", "wnid", "name", "probability"}]} and "neighbours" where asked for."""
    top = [
        {"label": label, "wnid": run.classes[label]["wnid"], "name": run.names[label], "probability": chance}
        for label, chance in prediction.top
    ]
    result: dict[str, Any] = {"image": prediction.path, "top": top}
    if prediction.neighbours:
        result["neighbours"] = [vars(n) for n in prediction.neighbours]
    return result


def sheet(predictions: list[Prediction], names: list[str], reader: ShardReader | None) -> Figure:
    """The paper's figure 4: photographs with their guesses; with a `reader`, each with its neighbours' images."""
    from tools.pictures import new_figure, shorten, show_image

    if reader is None:
        columns = min(4, len(predictions))
        rows = -(-len(predictions) // columns)
        figure = new_figure(2.6 * columns, 3.9 * rows)
        cells = list(figure.subfigures(rows, columns, squeeze=False).flat)
        for cell, prediction in zip(cells, predictions, strict=False):
            picture, bars = cell.subplots(2, 1, height_ratios=[2.3, 1])
            assert prediction.rgb is not None
            show_image(picture, prediction.rgb, shorten(_caption(prediction, names), 34))
            _draw_bars(bars, prediction, names)
        return figure

    width = max(len(p.neighbours) for p in predictions)
    figure = new_figure(1.5 * (width + 3), 1.75 * len(predictions))
    # without constrained layout's own gaps the rows stay close, as in the paper
    grid = figure.subplots(len(predictions), width + 2, squeeze=False, width_ratios=[1.15, 1.5, *[1] * width])
    for row, prediction in zip(grid, predictions, strict=True):
        assert prediction.rgb is not None
        show_image(row[0], prediction.rgb, shorten(_caption(prediction, names), 24))
        _draw_bars(row[1], prediction, names)
        for axes, near in zip(row[2:], prediction.neighbours, strict=False):
            caption = f"{shorten(near.name, 16)}  {near.distance:.1f}"
            show_image(axes, stored_image(reader, near.index), caption, size=7)
        for axes in islice(row, 2 + len(prediction.neighbours), None):
            axes.set_axis_off()
    return figure


def _caption(prediction: Prediction, names: list[str]) -> str:
    """The true class where it is known, and the file."""
    file = Path(prediction.path).name
    return file if prediction.truth is None else f"{names[prediction.truth]}: {file}"


def _draw_bars(axes: Any, prediction: Prediction, names: list[str]) -> None:
    """The guesses' probabilities with the names inside, the true class in another colour if it is known."""
    from tools.pictures import RIGHT, WRONG, shorten

    for place, (label, chance) in enumerate(prediction.top):
        axes.barh(place, chance, 0.8, color=RIGHT if label == prediction.truth else WRONG, alpha=0.45)
        axes.text(0.02, place, shorten(names[label], 24), va="center", fontsize=8)
        axes.text(1.0, place, f"{chance:.0%}", va="center", ha="right", fontsize=8, color="#555555")
    axes.set(xlim=(0, 1), ylim=(len(prediction.top) - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    main()
