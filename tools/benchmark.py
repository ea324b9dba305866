"""Measures each stage against the machine's own limit and against the usual alternative."""

from __future__ import annotations

from pathlib import Path

import click

from tools.lib import cli

STAGES = ("build", "read", "load", "lrn", "step", "train", "ranks", "scale", "peers")
LONG = (
    "scale",
    "peers",
)  # only if asked for: 240,000 images (5 GB); loaders with an environment of their own


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
    help="Measure only this stage; can be given more than once.",
)
@cli.option("--rounds", type=click.IntRange(1), default=3, help="Turns; the median is reported.")
@cli.option("--batch", type=click.IntRange(2), default=128, help="Images per batch.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=None,
    show_default="cores",
    help="Worker processes of a build.",
)
@cli.file_option("--json", "Also write the rows as JSON.")
@click.option("--cpu", is_flag=True, help="Measure on the CPU even if there is a GPU.")
@cli.option(
    "--peers-python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    show_default="that of .venv-peers (`make bench-peers`) if it exists, else this one",
    help="Python interpreter that runs the other loaders of the stage peers.",
)
@click.option(
    "--issue",
    "issue_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Print one block for an issue: the machine, the table, the JSON, and the end of FILE, the tests' output.",
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
    """Measure each stage with PHOTOGRAPHS, class folders in train/ (and val/), on this machine's GPU or CPU.

    Without PHOTOGRAPHS the demo's tiles are used. Prints a Markdown table. What is compared was measured in turns.
    """
    from tools.bench.stages import measure

    chosen = [stage for stage in STAGES if stage in stages]
    measure(photographs, chosen, rounds, batch, workers, json_path, cpu, peers_python, issue_path)


if __name__ == "__main__":
    main()
