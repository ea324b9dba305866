"""Every stage of the main job against the machine's own limit and against what a user would pick instead."""

from __future__ import annotations

from pathlib import Path

import click

from tools.lib import cli

STAGES = ("build", "read", "load", "lrn", "step", "train", "ranks", "scale", "peers")
LONG = ("scale", "peers")  # 240,000 images, 5 GB of them; loaders in an environment of their own


@click.command(
    context_settings=cli.CONTEXT,
    epilog=cli.examples(
        "python tools/benchmark.py --stage load --stage train --json rates.json",
        "python tools/benchmark.py photographs/ --stage peers --peers-python .venv-peers/bin/python",
    ),
)
@click.argument("photographs", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--stage",
    "stages",
    type=click.Choice(STAGES),
    multiple=True,
    default=[stage for stage in STAGES if stage not in LONG],
    show_default="all but scale, which builds 5 GB, and peers",
    help="Measure only this; may be given again.",
)
@cli.option("--rounds", type=click.IntRange(1), default=3, help="Turns of which the median is reported.")
@cli.option("--batch", type=click.IntRange(2), default=128, help="Images in a batch.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=None,
    show_default="cores",
    help="Worker processes of the build.",
)
@cli.file_option("--json", "Write the rows as JSON too.")
@click.option("--cpu", is_flag=True, help="Measure on the CPU even where there is a GPU.")
@cli.option(
    "--peers-python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    show_default="the one of .venv-peers, which `make bench-peers` makes, else this one",
    help="The Python interpreter that runs the other loaders of the stage peers.",
)
def main(
    photographs: Path | None,
    stages: tuple[str, ...],
    rounds: int,
    batch: int,
    workers: int | None,
    json_path: Path | None,
    cpu: bool,
    peers_python: Path | None,
) -> None:
    """Measure each stage on PHOTOGRAPHS, class folders in train/ (and val/), on the device that is here.

    Without PHOTOGRAPHS: the demo's tiles. Prints a Markdown table; ratios were taken in turns in this run.
    """
    from tools.bench.stages import measure

    chosen = [stage for stage in STAGES if stage in stages]
    measure(photographs, chosen, rounds, batch, workers, json_path, cpu, peers_python)


if __name__ == "__main__":
    main()
