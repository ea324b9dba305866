"""Images, a data set, and command-line options for the scenarios."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TRAIN_IMAGES, VAL_IMAGES, BATCH, EPOCHS = 24, 8, 8, 2  # images per class; with two classes, 6 steps per epoch
STEPS_PER_EPOCH = 2 * TRAIN_IMAGES // BATCH
# The smallest crop for all pooling layers. A checkpoint still has 160 MB, so a kill can hit while it is written.
TRAIN = [
    "--gpus",
    "0",
    "--crop",
    "67",
    "--global-batch",
    str(BATCH),
    "--epochs",
    str(EPOCHS),
    "--lr",
    "0.001",
]
TRAIN += ["--init", "torch", "--save-every", "4", "--log-every", "1", "--decode-threads", "1"]
TRAIN += ["--no-progress", "--no-tensorboard"]
BUILD = ["--split", "train", "--size", "64", "--images-per-shard", "8", "--workers", "2"]


def make_images(out: Path, seed: int = 0) -> Path:
    """Write OUT/{train,val}/{a,b}/*.jpg: coloured blobs, about 700 pixels wide."""
    import cv2

    draw = np.random.default_rng(seed)
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for name in ("a", "b"):
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                blobs = draw.integers(0, 256, (9, 9, 3), np.uint8)
                size = tuple(int(side) for side in draw.integers(500, 900, 2))
                cv2.imwrite(str(folder / f"{name}{i}.jpg"), cv2.resize(blobs, size))
    return out


def make_data(work: Path) -> Path:
    """Build the data set for the training scenarios."""
    from pipeline.build.sources import open_source
    from pipeline.build.split import Options, build_split

    data, images = work / "data", make_images(work / "images")
    for split in ("train", "val"):
        if not (data / split).exists():
            source = open_source(images / split, split)
            build_split(source, data, Options(size=72, images_per_shard=16), workers=2)
    return data
