"""The table and the curves of an ablation."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure

from tools.ablation.jobs import Job
from tools.lib.cli import write_text
from tools.lib.figures import COLORS, new_figure


def report(parts: dict[str, Any], failed: list[str], out: Path) -> None:
    """Write and print the table, and list the runs that failed."""
    parts["command"] = shlex.join(["python", "tools/ablate.py", *sys.argv[1:]])
    write_text(out / "results.json", json.dumps(parts, indent=1) + "\n")
    table = as_markdown(parts)
    write_text(out / "table.md", table)
    click.echo(table, nl=False)
    click.echo(f"\nwrote table.md, results.json and the curves to {out}")
    for line in failed:
        click.echo(f"failed: {line}", err=True)


def format_spread(value: dict[str, Any] | None, sign: str = "", digits: int = 1) -> str:
    """Format a mean and its standard deviation: "+1.4 ± 0.3"."""
    if value is None:
        return "–"
    return f"{value['mean']:{sign}.{digits}f}" + (
        "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    )


def as_markdown(parts: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    lines: list[str] = []
    if "claims" in parts:
        lines += [
            "Validation error in % after the last epoch, and training error (centre crop, no dropout) for claims",
            "about it; mean ± standard deviation over seeds. Changes from the baseline, seed by seed, in points.",
            "Learns after: steps until the training loss stays below 0.95 of the entropy of the labels.",
            "",
            "| run | switch | about | top-1 | change | top-5 | change | training | change | learns after "
            "| paper | seeds |",
            "|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|--:|",
        ]
        for row in parts["claims"]:
            switch = f"`{row['switch']}`" if row["claim"] else "none"
            cells = [row["run"], switch, row.get("says", "")]
            for key in ("top1", "top5", "train"):
                cells += [format_spread(row[key]), format_spread(row.get(f"{key}_difference"), "+")]
            never = f", {row['never_learnt']} never" if row["never_learnt"] else ""
            cells.append(format_spread(row["steps_to_learn"], digits=0) + never)
            lines.append("| " + " | ".join([*cells, row.get("paper", ""), str(len(row["seeds"]))]) + " |")
        lines.append("")
    if parts.get("evaluated"):
        lines += [
            "| the baseline's networks | top-1 error, each | averaged | top-5 error, each | averaged |",
            "|---|--:|--:|--:|--:|",
        ]
        for row in parts["evaluated"]:
            what = f"{row['networks']} networks, {'centre crop' if row['crops'] == 1 else 'ten crops'}"
            cells = [what, format_spread(row["top1"]), f"{row['top1_average']:.1f}"]
            lines.append(
                "| " + " | ".join([*cells, format_spread(row["top5"]), f"{row['top5_average']:.1f}"]) + " |"
            )
        lines += [
            "",
            "Paper: top-5 error 18.2 % of one network, 16.4 % of five, 15.3 % of seven (two pretrained).",
            "",
        ]
    if "figure1" in parts:
        figure = parts["figure1"]
        lines += [
            f"Figure 1: epochs to {figure['target']:.0%} training error (running error of an epoch).",
            "",
            "| activation | learning rate | epochs | seeds | never reached | epochs of seed 0 at each rate |",
            "|---|--:|--:|--:|--:|---|",
        ]
        for row in figure["rows"]:
            cells = [
                row["activation"],
                row["lr"],
                format_spread(row["epochs"]),
                str(row["seeds"]),
                str(row["not_reached"]),
                ", ".join(f"{rate}: {_epochs(trial)}" for rate, trial in row["trials"].items()),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [
            f"\nThe best rate of {row['activation']} is at the edge of those tried: try more with --lrs."
            for row in figure["rows"]
            if row["at_edge"]
        ]
        by_name = {row["activation"]: row for row in figure["rows"]}
        if {"relu", "tanh"} <= by_name.keys() and by_name["relu"]["epochs"]:
            relu, tanh = by_name["relu"], by_name["tanh"]
            epochs = [figure["max_epochs"]] * tanh["not_reached"]
            epochs += tanh["epochs"]["values"] if tanh["epochs"] else []
            if epochs and not relu["not_reached"]:
                ratio = statistics.fmean(epochs) / relu["epochs"]["mean"]
                how = "more than " if tanh["not_reached"] else ""
                lines += ["", f"tanh takes {how}{ratio:.1f} times the epochs of ReLU; the paper says six."]
        lines.append("")
    return "\n".join(lines)


def _epochs(trial: dict[str, Any]) -> str:
    if trial["epochs"] is not None:
        return f"{trial['epochs']:.1f}"
    return f"more than {trial['tried']}" if trial["tried"] else "failed"


def curves_figure(runs: list[Job]) -> Figure:
    """Validation error over epochs: the mean over seeds, with their range shaded."""
    names = list(dict.fromkeys(run.name for run in runs))
    figure = new_figure(9, 5.5, "Validation error of each switch")
    axes = figure.subplots()
    for number, name in enumerate(names):
        curves = [r.result["top1"] for r in runs if r.name == name and r.result.get("top1")]
        if not curves:
            continue
        style = "-" if number < len(COLORS) else "--"
        draw(
            axes,
            [[100 * (1 - value) for value in c] for c in curves],
            name,
            COLORS[number % len(COLORS)],
            style,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 error, %")
    axes.grid()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def figure1_figure(result: dict[str, Any]) -> Figure:
    """The paper's figure 1: training error over epochs."""
    figure = new_figure(6.5, 4.5, "CIFAR-10, four-layer network")
    axes = figure.subplots()
    for number, row in enumerate(result["rows"]):
        if row["curves"]:
            name = f"{row['activation']}, rate {row['lr']}"
            curves = [[100 * error for error in curve] for curve in row["curves"]]
            draw(axes, curves, name, COLORS[number % len(COLORS)], "-")
    axes.axhline(100 * result["target"], color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xlabel("epoch")
    axes.set_ylabel("running training error, %")
    axes.grid()
    axes.legend()
    return figure


def draw(axes: Any, curves: list[list[float]], name: str, color: str, style: str) -> None:
    """Draw the mean and the range of the curves up to the length of the shortest."""
    columns = [list(column) for column in zip(*curves, strict=False)]
    epochs = range(1, 1 + len(columns))
    axes.plot(epochs, [statistics.fmean(c) for c in columns], color=color, linestyle=style, label=name)
    axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.12)
