"""What train.py refuses before any rank starts. Imports torch only where a network is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from base.errors import DataError, ModelError
from model.training.config import Config, checkpoint_paths
from pipeline.shards import ShardReader

if TYPE_CHECKING:
    from model.training.weights import Weights


def check_folder(config: Config) -> None:
    """Raises ModelError if --out holds a run already, or with --resume if it holds none."""
    exists = bool(checkpoint_paths(config.folder))
    if exists and not config.resume:
        raise ModelError(
            f"{config.folder} holds a run already: continue it with --resume, or give another --out"
        )
    if config.resume and not exists:
        raise ModelError(
            f"{config.folder} holds no checkpoint to resume from: give a run's --out, or start without --resume"
        )


def check_data(config: Config) -> tuple[int, int, int]:
    """Returns the number of training images, of classes, and the side of a stored image in pixels.

    Raises DataError if the data set is missing, damaged, or has other classes in train than in val.
    """
    count = 0
    classes = {}
    for split in ("train", "val"):
        reader = ShardReader(config.data / split)
        reader.check_counts()
        count = count or len(reader)
        classes[split] = [c["wnid"] for c in reader.manifest.classes]
        size = reader.manifest.size
        reader.close()
    if classes["train"] != classes["val"]:
        raise DataError(f"train and val in {config.data} have different classes: build val again")
    return count, len(classes["train"]), size


def check_network(config: Config, classes: int, size: int, weights: Weights | None) -> None:
    """Raises ModelError if the options make no network, or one that does not fit the data or the weights."""
    import torch

    from model.alexnet import AlexNet
    from model.training import recipe

    if str(config.variant).startswith("cifar") and size > 64:
        raise ModelError(
            f"variant {config.variant} is for images of 32 pixels, those in {config.data} have {size}: "
            "build them with --size 32, or choose another --variant"
        )
    with torch.device("meta"):  # no memory, no work
        network = AlexNet(classes, str(config.variant), image_size=config.crop, **config.network_options)
    recipe.check_init(str(config.init), str(config.variant))
    if weights:
        weights.check(network)
