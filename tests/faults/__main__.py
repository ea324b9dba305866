"""Break the program on purpose and count what it loses: `make faults`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from faults.scenarios import SCENARIOS, inject


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--only", multiple=True, type=click.Choice(list(SCENARIOS)), help="This scenario (repeat for more)."
)
@click.option("--tries", type=click.IntRange(1), help="Faults a scenario.  [default: each one's own]")
@click.option(
    "--corpus", "corpora", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of images to begin from (hostile-images).",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the faults.")
def main(only: tuple[str, ...], tries: int | None, corpora: tuple[Path, ...], seed: int) -> None:
    """Inject faults into builds and trainings and print what was kept: exit code 1 if anything was lost.

    Kills, signals, full disks, damaged files, hostile images. Everything happens in temporary folders. Small
    disks are mounted and /dev/shm is replaced where that is permitted (root), else those scenarios are skipped.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the processes and the disks
    click.echo(f"{'scenario':16} {'tries':>7} {'passed':>7} {'seconds':>8}  ")
    failed = False
    for name in only or SCENARIOS:
        result = inject(name, tries, seed, corpora)
        failed |= result.passed < result.tries
        click.echo(f"{name:16} {result.tries:7,} {result.passed:7,} {result.seconds:8.1f}  {result.note}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
