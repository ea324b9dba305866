"""Stage peers: our loader beside the loaders that a user would pick instead, with the same images."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from pipeline.shards import ShardReader
from tools.bench import core
from tools.bench.core import ROOT, Bench, Row
from tools.bench.peer_loaders import LOADERS, NOT_INSTALLED

SCRIPT = Path(__file__).with_name("peer_loaders.py")
OWN = ("ours", "dali")  # these run in this program's environment
ENVIRONMENT = ROOT / ".venv-peers/bin/python"  # of `make bench-peers`
WARM = 8  # batches before a rate is measured


def bench_peers(bench: Bench) -> Iterator[Row]:
    """Our loader and others, in turns: the same 256 x 256 JPEGs to float32 batches on the CPU, one process each."""
    python = bench.peers_python or (ENVIRONMENT if ENVIRONMENT.exists() else Path(sys.executable))
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
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
    for _ in range(bench.rounds):
        for name in list(turns):
            interpreter = Path(sys.executable) if name in OWN else python
            result = run_loader(name, interpreter, config, bench.work / name)
            if isinstance(result, str):
                tqdm.write(f"peers: {name} is left out: {result}", file=sys.stderr)
                del turns[name]
            else:
                turns[name].append(result)
    medians = {
        name: {key: statistics.median(turn[key] for turn in found) for key in found[0]}
        for name, found in turns.items()
    }
    if "ours" not in medians:
        raise click.ClickException("our own loader does not run here: see the lines above")
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


def run_loader(name: str, python: Path, config: dict[str, Any], out: Path) -> dict[str, float] | str:
    """What one turn of a loader measured, or in a line why there is none."""
    out.mkdir(exist_ok=True)
    path = out.with_suffix(".json")
    path.write_text(json.dumps({**config, "out": str(out)}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT) if name in OWN else ""}
    command = [str(python), "-P", str(SCRIPT), name, str(path)]
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
