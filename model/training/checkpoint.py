"""Checkpoints: written atomically, verified when read.

A checkpoint is an ordinary torch.save file (a zip) that any version of torch can load. Its zip comment holds the
SHA-256 of everything before it, so that a truncated or damaged file is refused.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from base.errors import ModelError, one_line
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
MAX_BYTES = 16 << 30  # of a checkpoint; one with 100,000 classes, momentum and averaged weights has 6 GB
GIVE_ANOTHER = ": give another file"
# files that a run writes through temporary files, which remain after a kill
OWN_FILES = r"(checkpoint-\d{9}|best)\.pt|config\.json|log\.jsonl|metrics\.csv"
# the zip's last record: a signature, then 18 bytes, the last two the length of the comment
END_OF_ZIP = b"PK\x05\x06"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically: after a crash, the file is the old or the new one.

    Tensors are moved to the CPU first, because CUDA tensors could not be loaded on a machine without a GPU.
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
        raise ModelError(
            f"cannot write the checkpoint {path}: {error.strerror}; free space, then use --resume"
        ) from error


def load(path: Path, remedy: str = GIVE_ANOTHER) -> dict[str, Any]:
    """Read a checkpoint to the CPU; raises ModelError if it is missing, damaged, or was not written by `save`.

    `remedy` is appended to the message of the error.

    The checksum detects accidental damage. Against malicious files, torch's restricted unpickler runs no code, and
    tensors take no more memory than the file has bytes.
    """
    try:
        content = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise ModelError(f"cannot read the checkpoint {path}: {error.strerror}{remedy}") from error
    body, digest = memoryview(content)[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ModelError(f"the checkpoint {path} is damaged (its checksum does not match){remedy}")
    try:
        state = unpack(content)
        _check(state)
    except Exception as error:  # torch raises many kinds
        raise foreign(path, error, remedy) from None
    return dict(state)


def foreign(path: Path, error: Exception, remedy: str = GIVE_ANOTHER) -> ModelError:
    """The error for a file whose content is not that of a checkpoint."""
    return ModelError(f"{path} is not a checkpoint of train.py ({one_line(error)[:200]}){remedy}")


def unpack(content: bytes) -> Any:
    """Unpickle the bytes of a torch.save file to the CPU without running code from it.

    Raises many kinds of exceptions from torch, some with very long messages.
    """
    if content.startswith(b"PK"):  # torch before 1.6 wrote another format, without compression
        check_stored(content)
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _check(state: Any) -> None:
    """Raises ValueError unless the entries that are used have the right types."""
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    check_weights(state.get("model"))
    if state.get("ema"):
        check_weights(state["ema"]["model"])
    best = state.get("best", 0.0)
    if not isinstance(best, int | float):
        raise ValueError(f"best is {best!r:.60}")
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


def check_weights(weights: Any) -> None:
    """Raises ValueError unless `weights` is a state dict of dense tensors of real numbers."""
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) and _is_dense(tensor)
        for name, tensor in weights.items()
    ):
        raise ValueError("its weights are not a dictionary of dense tensors")


def _is_dense(tensor: Tensor) -> bool:
    """Whether every element has memory of its own: an expanded tensor could claim any size."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_complex() or tensor.is_quantized)
        and tensor.untyped_storage().nbytes() >= tensor.nbytes
    )


class Checkpoints:
    """The checkpoints of one run: the last `keep` of OUT/checkpoint-STEP.pt, and OUT/best.pt."""

    def __init__(self, out: Path, keep: int = 3) -> None:
        self.out, self.keep = out, keep

    def save(self, state: dict[str, Any], best: bool = False) -> Path:
        """Write a checkpoint and delete those past `keep`; `best` also makes it OUT/best.pt, as a hard link."""
        remove_temporary(self.out, OWN_FILES)
        path = self.out / f"checkpoint-{state['step']:09d}.pt"
        if best:
            # best.pt first: a run that is killed in between resumes from an earlier step and writes it again; in
            # the other order it would never be written
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
        # later checkpoints are damaged ones that --fall-back skipped
        paths = checkpoint_paths(self.out)
        kept = [p for p in paths if p.name <= path.name][: self.keep]
        for other in set(paths) - set(kept):
            other.unlink()
        return path

    def newest(
        self, fall_back: bool = False, say: Callable[[str], None] = lambda line: None
    ) -> dict[str, Any]:
        """The newest checkpoint; raises ModelError if there is none or it is damaged.

        Args:
            fall_back: skip damaged checkpoints.
            say: called with a line about each checkpoint that is skipped.
        """
        paths = checkpoint_paths(self.out)
        if not paths:
            raise ModelError(
                f"{self.out} holds no checkpoint to resume from: give a run's --out, or start without --resume"
            )
        remedy = ": start again with another --out"
        if len(paths) > 1:
            remedy = ": to resume from the previous one, use --resume --fall-back"
        for path in paths:
            try:
                return load(path, "" if fall_back else remedy)
            except ModelError as error:
                if not fall_back:
                    raise
                say(f"skipped: {error.message}")
        raise ModelError(
            f"all {len(paths)} checkpoints in {self.out} are damaged: start again with another --out"
        )


def find(run: Path) -> Path:
    """The checkpoint of RUN: the file itself, or in a folder, best.pt if it exists, else the newest."""
    if run.is_file():
        return run
    if not run.is_dir():
        raise ModelError(f"there is no run at {run}: give a folder that train.py wrote, or a .pt file")
    best = run / "best.pt"
    candidates = [best] if best.exists() else checkpoint_paths(run)
    if not candidates:
        raise ModelError(f"{run} holds no checkpoint (*.pt): give a folder that train.py wrote")
    return candidates[0]
