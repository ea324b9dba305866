"""The claims: the options of train.py that are compared with the baseline, and the results."""

from __future__ import annotations

import json
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import ModelError
from model.training.config import checkpoint_paths
from tools.ablation.jobs import Job, Workers, read_json
from tools.lib.cli import write_text

BASELINE = "baseline"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Args:
        says: the subject, with the paper's section.
        runs: name -> options of train.py, of the runs that are compared with the baseline.
        paper: the paper's result, as changes of the top-1 / top-5 error in percentage points.
        train: whether the claim is about the training error, which is then evaluated too.
    """

    says: str
    runs: dict[str, list[str]]
    paper: str
    train: bool = False


CLAIMS = {
    "activation": Claim(
        "ReLU (3.1)",
        {"tanh": ["--activation", "tanh"], "sigmoid": ["--activation", "sigmoid"]},
        "several times slower (figure 1)",
    ),
    "init": Claim(
        "initial weights (5)",
        {
            "init-cuda-convnet2": ["--init", "cuda-convnet2", "--bias-lr", "2"],
            "init-paper": ["--init", "paper"],
            "init-he": ["--init", "he"],
        },
        "N(0, 0.01), biases of 1",
    ),
    "groups": Claim(
        "two towers (3.2)", {"groups-1": ["--groups", "1"]}, "+1.7 / +1.2, but of half as many kernels"
    ),
    "lrn": Claim("response normalisation (3.3)", {"no-lrn": ["--no-lrn"]}, "+1.4 / +1.2"),
    "pool": Claim("overlapping pooling (3.4)", {"pool-2-2": ["--pool", "2,2"]}, "+0.4 / +0.3"),
    "augment": Claim(
        "crops and flips (4.1)",
        {f"augment-{how}": ["--augment", how] for how in ("none", "flip", "crop")},
        "substantial overfitting",
        train=True,
    ),
    "color": Claim("PCA colour (4.1)", {"color-0": ["--color-std", "0"]}, "more than +1 (top-1)"),
    "dropout": Claim(
        "dropout (4.2)",
        {"dropout-0": ["--dropout", "0"]},
        "substantial overfitting, half the steps",
        train=True,
    ),
    "depth": Claim(
        "depth (1, 7)",
        {f"without-conv{n}": ["--drop-layer", f"conv{n}"] for n in (3, 4)},
        "about +2 (top-1)",
    ),
    "weight-decay": Claim(
        "weight decay lowers the training error (5)",
        {"weight-decay-0": ["--weight-decay", "0"]},
        "higher training error",
        train=True,
    ),
    "mean": Claim(
        "mean image (2)", {f"mean-{mode}": ["--mean", mode] for mode in ("channel", "none")}, "no figure"
    ),
    "recipes": Claim(
        "recipes/*.json",
        {f"recipe-{name}": ["--recipe", name] for name in ("owt", "bn-large-batch", "modern")},
        "not in the paper",
    ),
}
EVALUATED = ("crops", "ensemble")  # claims about the baseline's networks, which need no further runs


def planned(
    claims: list[str], out: Path, data: Path, options: list[str], seeds: int, only: set[str]
) -> list[Job]:
    """The jobs of the baseline and of each claim.

    Seed by seed, so that an interrupted ablation has complete results for fewer seeds.
    """
    switches: dict[str, tuple[list[str], bool]] = {
        BASELINE: ([], any(CLAIMS[c].train for c in claims if c in CLAIMS))
    }
    for claim in claims:
        if claim in CLAIMS:
            runs = CLAIMS[claim].runs
            switches |= {n: (a, CLAIMS[claim].train) for n, a in runs.items() if not only or n in only}
    return [
        Job(name, seed, out / name / f"seed-{seed}", [*options, *own], train_split=data if train else None)
        for seed in range(seeds)
        for name, (own, train) in switches.items()
    ]


def summarise(claims: list[str], runs: list[Job]) -> list[dict[str, Any]]:
    """One row for each run: errors in %, and differences from the baseline's of the same seed, in points."""
    done = {(run.name, run.seed): run.result for run in runs if run.result and "failed" not in run.result}
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        seeds = sorted(seed for (n, seed) in done if n == name)
        claim = next((c for c in claims if c in CLAIMS and name in CLAIMS[c].runs), None)
        row: dict[str, Any] = {"run": name, "claim": claim, "seeds": seeds}
        if claim:
            row |= {
                "switch": shlex.join(CLAIMS[claim].runs[name]),
                "says": CLAIMS[claim].says,
                "paper": CLAIMS[claim].paper,
            }
        pairs = [seed for seed in seeds if (BASELINE, seed) in done]
        for key, of in (
            ("top1", lambda r: 100 * (1 - r["top1"][-1])),
            ("top5", lambda r: 100 * (1 - r["top5"][-1])),
            ("train", lambda r: 100 * (1 - r["train_top1"]) if "train_top1" in r else None),
        ):
            values = [value for seed in seeds if (value := of(done[name, seed])) is not None]
            row[key] = spread(values)
            if claim:
                both = [(of(done[name, seed]), of(done[BASELINE, seed])) for seed in pairs]
                row[f"{key}_difference"] = spread([a - b for a, b in both if a is not None and b is not None])
        steps = [
            result["steps_to_learn"] for seed in seeds if "steps_to_learn" in (result := done[name, seed])
        ]
        row["steps_to_learn"] = spread([float(n) for n in steps if n is not None])
        row["never_learnt"] = sum(n is None for n in steps)
        rows.append(row)
    return rows


def spread(values: list[float]) -> dict[str, Any] | None:
    """Mean and sample standard deviation over seeds, and the values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": values}


def evaluate_baseline(
    claims: list[str], runs: list[Job], data: Path, workers: Workers, out: Path
) -> list[dict[str, Any]]:
    """Evaluate the baseline's networks with ten crops and as ensembles; no rows if all its runs failed."""
    networks = [
        checkpoint_paths(run.out)[0]
        for run in runs
        if run.name == BASELINE and run.result and "failed" not in run.result
    ]
    if not networks:
        return []
    evaluated = [[str(network), network.stat().st_size, network.stat().st_mtime_ns] for network in networks]
    rows = []
    for crops in (1, 10) if "crops" in claims else (1,):
        path = out / f"evaluated-{crops}.json"
        arguments = [*map(str, networks), "--data", str(data), "--crops", str(crops), "--json", str(path)]
        result = read_json(path)
        if not result or result.get("judged") != evaluated:
            code, error = workers.call(
                "tools/evaluate.py", [*arguments, "--no-progress", "--workers", "0"], 0
            )
            workers.check_stopped()
            if code:
                raise ModelError(f"cannot evaluate the baseline: {error}")
            result = {**json.loads(path.read_text()), "judged": evaluated}
            write_text(path, json.dumps(result, indent=1) + "\n")
        single = result["networks"][: len(networks)]
        row = {"crops": crops, "networks": len(networks), "count": result["count"]}
        for key in ("top1", "top5"):
            row[key] = spread([100 * (1 - network[key]) for network in single])
            row[f"{key}_average"] = 100 * (1 - result[key])
        rows.append(row)
    return rows
