"""All pictures that the tools draw. Needs no display and imports no DALI."""

from __future__ import annotations

import io
from collections import Counter
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from base.errors import ModelError
from model.alexnet import AlexNet
from pipeline.preprocess import Preprocess, stored_image
from pipeline.shards import Manifest, ShardReader
from tools.lib.cli import cannot_write, printable, shorten
from tools.lib.runs import Classes, class_names
from tools.lib.samples import Prediction, TrainingBatch

# a palette for colour-blind readers (Okabe and Ito, 2008) without its yellow, which is hard to see on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
RIGHT, WRONG = "#D55E00", "#0072B2"  # bars of the correct class and of the others
NAMED_CLASSES = 40  # with more classes, their names would not fit along an axis
MAP_CELLS = 1000  # most cells along each side of a confusion map
# common fonts with Chinese, Japanese and Korean characters
CJK_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "IPAexGothic",
    "Droid Sans Fallback",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Arial Unicode MS",
)
matplotlib.rcParams |= {
    "font.family": [
        "DejaVu Sans",
        *(name for name in CJK_FONTS if name in {font.name for font in fontManager.ttflist}),
    ],
    "figure.dpi": 130,
    "savefig.bbox": "tight",  # long names are not cut off
    "savefig.facecolor": "white",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid.axis": "both",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "text.parse_math": False,  # file names may contain dollars
}


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """A figure of width x height inches with constrained layout."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def show_image(axes: Axes, image: np.ndarray, title: str = "", size: float = 8) -> None:
    """Draw an image, (H, W, 3) RGB uint8 or floats in 0..1, without axes."""
    axes.imshow(image, interpolation="antialiased")
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=size, fontweight="normal")


@cache
def _characters() -> frozenset[int]:
    """Code points that the fonts can draw."""
    files = [findfont(FontProperties(family=[name])) for name in matplotlib.rcParams["font.family"]]
    return frozenset().union(*(get_font(file).get_charmap() for file in files))


def drawable(text: str) -> bool:
    """Whether the fonts can draw all characters of a text."""
    return all(ord(character) in _characters() for character in text)


def picture_names(classes: Classes) -> list[str]:
    """`class_names`, replaced by the wnid or by "label 7" if no installed font can draw them."""
    names = []
    for label, (entry, name) in enumerate(zip(classes, class_names(classes), strict=True)):
        candidates = (printable(name), printable(str(entry["wnid"])), f"label {label}")
        names.append(next(filter(drawable, candidates)))
    return names


def caption(text: str) -> str:
    """Text with question marks for characters that no installed font can draw."""
    return "".join(c if drawable(c) else "?" for c in printable(text))


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write a picture in the format of its suffix and create its folder; raises ModelError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    except ValueError:
        raise ModelError(f"{path.suffix!r} is not a picture format: name the file {path.stem}.png") from None


# --- show batch ----------------------------------------------------------------------------------------------


def batch_figure(batch: TrainingBatch, preprocess: Preprocess, classes: Classes, title: str) -> Figure:
    """Each image of a training batch as stored, augmented and as the network's input."""
    views, crop, names = batch.views, preprocess.crop, picture_names(classes)
    shifts = views.color @ preprocess.color_basis.T
    images = len(batch.stored)
    columns = 2 if images > 1 else 1
    rows = -(-images // columns)
    figure = new_figure(5.2 * columns, 1.95 * rows + 0.4, caption(title))
    cells = figure.subfigures(rows, columns, squeeze=False, wspace=0.04)
    for place, cell in zip(range(images), cells.flat, strict=False):
        panels = cell.subplots(1, 3)
        (top, left), flip = views.anchor[place], views.flip[place]
        mean = preprocess.mean[top : top + crop, left : left + crop]
        augmented = batch.inputs[place] + (mean[:, ::-1] if flip else mean)
        colors = " ".join(f"{round(shift):+d}" for shift in shifts[place].tolist())
        captions = (
            shorten(names[batch.labels[place]], 26),
            f"crop at {top}, {left}" + (", mirrored" if flip else ""),
            f"minus the mean; colour {colors}",
        )
        pictures = (
            batch.stored[place],
            np.clip(augmented, 0, 255).round().astype(np.uint8),
            np.clip(batch.inputs[place] / 255 + 0.5, 0, 1),
        )
        for axes, picture, text, size in zip(panels, pictures, captions, (9, 8, 8), strict=True):
            show_image(axes, picture, text, size=size)
        frame = Rectangle((left - 0.5, top - 0.5), crop, crop, fill=False, edgecolor="white", linewidth=1.2)
        panels[0].add_patch(frame)
    return figure


# --- show filters --------------------------------------------------------------------------------------------


def filters_figure(network: AlexNet, title: str) -> Figure:
    """All filters of the first convolution, (filters, 3, K, K), as one picture of 16 columns."""
    weights = next(network.features.parameters())
    kernels = weights.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    count, side = kernels.shape[0], kernels.shape[1]
    largest = np.abs(kernels).max((1, 2, 3), keepdims=True)
    shown = 0.5 + 0.5 * kernels / np.where(largest > 0, largest, 1)
    columns, cell = 16, side + 1
    rows = -(-count // columns)
    mosaic = np.ones((rows * cell - 1, columns * cell - 1, 3))
    for place, kernel in enumerate(shown):
        y, x = (at * cell for at in divmod(place, columns))
        mosaic[y : y + side, x : x + side] = kernel
    figure = new_figure(9, 9 * rows / columns + 0.5, f"{count} filters of conv1, {side}×{side} pixels")
    axes = figure.subplots()
    show_image(axes, mosaic, caption(title))
    axes.images[0].set_interpolation("nearest")
    return figure


# --- show curves ---------------------------------------------------------------------------------------------


def curves_figure(logs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Plots of loss, accuracy, learning rate and speed over epochs, or over steps if a run has no complete epoch.

    Args:
        logs: name of each run -> its log entries.
    """
    by_epoch = all(any(e["kind"] == "val" for e in log) for log in logs.values())
    figure = new_figure(10.5, 6.6)
    loss, accuracy, lr, speed = figure.subplots(2, 2, sharex=True).flat
    for (name, log), color in zip(logs.items(), COLORS * len(logs), strict=False):
        train = [e for e in log if e["kind"] == "train"]
        val = [e for e in log if e["kind"] == "val"]
        per_epoch = val[0]["step"] / (val[0]["epoch"] + 1) if by_epoch else 1
        x, val_x = ([e["step"] / per_epoch for e in entries] for entries in (train, val))
        label = name if len(logs) > 1 else None
        dots = {"marker": "o", "markersize": 3.5}
        few = dots if len(val) <= 40 else {}
        one = dots if len(train) == 1 else {}  # a line needs two points
        loss.plot(x, [e["loss"] for e in train], color=color, alpha=0.45, linewidth=1, **one)
        loss.plot(val_x, [e["loss"] for e in val], color=color, label=label, **few)
        accuracy.plot(val_x, [100 * e["top1"] for e in val], color=color, **few)
        accuracy.plot(val_x, [100 * e["top5"] for e in val], color=color, linestyle="--", **few)
        lr.plot(x, [e["lr"] for e in train], color=color, drawstyle="steps-post", **one)
        speed.plot(x, [e["images_per_s"] for e in train], color=color, linewidth=1, **one)
    loss.set(title="Loss (cross entropy, nats)")
    accuracy.set(title="Validation accuracy (%)")
    lr.set(title="Learning rate", yscale="log")
    few_decades = lr.dataLim.y1 < 500 * lr.dataLim.y0
    lr.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
    lr.yaxis.set_major_formatter("{x:g}")
    lr.yaxis.set_minor_formatter(NullFormatter())
    speed.set(title="Training speed (images/s)")
    speed.set_ylim(0, 1.1 * speed.dataLim.y1)
    for axes in (lr, speed):
        axes.set_xlabel("epochs" if by_epoch else "steps")
    for axes in (loss, accuracy, lr, speed):
        axes.grid(True)
        axes.set_axisbelow(True)
    _key(loss, {"training": {"alpha": 0.45, "linewidth": 1}, "validation": {}})
    _key(accuracy, {"top-1": {}, "top-5": {"linestyle": "--"}})
    if len(logs) > 1:
        figure.legend(loc="outside upper left", ncols=min(3, len(logs)))
    else:
        figure.suptitle(next(iter(logs)), x=0.01, ha="left", fontweight="bold")
    return figure


def _key(axes: Any, styles: dict[str, dict[str, Any]]) -> None:
    """A legend of line styles in grey, because colours distinguish runs."""
    lines = [Line2D([], [], color="#444444", **style) for style in styles.values()]
    axes.legend(lines, list(styles), loc="best")


# --- show dataset --------------------------------------------------------------------------------------------


def dataset_figure(readers: dict[str, ShardReader], counts: dict[str, np.ndarray]) -> Figure:
    """Images per class, rejected files by reason, and the first split's mean image and principal axes of colour."""
    first = next(iter(readers.values()))
    manifest: Manifest = first.manifest
    names, n = picture_names(manifest.classes), len(manifest.classes)
    tall = max(4.6, 0.24 * n + 1.2) if n <= NAMED_CLASSES else 5.2
    figure = new_figure(11, tall, caption(str(first.split_dir.parent)))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.25, 1])[0]
    bars = left.subplots()
    if n <= NAMED_CLASSES:
        thickness = 0.8 / len(counts)
        for place, (split, sizes) in enumerate(counts.items()):
            at = np.arange(n) - 0.4 + thickness * (place + 0.5)
            label = f"{split} ({sizes.sum():,})"
            drawn = bars.barh(at, sizes, thickness * 0.92, color=COLORS[place], label=label)
            bars.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=7, color="#555555")
        bars.set_yticks(range(n), [shorten(name, 24) for name in names])
        bars.set_ylim(n - 0.5, -0.5)
        bars.set_xlabel("images")
        bars.tick_params(axis="y", length=0)
    else:
        for place, (split, sizes) in enumerate(counts.items()):
            bars.plot(np.sort(sizes)[::-1], color=COLORS[place], label=f"{split} ({sizes.sum():,})")
            bars.set_ylim(bottom=0)
        bars.set(xlabel="classes, the largest first", ylabel="images")
        bars.grid(True)
    bars.set_title("Images of each class")
    bars.legend(loc="upper left", bbox_to_anchor=(0, -0.09), ncols=2)

    grid = right.add_gridspec(2, 2, height_ratios=[1.25, 1])
    mean = right.add_subplot(grid[0, 0])
    show_image(mean, manifest.load_mean(first.split_dir).round().astype(np.uint8))
    mean.set_title("Mean image")
    mean.set_anchor("NW")
    manifests = {split: reader.manifest for split, reader in readers.items()}
    _rejected(right.add_subplot(grid[0, 1]), manifests)
    _color_axes(right.add_subplot(grid[1, :]), manifest)
    return figure


