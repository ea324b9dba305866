"""Evaluation on a whole split: loss, accuracy and confusions, in memory that does not depend on the classes."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base.machine import cpu_threads
from model.parallel.ranks import Ranks
from model.training.evaluation import log_probabilities
from pipeline.load.loader import Loader, eval_loader
from pipeline.load.plan import rank_slice
from pipeline.shards import ShardReader
from tools.lib.cli import TOP, cell, echo, printable, write_text
from tools.lib.runs import Classes, Run, check_classes, check_size, class_names, load_run

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Scores:
    """The results for each image of a split, in the split's order, in 13 bytes per image."""

    labels: np.ndarray  # (count,) int32
    guesses: np.ndarray  # (count,) int32, the most probable class
    in_top: np.ndarray  # (count,) bool, whether the label is among the TOP best guesses
    losses: np.ndarray  # (count,) float32, cross entropy in nats
    classes: int

    def overall(self) -> dict[str, Any]:
        """Mean cross entropy in nats, top-1 and top-5 accuracy in 0..1, and the number of images."""
        return {
            "loss": float(self.losses.mean(dtype=np.float64)),
            "top1": float((self.guesses == self.labels).mean()),
            "top5": float(self.in_top.mean()),
            "count": len(self.labels),
        }

    def confusion(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All pairs (true class, predicted class, number of images) that occur, as int64 arrays, sorted."""
        pairs = self.labels.astype(np.int64) * self.classes + self.guesses
        found, images = np.unique(pairs, return_counts=True)
        return found // self.classes, found % self.classes, images

    def per_class(self, classes: Classes) -> list[dict[str, Any]]:
        """One row per class: images, top-1 and top-5 accuracy (0..1), and the most frequent mistake."""
        images, top1, top5 = (
            np.bincount(self.labels[chosen], minlength=self.classes)
            for chosen in (slice(None), self.guesses == self.labels, self.in_top)
        )
        true, taken, counts = self.confusion()
        wrong = true != taken
        true, taken, counts = true[wrong], taken[wrong], counts[wrong]
        # the last entry of a class remains: its most frequent mistake, of equal ones the first
        order = np.lexsort((-taken, counts))
        mistaken = {int(true[i]): (int(taken[i]), int(counts[i])) for i in order}
        names = class_names(classes)
        rows = []
        for label, entry in enumerate(classes):
            other, errors = mistaken.get(label, (None, 0))
            n = images[label]
            rows.append(
                {
                    "label": label,
                    "wnid": entry["wnid"],
                    "name": names[label],
                    "images": int(n),
                    "top1": f"{top1[label] / n:.6f}" if n else "",
                    "top5": f"{top5[label] / n:.6f}" if n else "",
                    "mistaken_for": names[other] if other is not None else "",
                    "mistaken_images": errors,
                }
            )
        return rows


class _Tally:
    """Collects the scores of one network; each rank fills the rows of its images."""

    def __init__(self, count: int, classes: int, device: torch.device) -> None:
        self.classes = classes
        self.labels, self.guesses = torch.zeros(2, count, dtype=torch.int32, device=device)
        self.in_top, self.seen = torch.zeros(2, count, dtype=torch.uint8, device=device)
        self.losses = torch.zeros(count, device=device)

    def put(self, rows: slice, logp: Tensor, labels: Tensor) -> None:
        best = logp.topk(min(TOP, logp.shape[1])).indices
        self.labels[rows] = labels.int()
        self.guesses[rows] = best[:, 0].int()
        self.in_top[rows] = (best == labels[:, None]).any(1).byte()
        self.losses[rows] = -logp.gather(1, labels[:, None])[:, 0]
        self.seen[rows] += 1

    def scores(self, ranks: Ranks) -> Scores:
        arrays = (self.labels, self.guesses, self.in_top, self.losses, self.seen)
        for values in arrays:
            ranks.sum(values)  # each row is zero on all ranks except one
        labels, guesses, in_top, losses, seen = (values.cpu().numpy() for values in arrays)
        if not (seen == 1).all():
            raise RuntimeError("the ranks do not cover the data set exactly once")
        return Scores(labels, guesses, in_top.astype(bool), losses, self.classes)


@torch.inference_mode()
def score_split(
    runs: list[Run],
    reader: ShardReader,
    ranks: Ranks,
    *,
    crops: int = 1,
    batch: int = 128,
    amp: torch.dtype | None = None,
    workers: int = 1,
    progress: bool = True,
) -> list[Scores]:
    """The scores of each network on a whole split and, if there are several, of their ensemble as the last.

    The softmax is averaged over 1 or 10 crops and over the networks of the ensemble. All ranks return the same.

    Args:
        runs: the networks.
        reader: the split.
        ranks: this process's rank.
        crops: 1 or 10.
        batch: crops per batch.
        amp: the autocast type; None computes in float32.
        workers: reader processes.
        progress: whether to show a progress bar.

    Raises:
        DataError: the data set's classes or image size differ from those in training.
    """
    for run in runs:
        check_classes(run, reader.manifest, reader.split_dir)
        check_size(run, reader.manifest, reader.split_dir)
    loaders: list[Loader] = []
    loader_of: list[int] = []  # networks with the same preprocessing share a loader
    for run in runs:
        own = run.preprocess
        for number, loader in enumerate(loaders):
            other = loader.preprocess
            if own.crop == other.crop and np.array_equal(own.mean, other.mean):
                loader_of.append(number)
                break
        else:
            loader_of.append(len(loaders))
            loaders.append(
                eval_loader(
                    reader,
                    own,
                    max(1, min(batch // crops, len(reader))),
                    rank=ranks.rank,
                    world_size=ranks.world_size,
                    device="gpu" if ranks.gpu else "cpu",
                    device_id=ranks.local_rank if ranks.gpu else None,
                    threads=cpu_threads(ranks.local_world_size),
                    workers=workers,
                    ten_crops=crops == 10,
                )
            )
    several = len(runs) > 1
    tallies = [
        _Tally(len(reader), len(reader.manifest.classes), ranks.device) for _ in range(len(runs) + several)
    ]
    row = rank_slice(len(reader), ranks.rank, ranks.world_size).start
    hidden = not (progress and ranks.first)
    with tqdm(total=len(reader), desc="images", unit=" images", disable=hidden, leave=False) as bar:
        for batches in zip(*loaders, strict=True):
            labels = batches[0][1]
            rows = slice(row, row := row + len(labels))
            together: Tensor | None = None
            for run, number, tally in zip(runs, loader_of, tallies, strict=False):
                logp = log_probabilities(run.network, batches[number][0], amp)
                tally.put(rows, logp, labels)
                together = logp if together is None else torch.logaddexp(together, logp)
            if several and together is not None:
                tallies[-1].put(rows, together - math.log(len(runs)), labels)
            bar.update(len(labels) * ranks.world_size)
    for loader in loaders:
        loader.close()
    return [tally.scores(ranks) for tally in tallies]


def evaluate(ranks: Ranks, config: dict[str, Any]) -> None:
    """Run tools/evaluate.py on one rank; the first rank prints and writes the results."""
    split_dir, crops = config["split_dir"], int(config["crops"])
    reader = ShardReader(split_dir)
    runs = [load_run(path, ranks.device) for path in config["runs"]]
    found = score_split(
        runs,
        reader,
        ranks,
        crops=crops,
        batch=config["batch"],
        amp=AMP[config["amp"]],
        workers=config["workers"],
        progress=config["progress"],
    )
    if not ranks.first:
        return
    networks = [str(run.path) for run in runs] + [f"average of {len(runs)}"] * (len(runs) > 1)
    rows = [{"network": name, **s.overall()} for name, s in zip(networks, found, strict=True)]
    classes, last = reader.manifest.classes, found[-1]
    result = {"data": str(split_dir), "crops": crops, **last.overall(), "networks": rows}
    if config["json_path"]:
        write_text(config["json_path"], json.dumps(result, indent=1) + "\n")
    if str(config["json_path"]) != "-":
        echo(as_text(rows, split_dir, crops, min(TOP, len(classes))))
    if config["csv_path"]:
        write_text(config["csv_path"], as_csv(last.per_class(classes)))
    if config["confusion_path"]:
        from tools.lib.figures import confusion_figure, save

        save(confusion_figure(last.confusion(), classes), config["confusion_path"])


def as_text(rows: list[dict[str, Any]], split_dir: Path, crops: int, top: int) -> str:
    """The results as a table for the terminal."""
    what = "centre crop" if crops == 1 else f"{crops} crops"
    names = [printable(row["network"]) for row in rows]
    width = max(map(len, names))
    lines = [f"{rows[-1]['count']:,} images of {printable(str(split_dir))}, {what}"]
    lines.append(f"{'':{width}}     top-1     top-{top}    loss")
    for name, row in zip(names, rows, strict=True):
        lines.append(f"{name:{width}} {row['top1']:9.2%} {row['top5']:9.2%} {row['loss']:7.4f}")
    return "\n".join(lines)


def as_csv(rows: list[dict[str, Any]]) -> str:
    """`Scores.per_class` as CSV."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: cell(v) if isinstance(v, str) else v for k, v in row.items()})
    return table.getvalue()
