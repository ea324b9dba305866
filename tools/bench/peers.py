"""Stage peers: our loader and builder beside those that a user would pick instead, with the same images."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from pipeline.shards import ShardReader
from tools.bench import core
from tools.bench.build import at_once, build_rate, opencv_loop, own_loop, pillow_loop
from tools.bench.core import ROOT, Bench, Row
from tools.bench.peer_loaders import LOADERS, NOT_INSTALLED, WRITERS

SCRIPT = Path(__file__).with_name("peer_loaders.py")
OWN = ("ours", "dali")  # run in this program's environment
ENVIRONMENT = ROOT / ".venv-peers/bin/python"  # of `make bench-peers`
WARM = 8  # batches before a rate is measured

Result = dict[str, float] | str  # what was measured, or why nothing was


def bench_peers(bench: Bench) -> Iterator[Row]:
    """Each loader and writer alternately, on the CPU; see tools/bench/peer_loaders.py."""
    yield from bench_loaders(bench)
    yield from bench_writers(bench)


def bench_loaders(bench: Bench) -> Iterator[Row]:
    """The same 256 x 256 JPEGs to float32 batches."""
    shards = bench.data / "train"
    config: dict[str, Any] = {
        "images": str(write_records(shards, bench.work / "records")),
        "shards": str(shards),
        "batch": bench.batch,
        "threads": bench.threads,
        "warm": WARM,
        "steps": max(2, core.LOAD_IMAGES // bench.batch),
        "crop": 224,
    }
    medians = in_turns(
        bench, {name: partial(run, bench, "load", name, config, bench.work / name) for name in LOADERS}
    )
    for name, median in medians.items():
        disk = shards if name in OWN else bench.work / name
        if name.startswith("torchvision"):
            disk = Path(config["images"])
        what = (
            f"{name}: first batch after {median['first_batch']:.1f} s, {median['memory'] / 1e6:,.0f} MB of memory, "
            f"{bytes_in(disk) / 1e6:,.1f} MB on disk"
        )
        peer = None if name == "ours" else median["rate"]
        yield Row("peers", what, "images/s", medians["ours"]["rate"], peer=peer, peer_is=name if peer else "")


def bench_writers(bench: Bench) -> Iterator[Row]:
    """Photographs to a data set of 256 x 256 JPEGs of quality 90."""
    source, workers = bench.repeated(bench.enough), bench.workers
    config = {"photographs": str(source), "workers": workers}

    def run_writer(name: str) -> Result:
        out = bench.work / f"written-{name}"
        shutil.rmtree(out, ignore_errors=True)
        return run(bench, "write", name, config, out)

    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        at_once(pool, workers, own_loop, bench.files)  # starts the processes
        loops = {
            "ours": partial(build_rate, source, bench.work / "built", workers),
            "Pillow loop": partial(at_once, pool, workers, pillow_loop, bench.files),
            "OpenCV loop": partial(at_once, pool, workers, opencv_loop, bench.files),
        }
        medians = in_turns(
            bench,
            {name: lambda rate=rate: {"rate": rate()} for name, rate in loops.items()}
            | {name: partial(run_writer, name) for name in WRITERS},
        )
    ours = medians.pop("ours")["rate"]
    for name, median in medians.items():
        what = f"{bench.enough * len(bench.files):,} photographs to a data set, {workers} workers"
        yield Row("peers", what, "images/s", ours, peer=median["rate"], peer_is=name)


def in_turns(bench: Bench, contestants: dict[str, Callable[[], Result]]) -> dict[str, dict[str, float]]:
    """The median of each figure of each contestant that runs; prints the names of the others."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for _ in range(bench.rounds):
        for name in list(turns):
            result = contestants[name]()
            if isinstance(result, str):
                tqdm.write(f"peers: {name} is left out: {result}", file=sys.stderr)
                del turns[name]
            else:
                turns[name].append(result)
    if "ours" not in turns:
        raise click.ClickException("our own loader does not run here: see the lines above")
    return {
        name: {key: statistics.median(turn[key] for turn in found) for key in found[0]}
        for name, found in turns.items()
    }


def write_records(shards: Path, out: Path) -> Path:
    """The records of a split, as class folders of JPEG files."""
    reader = ShardReader(shards)
    if reader.manifest.encoding != "jpeg":
        raise ValueError(f"records are {reader.manifest.encoding}, not JPEG files")
    for index in range(len(reader)):
        data, label = reader.read(index)
        folder = out / f"{label:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:08d}.jpg").write_bytes(data.tobytes())
    return out


def run(bench: Bench, what: str, name: str, config: dict[str, Any], out: Path) -> Result:
    """Runs one turn of a loader ("load") or writer ("write") with `out` as its folder."""
    python = bench.peers_python or (ENVIRONMENT if ENVIRONMENT.exists() else Path(sys.executable))
    out.mkdir(exist_ok=True)
    path = out.with_suffix(".json")
    path.write_text(json.dumps({**config, "out": str(out)}))
    own = name in OWN
    command = [sys.executable if own else str(python), "-P", str(SCRIPT), what, name, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT) if own else ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == NOT_INSTALLED:
        return "it is not installed (`make bench-peers` installs it)"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return f"it failed ({lines[-1]})"
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
