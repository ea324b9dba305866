"""Check every byte of a data set: python tools/verify_lmdb.py DATA."""

import os
import sys
from pathlib import Path

import click
from tqdm import tqdm

from base.errors import DataError
from pipeline.build.verify import count_duplicates, verify_split
from pipeline.shards import MANIFEST, Manifest
from tools.lib.cli import echo


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("data", type=click.Path(path_type=Path), default=Path("data/imagenet"))
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Number of processes that read and decode.  [default: one per core]",
)
def main(data: Path, workers: int | None) -> None:
    """Check every checksum, record and image of DATA (with train/ and val/) or of one split (DATA/val).

    Prints one line per shard, and the keys of damaged records. The exit code is 1 if anything is damaged. Duplicate
    images are counted but are not an error: ImageNet has some.
    """
    splits = [data] if (data / MANIFEST).exists() else [data / name for name in ("train", "val")]
    splits = [split for split in splits if split.is_dir()]
    if not splits:
        Manifest.load(data / "train")  # raises the error that says how to build one
    damaged = 0
    for split in splits:
        damaged += _verify(split, workers or len(os.sched_getaffinity(0)))
    if damaged:
        echo(f"{damaged} damaged: restore those files from a copy, or build the split again.", err=True)
        sys.exit(1)


def _verify(split: Path, workers: int) -> int:
    """Check one split and print the result; return the number of damaged parts."""
    try:
        with tqdm(desc=f"{split.name}", unit=" images", leave=False) as bar:

            def progress(done: int, total: int) -> None:
                bar.total, bar.n = total, done
                bar.refresh()

            manifest, reports, problems = verify_split(split, workers, progress)
    except DataError as error:
        echo(f"{split}: {error.message}")
        return 1
    echo(
        f"{split}: {manifest.count:,} images, {len(manifest.classes)} classes, {manifest.encoding}, "
        f"{len(manifest.rejected)} rejected, {count_duplicates(reports)} duplicates"
    )
    for problem in problems:
        echo(f"  {problem}")
    width = max(len(report.name) for report in reports) if reports else 0
    for report in reports:
        state = "damaged" if report.problems else "ok"
        echo(f"  {report.name:{width}}  {report.count:8,} records  {state}")
        for problem in report.problems:
            echo(f"    {problem}")
    return len(problems) + sum(bool(report.problems) for report in reports)


if __name__ == "__main__":
    main()
