"""What the tools share: a trained network with all it needs to judge images."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from base.errors import DataError, ModelError
from model.alexnet import AlexNet
from model.parallel.ranks import count_gpus
from model.training import checkpoint
from pipeline.preprocess import Preprocess
from pipeline.shards import Manifest

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
TOP = 5
Classes = list[dict[str, str | None]]  # {"wnid", "name"} each, in the order of the labels


def option(*names: str, **kwargs: Any) -> Callable[[Any], Any]:
    """click.option that shows its default."""
    return click.option(*names, show_default=kwargs.pop("show_default", True), **kwargs)


def file_option(name: str, help: str) -> Callable[[Any], Any]:
    """An optional file to write; its parameter ends in _path, so that `--json` hides no module."""
    parameter = name.removeprefix("--").replace("-", "_") + "_path"
    return click.option(name, parameter, type=click.Path(dir_okay=False, path_type=Path), help=help)


def run_argument(**kwargs: Any) -> Callable[[Any], Any]:
    """RUN: a folder that train.py wrote, or a checkpoint."""
    return click.argument("run", type=click.Path(path_type=Path), **kwargs)


@dataclass(frozen=True)
class Run:
    """A trained network, in evaluation mode and channels-last, and what its checkpoint says about it."""

    path: Path  # of the checkpoint
    network: AlexNet
    classes: Classes
    preprocess: Preprocess
    variant: str
    epoch: int
    step: int
    best: float  # validation top-1 in 0..1, the best of the run so far; below 0: never validated

    @property
    def names(self) -> list[str]:
        return class_names(self.classes)

    @property
    def title(self) -> str:
        """For captions: "runs/paper/best.pt (paper, epoch 12)"."""
        return f"{self.path} ({self.variant}, epoch {self.epoch})"


def load_run(run: Path, device: torch.device | None = None) -> Run:
    """The network of a run folder (best.pt, else the newest) or a .pt file, on `device` (default: the CPU).

    Raises ModelError if there is none, or if it is damaged or not one of train.py's.
    """
    path = checkpoint.find(run)
    saved = checkpoint.load(path)
    try:
        preprocess = Preprocess.from_state_dict(saved["preprocess"])
        # what older checkpoints lack is at its default; where weights were averaged, the average is judged
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


def data_option(help: str) -> Callable[[Any], Any]:
    """--data, None where it is not given: see `data_of`."""
    said = "what the first RUN was trained on"
    return option("--data", type=click.Path(path_type=Path), show_default=said, help=help)


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
        return dict(json.loads((folder / "config.json").read_text()))
    except OSError:
        return {}
    except (ValueError, TypeError):
        raise ModelError(f"{folder / 'config.json'} is damaged: delete it or restore it") from None


def class_names(classes: Classes) -> list[str]:
    """What people read: the first of a class's names, or the whole name of its folder where it has none."""
    return [c["name"].split(",")[0] if c["name"] else str(c["wnid"]) for c in classes]


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


def write_text(path: Path, text: str) -> None:
    """Write a result, making its folder; "-" is the standard output. Raises ModelError if that fails."""
    if str(path) == "-":
        sys.stdout.write(text)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> ModelError:
    return ModelError(f"cannot write {path}: {error.strerror or error}; give another file")
