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

DIGEST_BYTES = 64  # sha256 in hexadecimal
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
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.write(hashlib.sha256(content).hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ModelError(f"the checkpoint {path} could not be written: {error.strerror}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; raises ModelError if it is missing, truncated or altered."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"the checkpoint {path} cannot be read: {error.strerror}") from error
    body, digest = memoryview(content)[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ModelError(f"the checkpoint {path} is damaged (its checksum does not match)")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself must survive a power cut
    finally:
        os.close(descriptor)


class Checkpoints:
    """The checkpoints of one run: OUT/checkpoint-STEP.pt, the last `keep` of them, and OUT/best.pt."""

    def __init__(self, out: Path, keep: int = 3) -> None:
        self.out, self.keep = out, keep

    def paths(self) -> list[Path]:
        """All numbered checkpoints, the newest first."""
        return sorted(self.out.glob("checkpoint-*.pt"), reverse=True)

    def save(self, state: dict[str, Any], best: bool = False) -> Path:
        """Write one, drop those past `keep`; `best` makes it OUT/best.pt too (the same file, no copy)."""
        for stale in self.out.glob(".*.tmp"):
            stale.unlink()
        path = self.out / f"checkpoint-{state['step']:09d}.pt"
        if best:
            # before the numbered one: a run killed in between goes on from an earlier step and finds this best
            # again; the other way round it would never write it
            save(self.out / "best.pt", state)
            link = self.out / f".{path.name}.tmp"
            try:
                os.link(self.out / "best.pt", link)
                link.replace(path)
                _sync_folder(self.out)
            except OSError:  # a file system without hard links
                link.unlink(missing_ok=True)
                save(path, state)
        else:
            save(path, state)
        # a later one was damaged and passed over
        kept = [p for p in self.paths() if p.name <= path.name][: self.keep]
        for other in set(self.paths()) - set(kept):
            other.unlink()
        return path

    def newest(
        self, fall_back: bool = False, say: Callable[[str], None] = lambda line: None
    ) -> dict[str, Any]:
        """The newest checkpoint; raises ModelError if there is none or it is damaged.

        `fall_back`: a damaged one is passed over, which `say` is told, for the one before.
        """
        paths = self.paths()
        if not paths:
            raise ModelError(f"{self.out} holds no checkpoint to resume from: start without --resume")
        for path in paths:
            try:
                return load(path)
            except ModelError as error:
                if not fall_back:
                    raise ModelError(
                        f"{error.message}: go on from the one before with --resume --fall-back"
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
    candidates = [best] if best.exists() else Checkpoints(run).paths()
    if not candidates:
        raise ModelError(f"{run} holds no checkpoint (*.pt)")
    return candidates[0]
