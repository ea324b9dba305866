"""Judge trained networks: python tools/evaluate.py RUN [RUN2 ...] --data DATA --crops 10."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from base.machine import cpu_threads
from model.parallel.ranks import Ranks, count_gpus, launch, under_torchrun
from model.training.evaluation import log_probabilities
from pipeline.load.loader import eval_loader
from pipeline.load.plan import rank_slice
from pipeline.shards import ShardReader
from tools.common import (
    CONTEXT,
    TOP,
    Classes,
    Run,
    check_classes,
    check_size,
    class_names,
    data_of,
    data_option,
    file_option,
    load_run,
    option,
    write_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMED_CLASSES = 40  # as many as can be read along the axes of the confusion picture


@click.command(context_settings=CONTEXT)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@data_option("Holds val/.")
@option("--split", type=click.Choice(["val", "train"]), default="val", help="The part of DATA to judge on.")
@option("--crops", type=click.Choice(["1", "10"]), default="1", help="Centre; or corners too, all mirrored.")
@option("--gpus", type=click.IntRange(0), default=None, show_default="1 if there is one", help="0: the CPU.")
@option("--batch", type=click.IntRange(1), default=128, help="Crops through the network at once, per GPU.")
@option("--amp", type=click.Choice(list(AMP)), default="off", help="Mixed precision: quicker, less exact.")
@option("--workers", type=click.IntRange(0), default=1, help="Processes a rank that read shards; 0: none.")
@file_option("--csv", "Accuracy of every class.")
@file_option("--confusion", "Picture (PNG) of which class is taken for which.")
@file_option("--json", "The results; - is the standard output.")
@option("--progress/--no-progress", default=True)
def main(**config: Any) -> None:
    """Loss, top-1 and top-5 accuracy of RUN, a folder that train.py wrote or a checkpoint, on DATA/val.

    Several RUNs are judged one by one and as an ensemble whose softmax is averaged. --crops 10 averages the
    softmax over the paper's ten crops: four corners, centre, and all mirrored. Preprocessing comes from the
    checkpoint, so only DATA/val is needed. Every image counts exactly once, on any number of GPUs.
    """
    split_dir = data_of(config["runs"][0], config["data"]) / config["split"]
    reader = ShardReader(split_dir)
    if under_torchrun():
        gpu, ranks = config["gpus"] != 0 and torch.cuda.is_available(), int(os.environ["WORLD_SIZE"])
    else:
        gpus = config["gpus"]
        gpus = min(1, torch.cuda.device_count()) if gpus is None else count_gpus(gpus)
        gpu, ranks = gpus > 0, max(1, min(gpus, len(reader)))
    reader.close()
    launch(evaluate, {**config, "split_dir": split_dir}, ranks, gpu)


def evaluate(ranks: Ranks, config: dict[str, Any]) -> None:
    """One rank's share of the work; the first rank reports."""
    split_dir, crops = config["split_dir"], int(config["crops"])
    reader = ShardReader(split_dir)
    rows: list[dict[str, Any]] = []
    together: Tensor | None = None
    for number, path in enumerate(config["runs"], 1):
        run = load_run(path, ranks.device)
        logp, labels = judge(
            run,
            reader,
            ranks,
            crops=crops,
            batch=config["batch"],
            amp=AMP[config["amp"]],
            workers=config["workers"],
            progress=config["progress"],
            title=f"network {number} of {len(config['runs'])}",
        )
        rows.append({"network": str(run.path), **score(logp, labels)})
        together = logp if together is None else torch.logaddexp(together, logp)
    assert together is not None  # click asks for one RUN at least
    if not ranks.first:
        return
    logp = together - torch.tensor(len(rows)).log()
    overall = score(logp, labels)
    if len(rows) > 1:
        rows.append({"network": f"average of {len(rows)}", **overall})

    result = {"data": str(split_dir), "crops": crops, **overall, "networks": rows}
    if config["json_path"]:
        write_text(config["json_path"], json.dumps(result, indent=1) + "\n")
    if str(config["json_path"]) != "-":
        crops_said = "centre crop" if crops == 1 else f"{crops} crops"
        click.echo(f"{overall['count']:,} images of {split_dir}, {crops_said}")
        width = max(len(row["network"]) for row in rows)
        click.echo(f"{'':{width}}     top-1     top-{min(TOP, logp.shape[1])}    loss")
        for row in rows:
            numbers = f"{row['top1']:9.2%} {row['top5']:9.2%} {row['loss']:7.4f}"
            click.echo(f"{row['network']:{width}} {numbers}")
    if config["csv_path"]:
        table = io.StringIO()
        by_class = per_class(logp, labels, reader.manifest.classes)
        writer = csv.DictWriter(table, list(by_class[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(by_class)
        write_text(config["csv_path"], table.getvalue())
    if config["confusion_path"]:
        from tools.pictures import save

        counts = confusion(logp, labels)
        save(confusion_figure(counts, class_names(reader.manifest.classes)), config["confusion_path"])


@torch.inference_mode()
def judge(
    run: Run,
    reader: ShardReader,
    ranks: Ranks,
    *,
    crops: int = 1,
    batch: int = 128,
    amp: torch.dtype | None = None,
    workers: int = 1,
    progress: bool = True,
    title: str = "images",
) -> tuple[Tensor, Tensor]:
    """What a network makes of a whole split, on every rank alike and in the split's order.

    Returns log probabilities (count, classes) float32, averaged over 1 or 10 `crops`, and labels (count,)
    int64. Raises DataError if the data set's classes or image size are not those of the training.
    """
    check_classes(run, reader.manifest, reader.split_dir)
    check_size(run, reader.manifest, reader.split_dir)
    logp = torch.zeros(len(reader), len(run.classes), device=ranks.device)
    labels, seen = torch.zeros(2, len(reader), dtype=torch.int64, device=ranks.device)
    loader = eval_loader(
        reader,
        run.preprocess,
        max(1, min(batch // crops, len(reader))),
        rank=ranks.rank,
        world_size=ranks.world_size,
        device="gpu" if ranks.gpu else "cpu",
        device_id=ranks.local_rank if ranks.gpu else None,
        threads=cpu_threads(ranks.local_world_size),
        workers=workers,
        ten_crops=crops == 10,
    )
    row = rank_slice(len(reader), ranks.rank, ranks.world_size).start
    with tqdm(
        total=len(reader), desc=title, unit=" images", disable=not (progress and ranks.first), leave=False
    ) as bar:
        for images, batch_labels in loader:
            rows = slice(row, row := row + len(batch_labels))
            logp[rows] = log_probabilities(run.network, images, amp)
            labels[rows] = batch_labels
            seen[rows] += 1
            bar.update(len(batch_labels) * ranks.world_size)
    loader.close()
    for values in (logp, labels, seen):
        ranks.sum(values)  # every row is zero on all ranks but one
    if not bool((seen == 1).all()):
        raise RuntimeError("the ranks' shares do not tile the data set")
    return logp, labels


def score(logp: Tensor, labels: Tensor) -> dict[str, Any]:
    """Mean cross entropy in nats, top-1 and top-5 accuracy in 0..1, and the number of images."""
    hits = _hits(logp, labels)
    return {
        "loss": -logp.gather(1, labels[:, None]).double().mean().item(),
        "top1": hits[:, 0].double().mean().item(),
        "top5": hits.any(1).double().mean().item(),
        "count": len(labels),
    }


def _hits(logp: Tensor, labels: Tensor) -> Tensor:
    """(count, 5) bool: whether each of the best guesses is right."""
    return logp.topk(min(TOP, logp.shape[1])).indices == labels[:, None]


def confusion(logp: Tensor, labels: Tensor) -> Tensor:
    """(classes, classes) int64 on the CPU: how many images of class [row] were taken for class [column]."""
    classes = logp.shape[1]
    pairs = labels * classes + logp.argmax(1)
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).cpu()


def per_class(logp: Tensor, labels: Tensor, classes: Classes) -> list[dict[str, Any]]:
    """A row for each class: how many images, top-1, top-5 (0..1), and what it is most often mistaken for."""
    hits = _hits(logp, labels)
    counts = confusion(logp, labels)
    names = class_names(classes)
    rows = []
    for label, entry in enumerate(classes):
        own = labels == label
        images = int(own.sum())
        mistaken = counts[label].clone()
        mistaken[label] = 0
        other = int(mistaken.argmax())
        errs = int(mistaken[other])
        rows.append(
            {
                "label": label,
                "wnid": entry["wnid"],
                "name": names[label],
                "images": images,
                "top1": f"{hits[own, 0].double().mean().item():.6f}" if images else "",
                "top5": f"{hits[own].any(1).double().mean().item():.6f}" if images else "",
                "mistaken_for": names[other] if errs else "",
                "mistaken_images": errs,
            }
        )
    return rows


def confusion_figure(counts: Tensor, names: list[str]) -> Figure:
    """A picture of `confusion`, each row scaled to 1; beside it the most frequent mistakes by name."""
    from tools.pictures import new_figure, shorten

    n = len(names)
    named = n <= NAMED_CLASSES
    side = max(4.2, 1.6 + 0.26 * n) if named else 8.0
    figure = new_figure(side + 3.8, side + 0.3)
    axes, listing = figure.subplots(1, 2, width_ratios=[side, 3.2])
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    # with many classes single mistakes are faint: the root makes 1 % visible
    shown = axes.imshow((shares if named else shares.sqrt()).numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_title("True class (row) taken for class (column)")
    axes.set_anchor("N")  # its title on one line with the list's
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
                text = f"{shares[i, j]:.0%}\n{int(counts[i, j])}"
                axes.text(j, i, text, ha="center", va="center", color=ink, fontsize=8)
    bar = figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.02, panchor=False)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    bar.set_ticks(ticks, labels=[f"{t if named else t * t:.0%}" for t in ticks])
    bar.outline.set_visible(False)

    mistakes = counts.clone().fill_diagonal_(0)
    top = mistakes.flatten().topk(min(15 if named else 25, n * n))
    rows = [
        (f"{int(number):,}", f"{shorten(names[int(at) // n], 22)} → {shorten(names[int(at) % n], 22)}")
        for number, at in zip(top.values, top.indices, strict=True)
        if number
    ]
    listing.set_axis_off()
    listing.set_title("Most frequent mistakes")
    for x, align, column in zip((0.12, 0.16), ("right", "left"), zip(*rows, strict=True), strict=False):
        text = "\n".join(column)
        listing.text(x, 0.98, text, va="top", ha=align, linespacing=1.7, transform=listing.transAxes)
    return figure


if __name__ == "__main__":
    main()
