"""What the stages of the benchmark share: photographs, shards, timing and the table.

Compared variants are measured alternately within one run, so that their ratio holds on a noisy machine.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import torch

from base.machine import cpu_threads
from model.training.precision import amp_dtype, input_dtype
from pipeline.shards import Manifest

ROOT = Path(__file__).resolve().parents[2]
BUILD_IMAGES = 16_000  # least number of images in a timed build, so that its start counts for little
LOAD_IMAGES = 12_000  # about the number of images in a timed run of a loader or decoder


@dataclass
class Row:
    """One line of the table; `ours`, `limit` and `peer` are rates in `unit`, higher is better."""

    stage: str
    what: str
    unit: str
    ours: float
    limit: float | None = None
    limit_is: str = ""
    peer: float | None = None
    peer_is: str = ""

    @property
    def of_limit(self) -> float | None:
        return self.ours / self.limit if self.limit else None

    @property
    def of_peer(self) -> float | None:
        return self.ours / self.peer if self.peer else None


@dataclass
class Bench:
    """The settings of a run: photographs, a folder to build in, the device, the number of turns."""

    photographs: Path
    work: Path
    device: torch.device
    rounds: int
    workers: int
    batch: int
    peers_python: Path | None = None  # see --peers-python

    @property
    def files(self) -> list[Path]:
        return sorted(p for p in (self.photographs / "train").rglob("*") if p.is_file())

    @property
    def enough(self) -> int:
        """How often the photographs must be repeated to give BUILD_IMAGES."""
        return math.ceil(BUILD_IMAGES / len(self.files))

    def repeated(self, times: int) -> Path:
        """A folder with `times` symbolic links to each training photograph; the number of hard links is limited."""
        folder = self.work / f"times{times}"
        for file in self.files if not folder.exists() else ():
            (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
            for copy in range(times):
                (folder / file.parent.name / f"{copy}-{file.name}").symlink_to(file.resolve())
        return folder

    def built(self, encoding: str) -> Path:
        """The shards of the photographs, built once."""
        data = self.work / encoding
        if not (data / "train").exists():
            build(self.photographs / "train", data, self.workers, encoding)
        return data

    @property
    def data(self) -> Path:
        return self.built("jpeg")

    @property
    def threads(self) -> int:
        return cpu_threads()

    @property
    def amp(self) -> torch.dtype | None:
        """The autocast type that train.py chooses on this device."""
        return amp_dtype("auto", self.device)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the images that train.py asks for on this device."""
        return input_dtype(self.amp, self.device)

    def rates(self, *contestants: Callable[[], float]) -> list[float]:
        """The median rate of each contestant, run alternately; each returns items per second."""
        taken: list[list[float]] = [[] for _ in contestants]
        for _ in range(self.rounds):
            for rates, contestant in zip(taken, contestants, strict=True):
                rates.append(contestant())
        return [statistics.median(rates) for rates in taken]

    def seconds(self, work: Callable[[], object], least: float = 0.5) -> float:
        """Seconds per call after a first call, over at least `least` seconds; uses CUDA events on a GPU."""
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            calls, began = 0, time.perf_counter()
            start.record()
            while time.perf_counter() - began < least or not calls:
                work()
                calls += 1
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000 / calls
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < least or not calls:
            work()
            calls += 1
        return (time.perf_counter() - began) / calls

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Built(NamedTuple):
    rate: float  # images per second of the whole process, including start-up and manifest
    peak: float  # bytes of its largest process


def build(source: Path, out: Path, workers: int, encoding: str = "jpeg") -> Built:
    """Runs tools/build_lmdb.py."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "tools/build_lmdb.py"), str(source), str(out)]
    command += ["--workers", str(workers), "--encoding", encoding]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{' '.join(command)} failed with exit code {process.returncode}")
    images = sum(Manifest.load(out / s).count for s in ("train", "val") if (out / s).exists())
    return Built(images / seconds, usage.ru_maxrss * 1024)


def table(rows: list[Row]) -> str:
    """A Markdown table of `rows`."""
    lines = [
        "| stage | what | ours | limit | ours / limit | peer | ours / peer |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        limit = f"{row.limit:,.1f} ({row.limit_is})" if row.limit else ""
        peer = f"{row.peer:,.1f} ({row.peer_is})" if row.peer else ""
        ratios = [f"{r:.2f}" if r else "" for r in (row.of_limit, row.of_peer)]
        lines.append(
            f"| {row.stage} | {row.what} | {row.ours:,.1f} {row.unit} "
            f"| {limit} | {ratios[0]} | {peer} | {ratios[1]} |"
        )
    return "\n".join(lines)
