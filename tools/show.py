"""Pictures of data sets, networks and runs: python tools/show.py batch|filters|curves|dataset|report."""

from __future__ import annotations

import base64
import json
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm import tqdm

from base.errors import ModelError
from model.alexnet import AlexNet
from model.parallel.ranks import Ranks
from pipeline.load.loader import train_loader
from pipeline.load.plan import AUGMENTATIONS, Plan
from pipeline.preprocess import MEANS, Preprocess, stored_image
from pipeline.shards import Manifest, ShardReader
from tools.common import (
    CONTEXT,
    TOP,
    Run,
    class_names,
    data_of,
    data_option,
    load_run,
    one_device,
    option,
    read_config,
    run_argument,
    write_text,
)
from tools.evaluate import confusion, confusion_figure, judge, per_class, score
from tools.pictures import COLORS, new_figure, png, save, shorten, show_image
from tools.predict import Prediction, predict, sheet

NAMED_CLASSES = 40  # as many bars as can be read; more classes become a curve
LogEntry = dict[str, Any]  # a line of log.jsonl


def out_option(default: str) -> Any:
    return option(
        "--out", type=click.Path(dir_okay=False, path_type=Path), default=default, help="The file to write."
    )


progress_option = option("--progress/--no-progress", default=True)


@click.group(context_settings=CONTEXT)
def main() -> None:
    """Pictures of what goes into a network, what it learned and how."""


def saved(figure: Figure, out: Path) -> None:
    save(figure, out)
    click.echo(f"wrote {out}")


# --- batch ---------------------------------------------------------------------------------------------------


@main.command()
@click.argument("data", type=click.Path(path_type=Path))
@out_option("batch.png")
@option("--images", type=click.IntRange(1, 64), default=12, help="How many of the batch to draw.")
@option("--step", type=click.IntRange(0), default=0, help="Of training, counted from its start.")
@option("--global-batch", type=click.IntRange(1), default=128, help="Of training; fewer if there are fewer.")
@option("--seed", type=click.IntRange(0, 2**63 - 1), default=0)
@option("--crop", type=click.IntRange(1), default=224)
@option("--mean", type=click.Choice(MEANS), default="pixel")
@option("--augment", type=click.Choice(AUGMENTATIONS), default="all")
@option("--color-std", type=click.FloatRange(0), default=0.1)
def batch(
    data: Path,
    out: Path,
    images: int,
    step: int,
    global_batch: int,
    seed: int,
    crop: int,
    mean: str,
    augment: str,
    color_std: float,
) -> None:
    """What the network sees of DATA/train at one step of training.

    With train.py's options these are the very images, crops, flips and colours of that step. Each image is
    drawn as it is stored, with its crop; as augmented; and as the network's input, minus the mean (grey is 0).
    """
    reader = ShardReader(data / "train")
    plan = Plan(
        count=len(reader),
        global_batch=min(global_batch, len(reader)),
        seed=seed,
        size=reader.manifest.size,
        crop=crop,
        augment=augment,
        color_std=color_std,
    )
    saved(batch_figure(reader, plan, Preprocess.load(data / "train", crop, mean), step, images), out)