def _rejected(axes: Any, manifests: dict[str, Manifest]) -> None:
    reasons = Counter(entry["reason"] for m in manifests.values() for entry in m.rejected)
    axes.set_title(f"{reasons.total():,} rejected files")
    lines = [f"{count:,} × {shorten(caption(reason), 30)}" for reason, count in reasons.most_common(9)]
    lines += [f"{len(reasons) - 9} other reasons"] if len(reasons) > 9 else []
    lines += ["", *(f"{split}: {len(m.shards):,} shards, {m.encoding}" for split, m in manifests.items())]
    mean = next(iter(manifests.values())).channel_mean
    lines.append("channel mean " + ", ".join(f"{level:.1f}" for level in mean))
    axes.text(
        0, 0.98, "\n".join(lines).strip(), va="top", linespacing=1.6, transform=axes.transAxes, fontsize=8
    )
    axes.set_axis_off()


def _color_axes(axes: Any, manifest: Manifest) -> None:
    """Draw each principal axis as the colours from -2 to +2 standard deviations around the mean colour."""
    deviations = np.sqrt(manifest.pca_eigenvalues)  # of pixels in 0..1
    vectors = np.array(manifest.pca_eigenvectors)
    reach = np.linspace(-2, 2, 201)
    center = np.array(manifest.channel_mean) / 255
    # (3, 201, 3): one row of colours per axis
    strips = center + reach[None, :, None] * (vectors * deviations).T[:, None, :]
    axes.imshow(np.clip(strips, 0, 1), extent=(-2, 2, 2.5, -0.5), aspect="auto", interpolation="nearest")
    axes.hlines([0.5, 1.5], -2, 2, color="white", linewidth=4)
    labels = [
        f"λ {value:.4f}\n" + " ".join(f"{part:+.2f}" for part in vector)
        for value, vector in zip(manifest.pca_eigenvalues, vectors.T, strict=True)
    ]
    axes.set_yticks(range(3), labels, fontsize=7.5)
    axes.set_xlabel("standard deviations from the mean colour")
    axes.set_title("Principal axes of colour: eigenvalue, RGB")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


