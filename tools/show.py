"""Pictures of data sets, networks and runs: python tools/show.py batch|filters|curves|dataset|report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tools.lib import cli

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_REJECTED = 10


@click.group(
    context_settings=cli.CONTEXT,
    epilog=cli.examples(
        "python tools/show.py curves runs/a runs/b --out curves.png",
        "python tools/show.py report runs/paper --crops 10",
    ),
)
def main() -> None:
    """Draw pictures of data sets, networks and runs."""


def save(figure: Figure, out: Path) -> None:
    from tools.lib import figures

    figures.save(figure, out)
    cli.echo(f"wrote {cli.printable(str(out))}")


@main.command(
    epilog=cli.examples(
        "python tools/show.py batch data/imagenet --images 8",
        "python tools/show.py batch data/cifar --crop 24 --mean channel --step 500",
    )
)
@click.argument("data", type=click.Path(path_type=Path))
@cli.out_option("batch.png")
@cli.option("--images", type=click.IntRange(1, 64), default=12, help="Number of images to draw.")
@cli.option("--step", type=click.IntRange(0), default=0, help="Training step, counted from 0.")
@cli.train_option("global_batch", "Images per step; at most those in DATA/train.", default=128)
@cli.train_option("seed", "Seed of the run.")
@cli.train_option("crop", "Height and width of the network's input in pixels.")
@cli.train_option(
    "mean",
    "What to subtract: the mean image, each channel's mean, ImageNet's channel means, or nothing.",
    default="pixel",
)
@cli.train_option("augment", "Random augmentation: crops and flips, only one of them, or none.")
@cli.train_option("color_std", "Standard deviation of the PCA colour shift; 0 disables it.")
def batch(
    data: Path,
    out: Path,
    images: int,
    step: int,
    global_batch: int,
    seed: int,
    crop: int,
    mean: str,
    augment: str,
    color_std: float,
) -> None:
    """Draw the images of one training step on DATA/train.

    With the options of a run, these are exactly the images, crops, flips and colours of that step. Each image is
    drawn as stored, with its crop; after augmentation; and as the network's input, minus the mean (grey is 0).
    """
    from pipeline.load.plan import Plan
    from pipeline.preprocess import Preprocess
    from pipeline.shards import ShardReader
    from tools.lib.figures import batch_figure
    from tools.lib.samples import training_batch

    reader = ShardReader(data / "train")
    plan = Plan(
        count=len(reader),
        global_batch=min(global_batch, len(reader)),
        seed=seed,
        size=reader.manifest.size,
        crop=crop,
        augment=augment,
        color_std=color_std,
    )
    preprocess = Preprocess.load(data / "train", crop, mean)
    shown = training_batch(reader, plan, preprocess, step, images)
    title = f"Step {step}, epoch {shown.epoch + 1}: {reader.split_dir}"
    save(batch_figure(shown, preprocess, reader.manifest.classes, title), out)


@main.command(
    epilog=cli.examples(
        "python tools/show.py filters runs/paper",
        "python tools/show.py filters runs/paper/checkpoint-000500000.pt --out filters.svg",
    )
)
@cli.run_argument()
@cli.out_option("filters.png")
def filters(run: Path, out: Path) -> None:
    """Draw the filters of RUN's first layer, as in the paper's figure 3.

    Each filter is scaled by its largest weight; grey is 0. In the paper's network, the upper half belongs to the
    first tower and the lower half to the second.
    """
    from tools.lib.figures import filters_figure
    from tools.lib.runs import load_run

    trained = load_run(run)
    save(filters_figure(trained.network, trained.title), out)


@main.command(
    epilog=cli.examples(
        "python tools/show.py curves runs/paper",
        "python tools/show.py curves runs/a runs/b --out compare.pdf",
    )
)
@cli.run_argument(metavar="RUN...", nargs=-1, required=True)
@cli.out_option("curves.png")
def curves(run: tuple[Path, ...], out: Path) -> None:
    """Draw the loss, accuracy, learning rate and speed of one or several RUNs over epochs."""
    from model.training.log import read_log
    from tools.lib.figures import curves_figure

    save(curves_figure({str(folder): read_log(folder) for folder in run}), out)


@main.command(
    epilog=cli.examples(
        "python tools/show.py dataset data/imagenet",
        "python tools/show.py dataset data/flowers --out flowers.png --no-progress",
    )
)
@click.argument("data", type=click.Path(path_type=Path))
@cli.out_option("dataset.png")
@cli.progress_option()
def dataset(data: Path, out: Path, progress: bool) -> None:
    """Draw the contents of DATA: images per class, rejected files, mean image and principal axes of colour."""
    from pipeline.shards import ShardReader
    from tools.lib.figures import dataset_figure
    from tools.lib.samples import count_classes

    splits = {s: data / s for s in ("train", "val") if (data / s).exists()} or {"train": data / "train"}
    readers = {split: ShardReader(folder) for split, folder in splits.items()}
    counts = {split: count_classes(reader, split, progress) for split, reader in readers.items()}
    for split, reader in readers.items():
        manifest, sizes = reader.manifest, counts[split]
        cli.echo(
            f"{split}: {manifest.count:,} images of {len(manifest.classes):,} classes ({sizes.min():,} to "
            f"{sizes.max():,} per class), {manifest.encoding}, {len(manifest.shards):,} shards, "
            f"{len(manifest.rejected):,} files rejected"
        )
        for entry in manifest.rejected[:SHOWN_REJECTED]:
            cli.echo(cli.printable(f"  rejected {entry['source']}: {entry['reason']}"))
        if len(manifest.rejected) > SHOWN_REJECTED:
            more = len(manifest.rejected) - SHOWN_REJECTED
            cli.echo(cli.printable(f"  and {more:,} more, all in {reader.split_dir}/manifest.json"))
    save(dataset_figure(readers, counts), out)


@main.command(
    epilog=cli.examples(
        "python tools/show.py report runs/paper",
        "python tools/show.py report runs/paper --data data/imagenet --crops 10 --out paper.html",
    )
)
@cli.run_argument()
@cli.data_option("Data set to evaluate on and to draw.")
@cli.out_option("report.html")
@cli.option(
    "--crops",
    type=click.Choice(["1", "10"]),
    default="1",
    help="Crops of each image in the evaluation: the centre, or the paper's ten.",
)
@cli.device_option()
@cli.workers_option()
@cli.progress_option()
def report(
    run: Path, data: Path | None, out: Path, crops: str, gpus: int | None, workers: int, progress: bool
) -> None:
    """Write an HTML page about RUN: curves, evaluation on DATA/val, predictions, filters, a batch and the data set.

    The page contains its pictures, so it is a single file.
    """
    from tools.lib.report import make_report

    page = make_report(run, data, crops=int(crops), gpus=gpus, workers=workers, progress=progress)
    cli.write_text(out, page)
    cli.echo(f"wrote {cli.printable(str(out))}")


if __name__ == "__main__":
    main()
