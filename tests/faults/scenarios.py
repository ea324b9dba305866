"""The list of scenarios, each with its default number of faults, and the function that runs one."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from faults.building import build_kills, full_disk_build
from faults.damage import checkpoints, flips
from faults.hostile import hostile_images, hostile_tars
from faults.processes import COMMANDS, Lost, Skipped
from faults.training import full_disk, readers, shared_memory, signals, train_kills

SCENARIOS: dict[str, tuple[Callable[..., tuple[int, str]], int]] = {
    "train-kills": (train_kills, 50),
    "signals": (signals, 6),
    "readers": (readers, 10),
    "shared-memory": (shared_memory, 6),
    "full-disk": (full_disk, 3),
    "checkpoints": (checkpoints, 1000),
    "build-kills": (build_kills, 50),
    "full-disk-build": (full_disk_build, 5),
    "hostile-images": (hostile_images, 10_000),
    "hostile-tars": (hostile_tars, 1000),
    "flips": (flips, 1000),
}


@dataclass
class Result:
    """One row of the printed table."""

    name: str
    tries: int
    passed: int
    seconds: float
    note: str


def inject(name: str, tries: int | None = None, seed: int = 0, corpora: tuple[Path, ...] = ()) -> Result:
    """Run one scenario in a temporary folder."""
    function, default_tries = SCENARIOS[name]
    tries = tries or default_tries
    began = time.monotonic()
    more = {"corpora": corpora} if function is hostile_images else {}
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as work,
        tqdm(desc=name, total=tries, leave=False) as bar,
    ):
        try:
            passed, note = function(Path(work), tries, random.Random(seed), bar.update, **more)
        except Lost as lost:
            passed, note = int(bar.n), f"FAILED: {lost}"
        except Skipped as skipped:
            passed, tries, note = 0, 0, f"skipped: {skipped}"
        finally:
            for command in list(COMMANDS):
                command.end()
    return Result(name, tries, min(passed, tries - note.startswith("FAILED")), time.monotonic() - began, note)
