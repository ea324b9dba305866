"""Benchmark each stage against the machine's limit and against common alternatives."""

from __future__ import annotations

from pathlib import Path

import click

from tools.lib import cli

STAGES = ("build", "read", "load", "lrn", "step", "layers", "train", "ranks", "scale", "peers")
LONG = ("scale", "peers")  # only on request: 240,000 images (5 GB); loaders from another environment


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
    help="Stage to measure; may be repeated.",
)
@cli.option("--rounds", type=click.IntRange(1), default=3, help="Number of rounds; the median is reported.")
@cli.option("--batch", type=click.IntRange(2), default=128, help="Images per batch.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=None,
    show_default="the number of cores",
    help="Worker processes for the build.",
)
@cli.file_option("--json", "Also write the results as JSON.")
@click.option("--cpu", is_flag=True, help="Measure on the CPU even if there is a GPU.")
@cli.option(
    "--peers-python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    show_default="that of .venv-peers, which `make bench-peers` creates, else this one",
    help="Python interpreter for the other loaders in the stage peers.",
)
@click.option(
    "--issue",
    "issue_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Print one block for an issue: machine, table, JSON, and the end of FILE, the tests' output.",
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
    issue_path: Path | None,
) -> None:
    """Measure each stage on PHOTOGRAPHS, class folders in train/ and optionally val/, on the GPU or the CPU.

    Without PHOTOGRAPHS, the tiles of tools/demo.py are used. Prints a Markdown table. Compared variants are
    measured alternately.
    """
    from tools.bench.stages import measure

    chosen = [stage for stage in STAGES if stage in stages]
    measure(photographs, chosen, rounds, batch, workers, json_path, cpu, peers_python, issue_path)


if __name__ == "__main__":
    main()
