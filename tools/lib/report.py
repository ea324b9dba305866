"""The page of `show.py report`: a single HTML file."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from model.parallel.ranks import Ranks
from model.training.config import Config
from model.training.log import read_log
from model.training.watch import SHARE
from pipeline.load.plan import Plan
from pipeline.shards import ShardReader
from tools.lib.cli import printable
from tools.lib.figures import (
    batch_figure,
    confusion_figure,
    curves_figure,
    dataset_figure,
    filters_figure,
    png,
    sheet,
)
from tools.lib.runs import data_of, load_run, one_device, read_config
from tools.lib.samples import count_classes, guesses, training_batch
from tools.lib.scores import score_split


def make_report(
    run: Path, data: Path | None, *, crops: int, gpus: int | None, workers: int, progress: bool
) -> str:
    """Make the page about RUN, evaluated on `data` or on the data set it was trained on; see tools/show.py."""
    trained, log = load_run(run, one_device(gpus)), read_log(run)
    folder, data = trained.path.parent, data_of(run, data)
    readers = {split: ShardReader(data / split) for split in ("train", "val")}
    train, val = readers["train"], readers["val"]
    ranks = Ranks(gpu=next(trained.network.parameters()).is_cuda)
    (scores,) = score_split([trained], val, ranks, crops=crops, workers=workers, progress=progress)
    overall = scores.overall()
    config = read_config(folder)
    options = {**vars(Config()), "global_batch": 128, **config}
    plan = Plan(
        count=len(train),
        global_batch=min(options["global_batch"], len(train)),
        seed=options["seed"],
        size=train.manifest.size,
        crop=trained.preprocess.crop,
        augment=options["augment"],
        color_std=options["color_std"],
    )
    parameters = sum(p.numel() for p in trained.network.parameters())
    facts = {
        "network": f"{trained.variant}, {parameters:,} parameters",
        "checkpoint": f"{trained.path}, {trained.epoch} epochs complete, step {trained.step:,}",
        "top-1": f"{overall['top1']:.2%}",
        "top-5": f"{overall['top5']:.2%}",
        "loss": f"{overall['loss']:.4f}",
        "evaluated on": f"{overall['count']:,} images of {val.split_dir}, "
        + ("centre crop" if crops == 1 else f"{crops} crops"),
    }
    if stuck := next((entry for entry in log if entry["kind"] == "guessing"), None):
        facts["only guessed"] = (
            f"after {stuck['step']:,} steps the training loss was {stuck['loss']:.3f}, and always predicting "
            f"the frequencies of the classes gave {stuck['guess']:.3f}"
        )
        last = next((entry for entry in reversed(log) if entry["kind"] == "train"), stuck)
        if last["step"] > stuck["step"] and last["loss"] < SHARE * stuck["guess"]:
            facts["only guessed"] += f"; it has learnt since, to {last['loss']:.3f}"
    counts = {split: count_classes(reader, split, progress) for split, reader in readers.items()}
    classes = trained.classes
    first = training_batch(train, plan, trained.preprocess, step=0, images=8)
    pictures = {
        "Curves": curves_figure({str(folder): log}),
        "Mistakes": confusion_figure(scores.confusion(), classes),
        "Guesses": sheet(guesses(trained, val), classes),
        "Filters": filters_figure(trained.network, "each scaled by its largest weight; grey is 0"),
        "Batch": batch_figure(first, trained.preprocess, classes, f"Step 0, epoch 1: {train.split_dir}"),
        "Data set": dataset_figure(readers, counts),
    }
    return html_page(f"AlexNet: {folder}", facts, scores.per_class(classes), pictures, config)


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
    """An HTML page whose pictures are data: URIs, so that it loads no other files."""

    def text(value: object) -> str:
        return escape(printable(str(value)))

    def table(rows: list[list[Any]], head: tuple[str, ...] = (), numbers: tuple[int, ...] = ()) -> str:
        """An HTML table; the columns `numbers` are right-aligned."""
        lines = ["<tr>" + "".join(f"<th>{text(name)}</th>" for name in head) + "</tr>"] if head else []
        for row in rows:
            kinds = (' class="number"' if at in numbers else "" for at in range(len(row)))
            cells = (f"<td{kind}>{text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
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
    head = ("class", "images", "top-1", "top-5", "most often mistaken for")
    sections["Classes"] = f'<div class="classes">{table(rows, head, (1, 2, 3))}</div>'
    if config:
        options = [[name, str(value)] for name, value in config.items()]
        sections["Options"] = f"<details><summary>Options of train.py</summary>{table(options)}</details>"
    links = "".join(f'<a href="#{name.replace(" ", "-")}">{name}</a>' for name in sections)
    body = "\n".join(
        f'<h2 id="{name.replace(" ", "-")}">{name}</h2>\n{content}' for name, content in sections.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        f"<h1>{text(title)}</h1>\n<nav>{links}</nav>\n"
        f'<div class="facts">{table([list(fact) for fact in facts.items()])}</div>\n'
        f"{body}\n</body></html>\n"
    )