def batch_figure(reader: ShardReader, plan: Plan, preprocess: Preprocess, step: int, images: int) -> Figure:
    """The first `images` of a step's batch, each stored, augmented and as the network's input."""
    loader = train_loader(reader, plan, preprocess, first_step=step, end_step=step + 1, workers=0)
    pixels, labels = next(loader)
    inputs = pixels.permute(0, 2, 3, 1).numpy()  # (N, crop, crop, 3), levels minus the mean
    loader.close()
    epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
    samples, views = plan.samples(epoch, step_in_epoch), plan.views(epoch, step_in_epoch)
    shifts = views.color @ preprocess.color_basis.T
    names, crop = class_names(reader.manifest.classes), preprocess.crop

    images = min(images, len(samples))
    columns = 2 if images > 1 else 1
    rows = -(-images // columns)
    figure = new_figure(
        5.2 * columns, 1.95 * rows + 0.4, f"Step {step}, epoch {epoch + 1}: {reader.split_dir}"
    )
    cells = figure.subfigures(rows, columns, squeeze=False, wspace=0.04)
    for place, cell in enumerate(cells.flat):
        if place >= images:
            break
        panels = cell.subplots(1, 3)
        (top, left), flip = views.anchor[place], views.flip[place]
        mean = preprocess.mean[top : top + crop, left : left + crop]
        augmented = inputs[place] + (mean[:, ::-1] if flip else mean)
        said = [f"crop at {top}, {left}", *(["mirrored"] if flip else [])]
        colors = " ".join(f"{round(shift):+d}" for shift in shifts[place].tolist())
        captions = (
            shorten(names[int(labels[place])], 26),
            ", ".join(said),
            f"minus the mean; colour {colors}",
        )
        pictures = (
            stored_image(reader, int(samples[place])),
            np.clip(augmented, 0, 255).round().astype(np.uint8),
            np.clip(inputs[place] / 255 + 0.5, 0, 1),
        )
        for axes, picture, caption in zip(panels, pictures, captions, strict=True):
            show_image(axes, picture, caption, size=8 if picture is not pictures[0] else 9)
        frame = Rectangle((left - 0.5, top - 0.5), crop, crop, fill=False, edgecolor="white", linewidth=1.2)
        panels[0].add_patch(frame)
    return figure


# --- filters -------------------------------------------------------------------------------------------------


@main.command()
@run_argument()
@out_option("filters.png")
def filters(run: Path, out: Path) -> None:
    """The first layer's filters of RUN, like the paper's figure 3.

    Each filter is scaled by its own largest weight; grey is 0. In the paper's network the upper half belongs
    to the first group of channels, the lower half to the second.
    """
    trained = load_run(run)
    saved(filters_figure(trained.network, trained.title), out)


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
    show_image(axes, mosaic, title)
    axes.images[0].set_interpolation("nearest")
    return figure


# --- curves --------------------------------------------------------------------------------------------------


@main.command()
@run_argument(metavar="RUN...", nargs=-1, required=True)
@out_option("curves.png")
def curves(run: tuple[Path, ...], out: Path) -> None:
    """Loss, accuracy, learning rate and speed of one or several RUNs, from their log.jsonl."""
    saved(curves_figure({str(folder): read_log(folder) for folder in run}), out)


def read_log(run: Path) -> list[LogEntry]:
    """The entries of RUN/log.jsonl, also for a checkpoint in RUN; raises ModelError if there are none.

    A half-written last line, of a run that goes on or was killed, is left out.
    """
    folder = run.parent if run.is_file() else run
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ModelError(
            f"cannot read {folder / 'log.jsonl'} ({error.strerror}): give a folder that train.py wrote"
        ) from None
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ModelError(f"line {number} of {folder / 'log.jsonl'} is damaged: delete it") from None
    if not entries:
        raise ModelError(f"{folder / 'log.jsonl'} is empty: train for --log-every steps first")
    return entries


def curves_figure(logs: dict[str, list[LogEntry]]) -> Figure:
    """Four plots over epochs, of runs by name; over steps where a run has not finished an epoch."""
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
        one = dots if len(train) == 1 else {}  # a line needs two
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
    """A legend of line styles, in grey: colours belong to the runs."""
    lines = [Line2D([], [], color="#444444", **style) for style in styles.values()]
    axes.legend(lines, list(styles), loc="best")


# --- dataset -------------------------------------------------------------------------------------------------


@main.command()
@click.argument("data", type=click.Path(path_type=Path))
@out_option("dataset.png")
@progress_option
def dataset(data: Path, out: Path, progress: bool) -> None:
    """What is in DATA: images of each class, rejected files, mean image, and the axes of the colour shift."""
    splits = {s: data / s for s in ("train", "val") if (data / s).exists()} or {"train": data / "train"}
    readers = {split: ShardReader(folder) for split, folder in splits.items()}
    counts = {split: count_classes(reader, split, progress) for split, reader in readers.items()}
    for split, reader in readers.items():
        manifest, sizes = reader.manifest, counts[split]
        click.echo(
            f"{split}: {manifest.count:,} images of {len(manifest.classes):,} classes ({sizes.min():,} to "
            f"{sizes.max():,} a class), {manifest.encoding}, {len(manifest.shards):,} shards, "
            f"{len(manifest.rejected):,} files rejected"
        )
        for entry in manifest.rejected[:10]:
            click.echo(f"  rejected {entry['source']!r}: {entry['reason']}")
        if len(manifest.rejected) > 10:
            click.echo(f"  and {len(manifest.rejected) - 10:,} more, all in {reader.split_dir}/manifest.json")
    saved(dataset_figure(readers, counts), out)


def count_classes(reader: ShardReader, title: str, progress: bool = True) -> np.ndarray:
    """Images of each class, (classes,) int64; reads every record, since labels are nowhere else."""
    counts = np.zeros(len(reader.manifest.classes), np.int64)
    # below some thousands it takes no time
    hidden = not progress or len(reader) < 5000
    for index in tqdm(range(len(reader)), desc=title, unit=" images", leave=False, disable=hidden):
        counts[reader.read(index)[1]] += 1
    return counts


def dataset_figure(readers: dict[str, ShardReader], counts: dict[str, np.ndarray]) -> Figure:
    """Class counts of the splits, rejected files by reason, mean image and PCA axes of the first split."""
    first = next(iter(readers.values()))
    manifest: Manifest = first.manifest
    names, n = class_names(manifest.classes), len(manifest.classes)
    tall = max(4.6, 0.24 * n + 1.2) if n <= NAMED_CLASSES else 5.2
    figure = new_figure(11, tall, str(first.split_dir.parent))
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
    lines = [f"{count:,} × {shorten(reason, 30)}" for reason, count in reasons.most_common(9)]
    lines += [f"{len(reasons) - 9} other reasons"] if len(reasons) > 9 else []
    lines += ["", *(f"{split}: {len(m.shards):,} shards, {m.encoding}" for split, m in manifests.items())]
    mean = next(iter(manifests.values())).channel_mean
    lines.append("channel mean " + ", ".join(f"{level:.1f}" for level in mean))
    axes.text(
        0, 0.98, "\n".join(lines).strip(), va="top", linespacing=1.6, transform=axes.transAxes, fontsize=8
    )
    axes.set_axis_off()


def _color_axes(axes: Any, manifest: Manifest) -> None:
    """Each principal axis as the colours from -2 to +2 standard deviations around the mean colour."""
    deviations = np.sqrt(manifest.pca_eigenvalues)  # of pixels in 0..1
    vectors = np.array(manifest.pca_eigenvectors)
    reach = np.linspace(-2, 2, 201)
    center = np.array(manifest.channel_mean) / 255
    # (3, 201, 3): a row of colours for each axis
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


# --- report --------------------------------------------------------------------------------------------------


@main.command()
@run_argument()
@data_option("Judged on its val/.")
@out_option("report.html")
@option("--crops", type=click.Choice(["1", "10"]), default="1", help="To evaluate on, as tools/evaluate.py.")
@option(
    "--gpus", type=click.IntRange(0, 1), default=None, show_default="1 if there is one", help="0: the CPU."
)
@option("--workers", type=click.IntRange(0), default=1, help="Processes that read shards; 0: none.")
@progress_option
def report(
    run: Path, data: Path | None, out: Path, crops: str, gpus: int | None, workers: int, progress: bool
) -> None:
    """One HTML page on RUN: curves, evaluation on DATA/val, guesses, filters, batch and data set.

    The page holds its pictures, so it can be moved and mailed as one file.
    """
    trained, log = load_run(run, one_device(gpus)), read_log(run)
    folder, data = trained.path.parent, data_of(run, data)
    readers = {split: ShardReader(data / split) for split in ("train", "val")}
    train, val = readers["train"], readers["val"]
    ranks = Ranks(gpu=next(trained.network.parameters()).is_cuda)
    logp, labels = judge(trained, val, ranks, crops=int(crops), workers=workers, progress=progress)
    scores = score(logp, labels)
    config = read_config(folder)
    plan = Plan(
        count=len(train),
        global_batch=min(config.get("global_batch", 128), len(train)),
        seed=config.get("seed", 0),
        size=train.manifest.size,
        crop=trained.preprocess.crop,
        augment=config.get("augment", "all"),
        color_std=config.get("color_std", 0.1),
    )
    facts = {
        "network": f"{trained.variant}, {sum(p.numel() for p in trained.network.parameters()):,} parameters",
        "checkpoint": f"{trained.path}, epoch {trained.epoch}, step {trained.step:,}",
        "top-1": f"{scores['top1']:.2%}",
        "top-5": f"{scores['top5']:.2%}",
        "loss": f"{scores['loss']:.4f}",
        "judged on": f"{scores['count']:,} images of {val.split_dir}, "
        + ("centre crop" if crops == "1" else f"{crops} crops"),
    }
    counts = {split: count_classes(reader, split, progress) for split, reader in readers.items()}
    pictures = {
        "Curves": curves_figure({str(folder): log}),
        "Mistakes": confusion_figure(confusion(logp, labels), trained.names),
        "Guesses": sheet(guesses(trained, val), trained.names, None),
        "Filters": filters_figure(trained.network, "each scaled by its own largest weight; grey is 0"),
        "Batch": batch_figure(train, plan, trained.preprocess, 0, 8),
        "Data set": dataset_figure(readers, counts),
    }
    page = html_page(f"AlexNet: {folder}", facts, per_class(logp, labels, trained.classes), pictures, config)
    write_text(out, page)
    click.echo(f"wrote {out}")


def guesses(trained: Run, reader: ShardReader, count: int = 8) -> list[Prediction]:
    """What the network makes of images spread evenly over a split."""
    chosen = np.unique(np.linspace(0, len(reader) - 1, count).astype(int)).tolist()
    loaded = [(f"image {index}", stored_image(reader, index)) for index in chosen]
    device = next(trained.network.parameters()).device
    predictions, _ = predict(trained, loaded, TOP, device)
    for prediction, index in zip(predictions, chosen, strict=True):
        prediction.truth = reader.read(index)[1]
    return predictions


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { margin-bottom: .5rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
nav { margin-bottom: 1rem; } nav a { margin-right: 1rem; } .facts td:first-child { color: #777; }
img { max-width: 100%; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } th { font-weight: 600; }
.classes { max-height: 30rem; overflow-y: auto; display: inline-block; } summary { cursor: pointer; }
"""


def html_page(
    title: str,
    facts: dict[str, str],
    classes: list[dict[str, Any]],
    pictures: dict[str, Figure],
    config: dict[str, Any],
) -> str:
    """A page that needs no other file: pictures are data: URIs, and it loads nothing."""

    def table(rows: list[list[Any]], head: tuple[str, ...] = (), numbers: tuple[int, ...] = ()) -> str:
        """`numbers`: the columns that are aligned to the right."""
        lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"] if head else []
        for row in rows:
            kinds = (' class="number"' if at in numbers else "" for at in range(len(row)))
            cells = (f"<td{kind}>{escape(str(cell))}</td>" for kind, cell in zip(kinds, row, strict=True))
            lines.append("<tr>" + "".join(cells) + "</tr>")
        return "<table>\n" + "\n".join(lines) + "\n</table>"

    sections = {}
    for name, figure in pictures.items():
        data = base64.b64encode(png(figure)).decode()
        sections[name] = f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'
    worst_first = sorted(classes, key=lambda c: (float(c["top1"] or 2), c["label"]))
    rows = []
    for c in worst_first:
        shares = [f"{float(c[k]):.1%}" if c["images"] else "–" for k in ("top1", "top5")]
        mistake = f"{c['mistaken_for']} ({c['mistaken_images']})" if c["mistaken_images"] else ""
        rows.append([c["name"], c["images"], *shares, mistake])
    head = ("class", "images", "top-1", "top-5", "most often taken for")
    sections["Classes"] = f'<div class="classes">{table(rows, head, (1, 2, 3))}</div>'
    if config:
        options = [[name, str(value)] for name, value in config.items()]
        sections["Options"] = f"<details><summary>of train.py</summary>{table(options)}</details>"
    links = "".join(f'<a href="#{name.replace(" ", "-")}">{name}</a>' for name in sections)
    body = "\n".join(
        f'<h2 id="{name.replace(" ", "-")}">{name}</h2>\n{content}' for name, content in sections.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        f"<h1>{escape(title)}</h1>\n<nav>{links}</nav>\n"
        f'<div class="facts">{table([list(fact) for fact in facts.items()])}</div>\n'
        f"{body}\n</body></html>\n"
    )


if __name__ == "__main__":
    main()
