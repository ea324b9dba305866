"""Runs the chosen stages of the benchmark one after the other and prints their table."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from base.machine import cpu_threads, keep_freed_memory
from tools.bench.build import bench_build
from tools.bench.core import Bench, Row, table
from tools.bench.load import bench_load, bench_read, bench_scale
from tools.bench.peers import bench_peers
from tools.bench.ranks import bench_ranks
from tools.bench.step import bench_lrn, bench_step, bench_train
from tools.lib.cli import echo, write_text

STAGES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "build": bench_build,
    "read": bench_read,
    "load": bench_load,
    "lrn": bench_lrn,
    "step": bench_step,
    "train": bench_train,
    "ranks": bench_ranks,
    "scale": bench_scale,
    "peers": bench_peers,
}


def measure(
    photographs: Path | None,
    stages: list[str],
    rounds: int,
    batch: int,
    workers: int | None,
    json_path: Path | None,
    cpu: bool,
    peers_python: Path | None,
) -> None:
    """See tools/benchmark.py."""
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as train.py does; peers and limits in this process gain by it as well
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        work = Path(folder)
        own = work / "photographs"
        if photographs is None:
            from tools.demo import cut_tiles

            cut_tiles(own)
        else:  # beside the results, so that links to the files can be made
            shutil.copytree(photographs, own)
        bench = Bench(own, work, device, rounds, workers or cpu_threads(), batch, peers_python)
        rows: list[Row] = []
        with tqdm(stages) as progress:
            for stage in progress:
                progress.set_description(stage)
                rows += STAGES[stage](bench)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {cpu_threads()} cores"
    echo(f"Device: {name}; torch {torch.__version__}; medians of {rounds} turns\n\n{table(rows)}")
    if json_path:
        listed = [asdict(row) | {"of_limit": row.of_limit, "of_peer": row.of_peer} for row in rows]
        write_text(json_path, json.dumps({"device": name, "rounds": rounds, "rows": listed}, indent=1) + "\n")
