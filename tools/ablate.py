"""Test the paper's claims, one switch at a time: python tools/ablate.py DATA --claims lrn,pool [-- OPTIONS]

Each job is an ordinary run of train.py in OUT/NAME/seed-S. Finished jobs are not run again and interrupted ones
continue with --resume, so the same command continues an interrupted ablation.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from base.errors import ModelError
from base.files import lock, make_directory
from model.training.log import writing
from tools.ablation.claims import BASELINE, CLAIMS, EVALUATED, evaluate_baseline, planned, summarise
from tools.ablation.jobs import Workers
from tools.lib import cli


@click.command(
    context_settings=cli.CONTEXT,
    epilog=cli.examples(
        "python tools/ablate.py data/imagenet --claims lrn,pool --seeds 5 -- --variant paper",
        "python tools/ablate.py --figure1 cifar-10-binary.tar.gz --activations relu,tanh",
    ),
)
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS OF TRAIN.PY]")
@cli.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/ablate"), help="Folder for runs and results."
)
@cli.option(
    "--claims",
    default="all",
    help=f"Claims to test, comma-separated: {', '.join([*CLAIMS, *EVALUATED])}.",
)
@cli.option(
    "--only",
    default="",
    show_default="all of them",
    help="Runs of these claims to do, comma-separated, by their names in the table.",
)
@cli.option("--seeds", type=click.IntRange(1), default=3, help="Number of seeds for each run.")
@cli.option("--epochs", type=click.IntRange(1), default=90, help="Epochs of each run on DATA.")
@cli.option(
    "--jobs",
    type=click.IntRange(1),
    default=None,
    show_default="the number of GPUs; 1 on the CPU",
    help="Number of runs at the same time.",
)
@cli.option(
    "--gpus",
    type=click.IntRange(0),
    default=None,
    show_default="all",
    help="Number of GPUs to use, one per run; 0 uses the CPU.",
)
@cli.option(
    "--threads",
    type=click.IntRange(1),
    default=None,
    show_default="the cores divided by --jobs",
    help="CPU threads of each run.",
)
@cli.option(
    "--figure1",
    type=click.Path(path_type=Path),
    default=None,
    show_default="off",
    help="Repeat the paper's figure 1 on this CIFAR-10: the archive, class folders or shards.",
)
@cli.option("--activations", default="relu,tanh", help="Activations for --figure1, comma-separated.")
@cli.option(
    "--lrs",
    default="0.01,0.004,0.02,0.002",
    help="Learning rates that --figure1 tries for each activation, comma-separated, the most likely first.",
)
@cli.option(
    "--max-epochs",
    type=click.IntRange(1),
    default=100,
    help="Epochs after which --figure1 gives up on a run that has not reached 25 % error.",
)
def main(**config: Any) -> None:
    """Test the paper's claims on DATA over several seeds and print how each switch changes the error.

    Each claim compares the baseline with runs that differ in one option; differences are between runs of the same
    seed. Options after `--` go to train.py, for the runs on DATA, or without DATA for those of --figure1.
    --figure1 measures how many epochs four-layer networks need to reach 25 % training error on CIFAR-10, each
    activation at the fastest of --lrs. Results are written to --out: table.md, results.json and the curves as PNG.
    To continue after an interruption, run the same command again.
    """
    from model.alexnet import ACTIVATIONS
    from model.parallel.ranks import count_gpus
    from pipeline.shards import ShardReader
    from tools.ablation.figure1 import cifar_shards, figure1
    from tools.ablation.report import curves_figure, figure1_figure, report
    from tools.lib.figures import save

    out: Path = config["out"]
    if str(config["data"]).startswith("-"):  # without DATA, the first option after `--`
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
    with writing(out):
        make_directory(out)
    taken = (
        f"another tools/ablate.py, or a run that it started, uses {out}: wait for it, or give another --out"
    )
    with (
        lock(out / ".lock", taken) as descriptor,
        Workers(jobs, gpus, config["threads"], descriptor) as workers,
    ):
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
                    config["max_epochs"],
                    list(config["extra"]) if config["data"] is None else [],
                    workers,
                )
                failed += [f"{run.title}: {run.result['failed']}" for run in runs if "failed" in run.result]
                save(figure1_figure(parts["figure1"]), out / "figure1.png")
        finally:  # keep the results so far if anything fails
            if parts:
                report(parts, failed, out)
    if failed:
        raise ModelError(f"{len(failed)} runs failed and are not in the table: see their errors above")


def chosen_claims(text: str) -> list[str]:
    known = [*CLAIMS, *EVALUATED]
    return known if text.strip() == "all" else chosen(text, "claim", known)


def chosen(text: str, kind: str, known: Iterable[str]) -> list[str]:
    """Split comma-separated names; raises BadParameter for a name that is not in `known`."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"no {kind} {', '.join(unknown)}: choose from {', '.join(known)}")
    return names


if __name__ == "__main__":
    main()
