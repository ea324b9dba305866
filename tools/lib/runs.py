"""A trained network with its preprocessing and classes, and the data set that belongs to it. Imports no DALI."""

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
from model.parallel.ranks import one_gpu
from model.training import checkpoint
from model.training.config import MAX_CONFIG_BYTES
from pipeline.preprocess import Preprocess
from pipeline.shards import Manifest

Classes = list[dict[str, str | None]]  # {"wnid", "name"} for each label


@dataclass(frozen=True)
class Run:
    """A trained network, in evaluation mode and channels-last, with the other entries of its checkpoint."""

    path: Path  # of the checkpoint
    network: AlexNet
    classes: Classes
    preprocess: Preprocess
    variant: str
    epoch: int  # complete epochs
    step: int
    best: float  # the run's best validation top-1 in 0..1; negative if it was never validated

    @property
    def names(self) -> list[str]:
        return class_names(self.classes)

    @property
    def title(self) -> str:
        """For captions: "runs/paper/best.pt (paper, after epoch 12)"."""
        when = f"after epoch {self.epoch}" if self.epoch else f"step {self.step:,}"
        return f"{self.path} ({self.variant}, {when})"


def load_run(run: Path, device: torch.device | None = None) -> Run:
    """Load a run's network on `device`, by default the CPU: its averaged weights if it has any.

    Args:
        run: a run's folder (best.pt, or if there is none the newest checkpoint) or a .pt file.

    Raises:
        ModelError: there is no checkpoint, or it is damaged or was not written by train.py.
    """
    path = checkpoint.find(run)
    saved = checkpoint.load(path)
    try:
        preprocess = Preprocess.from_state_dict(saved["preprocess"])
        state = (saved.get("ema") or saved)["model"]
        options = {"num_classes": len(saved["classes"]), "variant": saved["variant"]}
        options |= {"image_size": preprocess.crop, **saved.get("network", {})}
        with torch.device("meta"):  # no memory: a malicious file may describe a network of any size
            expected = AlexNet(**options).state_dict()
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in expected.items()}:
            raise ValueError("its weights do not fit its network")
        network = AlexNet(**options)
        network.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ModelError) as error:
        raise checkpoint.foreign(path, error) from None
    if not all(t.isfinite().all() for t in state.values()):
        raise ModelError(
            f"the weights in {path} are not finite: give a checkpoint from before the run diverged"
        )
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
    """The data set to evaluate RUN on: `data`, or the one it was trained on, or data/imagenet.

    Raises:
        DataError: the one it was trained on is not found; its path may be relative to another folder.
        ModelError: there is no such run.
    """
    if data:
        return data
    path = checkpoint.find(run)
    try:
        own = read_config(path.parent)["data"]
    except (ModelError, KeyError):  # a config.json beside a checkpoint may be another program's
        own = None
    if not isinstance(own, str):
        return Path("data/imagenet")
    if not Path(own).is_dir():
        raise DataError(
            f"{run} was trained on {own}, which is not found from the current folder: give --data"
        )
    return Path(own)


def read_config(folder: Path) -> dict[str, Any]:
    """A run's options from its config.json; empty if there is none."""
    try:
        return dict(json.loads(read_regular(folder / "config.json", MAX_CONFIG_BYTES)))
    except OSError:
        return {}
    except (ValueError, TypeError, RecursionError):
        raise ModelError(f"{folder / 'config.json'} is damaged: delete it or restore it") from None


def class_names(classes: Classes) -> list[str]:
    """Readable names: the first of a class's synonyms, or the wnid of a class without names.

    If two classes have the same name ("crane", the bird and the machine), all synonyms are given, and if those are
    the same too, the wnid is appended.
    """
    names = [str(c["name"] or c["wnid"]) for c in classes]
    first = [
        name.split(",")[0].strip() if c["name"] else name for c, name in zip(classes, names, strict=True)
    ]
    names = _replace_duplicates(first, names)
    return _replace_duplicates(names, [f"{n} ({c['wnid']})" for c, n in zip(classes, names, strict=True)])


def _replace_duplicates(names: list[str], longer: list[str]) -> list[str]:
    counts = Counter(names)
    return [name if counts[name] == 1 else other for name, other in zip(names, longer, strict=True)]


def check_size(run: Run, manifest: Manifest, where: Path) -> None:
    """Raises DataError unless the stored images have the size that the network was trained on."""
    if manifest.size != run.preprocess.size:
        raise DataError(
            f"the images in {where} have {manifest.size} pixels, but {run.path} was trained on "
            f"{run.preprocess.size}: build them with --size {run.preprocess.size}"
        )


def check_classes(run: Run, manifest: Manifest, where: Path) -> None:
    """Raises DataError unless the network and the data set have the same classes in the same order."""
    trained, stored = ([c["wnid"] for c in classes] for classes in (run.classes, manifest.classes))
    if trained != stored:
        count = f"{len(trained)} classes, but {where} has {len(stored)}"
        pairs = zip(trained, stored, strict=False)
        label = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(trained), len(stored)))
        differ = f"label {label} is {_at(trained, label)} there and {_at(stored, label)} here"
        raise DataError(
            f"{run.path} was trained on {count} ({differ}): give the --data that it was trained on"
        )


def _at(wnids: list[str | None], label: int) -> str:
    return repr(wnids[label]) if label < len(wnids) else "no class"


def one_device(gpus: int | None) -> torch.device:
    """The device for --gpus of a tool that uses one: 0 is the CPU, None a GPU if there is one."""
    return torch.device("cuda", 0) if one_gpu(gpus) else torch.device("cpu")