# --- predict -------------------------------------------------------------------------------------------------


def sheet(predictions: list[Prediction], classes: Classes, reader: ShardReader | None = None) -> Figure:
    """The paper's figure 4: photographs with their guesses and, given a `reader`, with their neighbours."""
    names = picture_names(classes)
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

    stored = picture_names(reader.manifest.classes)
    width = max(len(p.neighbours) for p in predictions)
    figure = new_figure(1.5 * (width + 3), 1.75 * len(predictions))
    # rows are close together, as in the paper
    grid = figure.subplots(len(predictions), width + 2, squeeze=False, width_ratios=[1.15, 1.5, *[1] * width])
    for row, prediction in zip(grid, predictions, strict=True):
        assert prediction.rgb is not None
        show_image(row[0], prediction.rgb, shorten(_caption(prediction, names), 24))
        _draw_bars(row[1], prediction, names)
        for axes, near in zip(row[2:], prediction.neighbours, strict=False):
            text = f"{shorten(stored[near.label], 16)}  {near.distance:.1f}"
            show_image(axes, stored_image(reader, near.index), text, size=7)
        for axes in islice(row, 2 + len(prediction.neighbours), None):
            axes.set_axis_off()
    return figure


def _caption(prediction: Prediction, names: list[str]) -> str:
    """The true class, if it is known, and the file's name."""
    file = caption(Path(prediction.path).name)
    return file if prediction.truth is None else f"{names[prediction.truth]}: {file}"


