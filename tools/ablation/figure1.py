"""The paper's figure 1: epochs that four-layer networks need to reach 25 % training error on CIFAR-10."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from base.errors import ModelError
from pipeline.shards import MANIFEST, ShardReader
from tools.ablation.claims import spread
from tools.ablation.jobs import ROOT, Job, Race, Workers, read_json
from tools.lib.cli import write_text

TARGET = 0.25  # training error to reach


def cifar_shards(source: Path, out: Path) -> Path:
    """`source` if it holds shards, else lossless shards built from it in OUT/cifar.

    Raises ModelError if OUT/cifar was built from another source: finished runs may have been trained on it.
    """
    if (source / "train" / MANIFEST).exists():
        return source
    data = out / "cifar"
    try:
        stat = source.stat()
    except OSError as error:
        raise ModelError(f"cannot read {source}: {error.strerror}; give CIFAR-10") from None
    identity = {"path": str(source.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if (data / "val" / MANIFEST).exists():
        if read_json(data / "source.json") != identity:
            raise ModelError(
                f"{data} was built from another version of {source}: give another --out, or --figure1 {data}"
            )
        return data
    write_text(data / "source.json", json.dumps(identity) + "\n")
    command = [sys.executable, str(ROOT / "tools/build_lmdb.py"), str(source), str(data)]
    if subprocess.run([*command, "--size", "32", "--encoding", "raw", "--overwrite"]).returncode:
        raise ModelError(f"cannot build shards from {source}: give CIFAR-10's archive or class folders")
    return data


def figure1(
    data: Path,
    out: Path,
    activations: list[str],
    rates: list[str],
    seeds: int,
    max_epochs: int,
    extra: list[str],
    workers: Workers,
) -> tuple[list[Job], dict[str, Any]]:
    """Epochs to 25 % training error for each activation, at the learning rate that gets there first with seed 0.

    Trains the author's network for CIFAR-10 with its initial weights and bias learning rate, at a constant rate,
    without augmentation or regularisation. The error is the running training error of an epoch. A rate is given up
    once it has taken more epochs than another.
    """
    size = ShardReader(data / "train").manifest.size
    options = [
        "--data",
        str(data.resolve()),
        "--variant",
        "cifar-18pct",
        "--bias-lr",
        "2",
        "--crop",
        str(size),
        "--train-error",
    ]
    options += ["--augment", "none", "--color-std", "0", "--weight-decay", "0", "--dropout", "0"]
    options += ["--schedule", "plateau", "--patience", "100000", *extra]  # the rate stays constant
    folder = out / "figure1"

    def run(activation: str, rate: str, seed: int, race: Race) -> Job:
        where = folder / f"{activation}-lr-{rate}" / f"seed-{seed}"
        own = ["--activation", activation, "--lr", rate, "--epochs", str(max_epochs)]
        return Job(f"{activation} at {rate}", seed, where, [*options, *own], race)

    races = {activation: Race(TARGET, max_epochs) for activation in activations}
    trials = {(a, r): run(a, r, 0, races[a]) for a, r in itertools.product(activations, rates)}
    workers.work(list(trials.values()), "figure 1: rates")
    best: dict[str, str] = {}
    for activation in activations:
        learnt = [rate for rate in rates if "failed" not in trials[activation, rate].result]
        if not learnt:
            raise ModelError(f"{activation} fails at each rate of {', '.join(rates)}: give other --lrs")
        best[activation] = min(
            learnt,
            key=lambda rate: (  # if none reached the target, the lowest error
                trials[activation, rate].reached() or math.inf,
                min(trials[activation, rate].result["train_errors"], default=1.0),
            ),
        )
    others = [run(a, best[a], s, Race(TARGET, max_epochs)) for s in range(1, seeds) for a in activations]
    workers.work(others, "figure 1: other seeds")

    rows = []
    for activation in activations:
        name = f"{activation} at {best[activation]}"
        runs = [trials[activation, best[activation]], *(other for other in others if other.name == name)]
        runs = [job for job in runs if "failed" not in job.result]
        epochs = [job.reached() for job in runs]
        rows.append(
            {
                "activation": activation,
                "lr": best[activation],
                "at_edge": len(rates) > 1
                and float(best[activation]) in (min(map(float, rates)), max(map(float, rates))),
                "trials": {
                    rate: {
                        "epochs": trials[activation, rate].reached(),
                        "tried": len(trials[activation, rate].result.get("train_errors", [])),
                    }
                    for rate in rates
                },
                "seeds": len(runs),
                "epochs": spread([e for e in epochs if e is not None]),
                "not_reached": epochs.count(None),
                "curves": [job.result["train_errors"] for job in runs],
            }
        )
    return [*trials.values(), *others], {"rows": rows, "target": TARGET, "max_epochs": max_epochs}
