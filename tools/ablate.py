"""The paper's claims, one switch each: python tools/ablate.py DATA --claims lrn,pool -- options of train.py.

Each run is an ordinary `train.py` run in OUT/NAME/seed-S. What is finished is not run again, what was stopped goes
on with --resume, so the same command picks up where it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from base.errors import ModelError
from model.alexnet import ACTIVATIONS
from model.parallel.ranks import count_gpus
from pipeline.shards import ShardReader
from tools.ablation.claims import BASELINE, CLAIMS, EVALUATED, evaluate_baseline, planned, summarise
from tools.ablation.figure1 import cifar_shards, figure1
from tools.ablation.jobs import Workers, locked
from tools.ablation.report import curves_figure, figure1_figure, report
from tools.lib.cli import CONTEXT, option
from tools.lib.figures import save


@click.command(context_settings=CONTEXT)
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- TRAIN.PY'S OPTIONS]")
@option("--out", type=click.Path(path_type=Path), default=Path("runs/ablate"), help="All runs and the table.")
@option("--claims", default="all", help=f"Of {', '.join([*CLAIMS, *EVALUATED])}, with commas between.")
@option("--only", default="", help="Of the claims' runs, only these (names as in the table, commas between).")
@option("--seeds", type=click.IntRange(1), default=3)
@option("--epochs", type=click.IntRange(1), default=90)
@option("--jobs", type=click.IntRange(1), default=None, show_default="one a GPU; 1 on the CPU")
@option("--gpus", type=click.IntRange(0), default=None, show_default="all there are", help="0: the CPU.")
@option(
    "--threads", type=click.IntRange(1), default=None, show_default="a share of the cores", help="A job's."
)
@option(
    "--figure1", type=click.Path(path_type=Path), default=None, help="CIFAR-10: archive, folders or shards."
)
@option("--activations", default="relu,tanh", help="Of figure 1, with commas between.")
@option(
    "--lrs", default="0.0003,0.001,0.003,0.01", help="Learning rates that figure 1 tries for each activation."
)
@option("--tune-epochs", type=click.IntRange(1), default=2, help="Figure 1: of each rate's trial.")
@option("--max-epochs", type=click.IntRange(1), default=60, help="Figure 1: after which it is given up.")
def main(**config: Any) -> None:
    """Run the paper's claims on DATA over several seeds, and print how each switch changes the error.

    A claim is the baseline beside the same with one switch turned; differences are taken seed by seed. Options
    after `--` go to train.py: to the runs on DATA, or without DATA to those of figure 1. --figure1 measures the
    epochs that four-layer networks take to 25 % training error on CIFAR-10, each activation at the best of --lrs.
    Writes table.md, results.json and PNGs of the curves to --out. Run the same command again to continue after an
    interruption; finished runs stay.
    """
    out: Path = config["out"]
    if str(config["data"]).startswith("-"):  # the first option after `--`, where there is no DATA
        config["extra"], config["data"] = (str(config["data"]), *config["extra"]), None
    if config["data"] is None and config["figure1"] is None:
        raise click.UsageError("give DATA, or --figure1 CIFAR-10, or both")
    gpus = count_gpus(config["gpus"])
    jobs = config["jobs"] or max(1, gpus)
    claims = chosen_claims(config["claims"])
    runs_of = [name for claim in claims if claim in CLAIMS for name in CLAIMS[claim].runs]
    only = chosen(config["only"], "run of these claims", [BASELINE, *runs_of])
    activations = chosen(config["activations"], "activation", ACTIVATIONS)
    rates = [rate.strip() for rate in config["lrs"].split(",")]
    if config["data"] is not None:
        for split in ("train", "val"):
            ShardReader(config["data"] / split).close()
    parts: dict[str, Any] = {}
    failed: list[str] = []
    with locked(out) as lock, Workers(jobs, gpus, config["threads"], lock) as workers:
        try:
            if config["data"] is not None:
                options = [
                    "--data",
                    str(config["data"].resolve()),
                    "--epochs",
                    str(config["epochs"]),
                    *config["extra"],
                ]
                runs = planned(claims, out, config["data"], options, config["seeds"], set(only))
                workers.work(runs, "claims")
                failed += [f"{run.title}: {run.result['failed']}" for run in runs if "failed" in run.result]
                parts["claims"] = summarise(claims, runs)
                if any(run.result.get("top1") for run in runs):
                    save(curves_figure(runs), out / "curves.png")
                if set(EVALUATED) & set(claims):
                    parts["evaluated"] = evaluate_baseline(claims, runs, config["data"], workers, out)
            if config["figure1"] is not None:
                data = cifar_shards(config["figure1"], out)
                runs, parts["figure1"] = figure1(
                    data,
                    out,
                    activations,
                    rates,
                    config["seeds"],
                    config["tune_epochs"],
                    config["max_epochs"],
                    list(config["extra"]) if config["data"] is None else [],
                    workers,
                )
                failed += [f"{run.title}: {run.result['failed']}" for run in runs if "failed" in run.result]
                save(figure1_figure(parts["figure1"]), out / "figure1.png")
        finally:  # whatever ends it early: what has been found is kept
            if parts:
                report(parts, failed, out)
    if failed:
        raise ModelError(f"{len(failed)} runs failed, and the table is without them: see above")


def chosen_claims(text: str) -> list[str]:
    known = [*CLAIMS, *EVALUATED]
    return known if text.strip() == "all" else chosen(text, "claim", known)


def chosen(text: str, kind: str, known: Iterable[str]) -> list[str]:
    """The names in `text`, commas between; raises UsageError for one that is not known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"no {kind} {', '.join(unknown)}: choose of {', '.join(known)}")
    return names


if __name__ == "__main__":
    main()
