"""A trained network with all it needs to judge images, and the data set that belongs to it. Imports no DALI."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from base.errors import DataError, ModelError
from base.files import read_regular
from model.alexnet import AlexNet
from model.parallel.ranks import count_gpus
from model.training import checkpoint
from model.training.config import MAX_CONFIG_BYTES
from pipeline.preprocess import Preprocess
from pipeline.shards import Manifest

Classes = list[dict[str, str | None]]  # {"wnid", "name"} each, in the order of the labels


@dataclass(frozen=True)
class Run:
    """A trained network, in evaluation mode and channels-last, and what its checkpoint says about it."""

    path: Path  # of the checkpoint
    network: AlexNet
    classes: Classes
    preprocess: Preprocess
    variant: str
    epoch: int  # epochs that were complete
    step: int
    best: float  # validation top-1 in 0..1, the best of the run so far; below 0: never validated

    @property
    def names(self) -> list[str]:
        return class_names(self.classes)

    @property
    def title(self) -> str:
        """For captions: "runs/paper/best.pt (paper, after epoch 12)"."""
        when = f"after epoch {self.epoch}" if self.epoch else f"step {self.step:,}"
        return f"{self.path} ({self.variant}, {when})"


def load_run(run: Path, device: torch.device | None = None) -> Run:
    """The network of a run folder (best.pt, else the newest) or a .pt file, on `device` (default: the CPU).

    Raises ModelError if there is none, or if it is damaged or not one of train.py's.
    """
    path = checkpoint.find(run)
    saved = checkpoint.load(path)
    try:
        preprocess = Preprocess.from_state_dict(saved["preprocess"])
        # where weights were averaged, the average is judged
        network = AlexNet(
            len(saved["classes"]), saved["variant"], image_size=preprocess.crop, **saved.get("network", {})
        )
        network.load_state_dict((saved.get("ema") or saved)["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{path} is no checkpoint of this program's train.py ({reason})") from None
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Run(
        path=path,
        network=network.eval().requires_grad_(False),
        classes=saved["classes"],
        preprocess=preprocess,
        variant=saved["variant"],
        epoch=saved["epoch"],
        step=saved["step"],
        best=saved["best"],
    )


def data_of(run: Path, data: Path | None) -> Path:
    """The data set to judge RUN on: the one named, else its own, else data/imagenet.

    Raises DataError where its own is not found: config.json has the path as it was given then. ModelError if there
    is no such run.
    """
    if data:
        return data
    path = checkpoint.find(run)
    try:
        own = read_config(path.parent)["data"]
    except (ModelError, KeyError):  # a file beside a checkpoint may be any program's
        own = None
    if not isinstance(own, str):
        return Path("data/imagenet")
    if not Path(own).is_dir():
        raise DataError(f"{run} was trained on {own}, which is not found from here: give --data")
    return Path(own)


def read_config(folder: Path) -> dict[str, Any]:
    """A run's options from its config.json; none if it was not kept."""
    try:
        return dict(json.loads(read_regular(folder / "config.json", MAX_CONFIG_BYTES)))
    except OSError:
        return {}
    except (ValueError, TypeError, RecursionError):
        raise ModelError(f"{folder / 'config.json'} is damaged: delete it or restore it") from None


def class_names(classes: Classes) -> list[str]:
    """What people read: the first of a class's synonyms where it has names, else its folder's name as it is.

    Where two classes would read the same ("crane", the bird and the machine), all synonyms are kept, and where
    that does not tell them apart, the wnid is added.
    """
    names = [str(c["name"] or c["wnid"]) for c in classes]
    first = [
        name.split(",")[0].strip() if c["name"] else name for c, name in zip(classes, names, strict=True)
    ]
    names = _where_unique(first, names)
    return _where_unique(names, [f"{n} ({c['wnid']})" for c, n in zip(classes, names, strict=True)])


def _where_unique(names: list[str], otherwise: list[str]) -> list[str]:
    counts = Counter(names)
    return [name if counts[name] == 1 else other for name, other in zip(names, otherwise, strict=True)]


def check_size(run: Run, manifest: Manifest, where: Path) -> None:
    """Raises DataError unless the stored images have the size that the network's preprocessing starts from."""
    if manifest.size != run.preprocess.size:
        raise DataError(
            f"the images in {where} are {manifest.size} pixels wide, {run.path} was trained on "
            f"{run.preprocess.size}: build them with --size {run.preprocess.size}"
        )


def check_classes(run: Run, manifest: Manifest, where: Path) -> None:
    """Raises DataError unless a label means the same class to the network and in the data set."""
    trained, stored = ([c["wnid"] for c in classes] for classes in (run.classes, manifest.classes))
    if trained != stored:
        count = f"{len(trained)} classes, {where} has {len(stored)}"
        pairs = zip(trained, stored, strict=False)
        label = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(trained), len(stored)))
        differ = f"label {label} is {_at(trained, label)} there and {_at(stored, label)} here"
        raise DataError(f"{run.path} was trained on {count} ({differ}): give --data what it was trained on")


def _at(wnids: list[str | None], label: int) -> str:
    return repr(wnids[label]) if label < len(wnids) else "no class"


def one_device(gpus: int | None) -> torch.device:
    """`--gpus` of tools that use one device: 0 is the CPU, None a GPU if there is one."""
    gpus = min(1, torch.cuda.device_count()) if gpus is None else count_gpus(gpus)
    return torch.device("cuda", 0) if gpus else torch.device("cpu")
