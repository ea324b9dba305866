"""Checkpoints: written whole or not at all, checked when read.

A checkpoint is an ordinary torch.save file (a zip) that any torch can load. Its zip comment holds the sha256 of
everything before it, so that a truncated or flipped file is refused by name instead of training on.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from base.errors import ModelError
from base.files import (
    atomic_file,
    check_stored,
    fsync_directory,
    read_regular,
    remove_temporary,
    temporary_path,
)
from model.training.config import checkpoint_paths
from pipeline.preprocess import Preprocess

DIGEST_BYTES = 64  # sha256 in hexadecimal
MAX_BYTES = 16 << 30  # of a checkpoint; with 100,000 classes, momentum and an average it is 6 GB
# what a run writes by way of temporary files, which a kill leaves
OWN_FILES = r"(checkpoint-\d{9}|best)\.pt|config\.json|log\.jsonl|metrics\.csv"
END_OF_ZIP = b"PK\x05\x06"  # the zip's last record, 22 bytes, ends with the length of the comment


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` by way of a temporary file, synced and renamed: a kill leaves the old or the new.

    Tensors are saved from the CPU: a file of CUDA tensors would not load on a machine without a GPU.
    """
    buffer = io.BytesIO()
    torch.save(tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), state), buffer)
    content = buffer.getbuffer()
    if bytes(content[-22:-18]) != END_OF_ZIP:
        raise RuntimeError("torch.save no longer ends its files with a plain zip record")
    content[-2:] = DIGEST_BYTES.to_bytes(2, "little")
    try:
        with atomic_file(path) as file:
            file.write(content)
            file.write(hashlib.sha256(content).hexdigest().encode())
    except OSError as error:
        raise ModelError(f"the checkpoint {path} could not be written: {error.strerror}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; raises ModelError if it is missing, truncated, altered or not one of ours.

    The checksum finds accidents. A file made with intent is read by torch's restricted unpickler, which runs no
    code, and takes no more memory than its size.
    """
    try:
        content = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise ModelError(f"the checkpoint {path} cannot be read: {error.strerror}") from error
    body, digest = memoryview(content)[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ModelError(f"the checkpoint {path} is damaged (its checksum does not match)")
    try:
        state = unpack(content)
        _check(state)
    except Exception as error:  # torch raises many kinds, some of many lines
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path} is no checkpoint of this program's train.py ({reason[:200]})") from None
    return dict(state)


def unpack(content: bytes) -> Any:
    """What is in the bytes of a file of torch.save, on the CPU, without running code of it.

    Raises whatever torch raises, which is of many kinds and may be pages long.
    """
    if content.startswith(b"PK"):  # else the format of torch before 1.6, which has no compression
        check_stored(content)  # as torch.save writes them
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _check(state: Any) -> None:
    """ValueError unless what every user of a checkpoint relies on has the right type."""
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    weights = state.get("model")
    if not isinstance(weights, dict) or not all(torch.is_tensor(value) for value in weights.values()):
        raise ValueError("its model is not a dictionary of tensors")
    for name in ("step", "epoch"):
        value = state.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} is {value!r:.60}")
    classes = state.get("classes", [])
    if not isinstance(classes, list) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("wnid"), str)
        and isinstance(entry.get("name"), str | None)
        for entry in classes
    ):
        raise ValueError("its classes are not a list of wnids and names")
    if "preprocess" in state:
        Preprocess.from_state_dict(state["preprocess"])


class Checkpoints:
    """The checkpoints of one run: OUT/checkpoint-STEP.pt, the last `keep` of them, and OUT/best.pt."""

    def __init__(self, out: Path, keep: int = 3) -> None:
        self.out, self.keep = out, keep

    def save(self, state: dict[str, Any], best: bool = False) -> Path:
        """Write one, drop those past `keep`; `best` makes it OUT/best.pt too (the same file, no copy)."""
        remove_temporary(self.out, OWN_FILES)
        path = self.out / f"checkpoint-{state['step']:09d}.pt"
        if best:
            # before the numbered one: a run killed in between resumes from an earlier step and finds this best
            # again; the other way round it would never write it
            save(self.out / "best.pt", state)
            link = temporary_path(path)
            try:
                os.link(self.out / "best.pt", link)
                link.replace(path)
                fsync_directory(self.out)
            except OSError:  # a file system without hard links
                link.unlink(missing_ok=True)
                save(path, state)
        else:
            save(path, state)
        # a later one was damaged and passed over
        paths = checkpoint_paths(self.out)
        kept = [p for p in paths if p.name <= path.name][: self.keep]
        for other in set(paths) - set(kept):
            other.unlink()
        return path

    def newest(
        self, fall_back: bool = False, say: Callable[[str], None] = lambda line: None
    ) -> dict[str, Any]:
        """The newest checkpoint; raises ModelError if there is none or it is damaged.

        `fall_back`: use the one before a damaged one, and call `say` with a line about it.
        """
        paths = checkpoint_paths(self.out)
        if not paths:
            raise ModelError(f"{self.out} holds no checkpoint to resume from: start without --resume")
        for path in paths:
            try:
                return load(path)
            except ModelError as error:
                if not fall_back:
                    raise ModelError(
                        f"{error.message}: resume from the previous one with --resume --fall-back"
                    ) from error
                say(f"passed over: {error.message}")
        raise ModelError(
            f"all {len(paths)} checkpoints in {self.out} are damaged: begin again with another --out"
        )


def find(run: Path) -> Path:
    """The checkpoint that RUN means: a .pt file itself, else the folder's best.pt, else its newest."""
    if run.is_file():
        return run
    if not run.is_dir():
        raise ModelError(f"there is no run at {run}: give the folder that train.py wrote, or a .pt file")
    best = run / "best.pt"
    candidates = [best] if best.exists() else checkpoint_paths(run)
    if not candidates:
        raise ModelError(f"{run} holds no checkpoint (*.pt)")
    return candidates[0]
