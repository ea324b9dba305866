"""Evaluate trained networks: python tools/evaluate.py RUN [RUN2 ...] --data DATA --crops 10."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from tools.lib import cli


@click.command(
    context_settings=cli.CONTEXT,
    epilog=cli.examples(
        "python tools/evaluate.py runs/paper --crops 10 --csv classes.csv --confusion confusion.png",
        "python tools/evaluate.py runs/a runs/b runs/c --data data/imagenet --json results.json",
    ),
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@cli.data_option("Data set to evaluate on.", whose="the first RUN")
@cli.option(
    "--split", type=click.Choice(["val", "train"]), default="val", help="Split of --data to evaluate on."
)
@cli.option(
    "--crops",
    type=click.Choice(["1", "10"]),
    default="1",
    help="Crops of each image: 1 is the centre; 10 are the four corners and the centre, each also mirrored.",
)
@cli.device_option(many=True)
@cli.option("--batch", type=click.IntRange(1), default=128, help="Crops per batch and GPU.")
@cli.option(
    "--amp",
    type=click.Choice(["off", "bf16", "fp16"]),
    default="off",
    help="Mixed precision, which is faster and less accurate; off computes in float32.",
)
@cli.workers_option()
@cli.file_option("--csv", "Write the accuracy of each class as CSV.")
@cli.file_option("--confusion", "Write a picture of the confusion matrix.")
@cli.file_option("--json", "Write the results as JSON; - is standard output.")
@cli.progress_option()
def main(**config: Any) -> None:
    """Compute the loss, top-1 and top-5 accuracy of RUN, a folder that train.py wrote or a checkpoint.

    Several RUNs are evaluated one by one and as an ensemble that averages their softmax. --crops 10 averages the
    softmax over the paper's ten crops. The preprocessing is in the checkpoint, so only DATA/val is needed. Every
    image counts exactly once on any number of GPUs.
    """
    from model.parallel.ranks import count_gpus, launch, one_gpu, under_torchrun
    from pipeline.shards import Manifest
    from tools.lib.runs import data_of
    from tools.lib.scores import evaluate

    split_dir = data_of(config["runs"][0], config["data"]) / config["split"]
    count = Manifest.load(split_dir).count
    if under_torchrun():
        gpu, ranks = count_gpus(config["gpus"]) > 0, int(os.environ["WORLD_SIZE"])
    else:
        gpus = one_gpu(config["gpus"])
        gpu, ranks = gpus > 0, max(1, min(gpus, count))
    launch(evaluate, {**config, "split_dir": split_dir}, ranks, gpu)


if __name__ == "__main__":
    main()