def _draw_bars(axes: Any, prediction: Prediction, names: list[str]) -> None:
    """Draw the guesses as bars with names inside; the true class has another colour."""
    for place, (label, chance) in enumerate(prediction.top):
        axes.barh(place, chance, 0.8, color=RIGHT if label == prediction.truth else WRONG, alpha=0.45)
        axes.text(0.02, place, shorten(names[label], 24), va="center", fontsize=8)
        axes.text(1.0, place, f"{chance:.0%}", va="center", ha="right", fontsize=8, color="#555555")
    axes.set(xlim=(0, 1), ylim=(len(prediction.top) - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


# --- evaluate ------------------------------------------------------------------------------------------------


def confusion_figure(pairs: tuple[np.ndarray, np.ndarray, np.ndarray], classes: Classes) -> Figure:
    """A map of `Scores.confusion` with rows that sum to 1, and a list of the most frequent mistakes.

    With more than MAP_CELLS classes, each cell stands for several neighbouring labels.
    """
    true, taken, images = pairs
    n, names = len(classes), picture_names(classes)
    named = n <= NAMED_CLASSES
    side = max(4.2, 1.6 + 0.26 * n) if named else 8.0
    figure = new_figure(side + 3.8, side + 0.3)
    axes, listing = figure.subplots(1, 2, width_ratios=[side, 3.2])
    block = -(-n // MAP_CELLS)
    counts = np.zeros((-(-n // block),) * 2, np.int64)
    np.add.at(counts, (true // block, taken // block), images)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    # with many classes, each mistake is rare; the square root makes 1 % visible
    edges = (-0.5, block * len(counts) - 0.5)
    shown = axes.imshow(
        shares if named else np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, extent=(*edges, *edges[::-1])
    )
    axes.set_title("True class (row) and predicted class (column)")
    axes.set_anchor("N")  # aligns its title with the list's
    axes.spines[:].set_visible(False)
    if named:
        short = [shorten(name, 22) for name in names]
        axes.set_xticks(range(n), short, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), short)
    else:
        axes.set_xlabel("label")
        axes.set_ylabel("label")
    if n <= 15:
        for i in range(n):
            for j in range(n):
                ink = "white" if shares[i, j] > 0.55 else "#444444"
                text = f"{shares[i, j]:.0%}\n{counts[i, j]}"
                axes.text(j, i, text, ha="center", va="center", color=ink, fontsize=8)
    bar = figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.02, panchor=False)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    bar.set_ticks(ticks, labels=[f"{t if named else t * t:.0%}" for t in ticks])
    bar.outline.set_visible(False)

    wrong = np.flatnonzero(true != taken)
    most = wrong[np.argsort(-images[wrong], kind="stable")][: 15 if named else 25]
    rows = [
        (f"{images[i]:,}", f"{shorten(names[true[i]], 22)} → {shorten(names[taken[i]], 22)}") for i in most
    ]
    listing.set_axis_off()
    listing.set_title("Most frequent mistakes")
    for x, align, column in zip((0.12, 0.16), ("right", "left"), zip(*rows, strict=True), strict=False):
        text = "\n".join(column)
        listing.text(x, 0.98, text, va="top", ha=align, linespacing=1.7, transform=listing.transAxes)
    return figure
