"""Command line of the fault injection: `make faults`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from faults.scenarios import SCENARIOS, inject


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(SCENARIOS)),
    help="Run only this scenario; can be repeated.",
)
@click.option(
    "--tries",
    type=click.IntRange(1),
    help="Number of faults per scenario.  [default: depends on the scenario]",
)
@click.option(
    "--corpus", "corpora", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of images to mutate in hostile-images; can be repeated.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed.")
def main(only: tuple[str, ...], tries: int | None, corpora: tuple[Path, ...], seed: int) -> None:
    """Inject faults into builds and trainings, and print what passed. The exit code is 1 if anything was lost.

    The faults are kills, signals, full disks, damaged files and hostile images, all in temporary folders. Some
    scenarios mount small disks or replace /dev/shm; they are skipped if that is not permitted (it needs root).
    """
    # exit normally, to end processes and unmount disks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
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
