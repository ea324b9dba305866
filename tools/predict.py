"""Classify photographs: python tools/predict.py RUN IMAGE...|FOLDER|-"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from base.errors import DataError
from tools.lib import cli

SHEET = 48  # images on a contact sheet; more would be too small to read


@click.command(
    context_settings=cli.CONTEXT,
    epilog=cli.examples(
        "python tools/predict.py runs/paper photo.jpg holiday/ --sheet sheet.png",
        "find . -name '*.jpg' -print0 | python tools/predict.py runs/paper - --json guesses.json",
    ),
)
@cli.run_argument()
@click.argument("images", metavar="IMAGE...|FOLDER|-", nargs=-1, required=True)
@cli.option("--top", type=click.IntRange(1), default=cli.TOP, help="Number of guesses per image.")
@cli.file_option("--json", "Write the results as JSON; - is standard output.")
@cli.file_option("--sheet", f"Write a contact sheet of the first {SHEET} images, like the paper's figure 4.")
@cli.option(
    "--neighbours",
    type=click.Path(path_type=Path),
    default=None,
    show_default="none",
    help="Also find the most similar images in this data set, by their fc7 activations.",
)
@cli.option(
    "--split",
    type=click.Choice(["train", "val"]),
    default="train",
    help="Split of --neighbours to search.",
)
@cli.device_option()
@cli.workers_option("--neighbours")
@cli.progress_option()
def main(
    run: Path,
    images: tuple[str, ...],
    top: int,
    json_path: Path | None,
    sheet_path: Path | None,
    neighbours: Path | None,
    split: str,
    gpus: int | None,
    workers: int,
    progress: bool,
) -> None:
    """Classify photographs with RUN, a folder that train.py wrote or a checkpoint.

    Photographs are JPEG, PNG, GIF, BMP or WebP files of any size, folders, or - to read paths from standard input,
    one per line or separated by NUL. They are preprocessed exactly as in training. For each image that cannot be
    read, a line is printed and the exit code is 1; the other images are still classified. In folders, all files are
    tried, and those that are not images are counted.
    """
    from pipeline.shards import ShardReader
    from tools.lib import runs, samples

    device = runs.one_device(gpus)
    trained = runs.load_run(run, device)
    reader = ShardReader(neighbours / split) if neighbours else None
    if reader:
        runs.check_size(trained, reader.manifest, reader.split_dir)
    photographs = list(samples.find_images(images))
    predictions, features, failed, others = samples.predict_all(
        trained,
        photographs,
        device,
        top=top,
        keep=SHEET if sheet_path else 0,
        features=reader is not None,
        progress=progress,
    )
    if not predictions and not failed:
        where = ", ".join("the paths on standard input" if n == "-" else cli.printable(n) for n in images)
        raise DataError(f"no images in {where}: give image files or folders with images")
    if reader and predictions:
        found = samples.nearest(trained, features, reader, device, workers=workers, progress=progress)
        for prediction, near in zip(predictions, found, strict=True):
            prediction.neighbours = near

    try:
        if str(json_path) != "-":
            names = trained.names
            for prediction in predictions:
                cli.echo(samples.as_text(prediction, names))
    finally:  # also if `| head` has read enough of the lines
        if json_path:
            listed = [samples.as_json(p, trained) for p in predictions] + failed
            cli.write_text(json_path, json.dumps(listed, indent=1) + "\n")
        if sheet_path and predictions:
            from tools.lib.figures import save, sheet

            save(sheet(predictions[:SHEET], trained.classes, reader), sheet_path)
    if others:
        cli.echo(f"{others:,} other files in the folders are not images", err=True)
    if failed:
        cli.echo(f"{len(failed)} of {len(predictions) + len(failed)} images could not be read", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
