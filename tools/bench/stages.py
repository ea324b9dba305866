"""Runs the chosen stages of the benchmark one after the other and prints their rates."""

from __future__ import annotations

import json
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import click
import torch
from tqdm import tqdm

from base.machine import cpu_threads, keep_freed_memory
from tools.bench.build import bench_build
from tools.bench.core import Bench, Row, table
from tools.bench.layers import bench_layers
from tools.bench.load import bench_load, bench_read, bench_scale
from tools.bench.peers import bench_peers
from tools.bench.ranks import bench_ranks
from tools.bench.report import issue, machine
from tools.bench.step import bench_lrn, bench_step, bench_train
from tools.lib.cli import echo, write_text

STAGES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "build": bench_build,
    "read": bench_read,
    "load": bench_load,
    "lrn": bench_lrn,
    "step": bench_step,
    "layers": bench_layers,
    "train": bench_train,
    "ranks": bench_ranks,
    "scale": bench_scale,
    "peers": bench_peers,
}


def run_stages(bench: Bench, stages: list[str]) -> tuple[list[Row], list[str]]:
    """Runs the stages.

    Returns:
        The rows, and one line for each stage that failed. The other stages still run: a benchmark takes minutes.
    """
    rows: list[Row] = []
    failed: list[str] = []
    with tqdm(stages) as progress:
        for stage in progress:
            progress.set_description(stage)
            try:
                for row in STAGES[stage](bench):
                    rows.append(row)
            except click.ClickException as error:
                failed.append(f"{stage} failed: {error.format_message()}")
            except (Exception, SystemExit) as error:  # SystemExit: a rank of `ranks` died
                tqdm.write(traceback.format_exc())
                reason = (str(error).strip().splitlines() or [""])[0]
                failed.append(f"{stage} failed: {type(error).__name__}: {reason}")
    return rows, failed


def measure(
    photographs: Path | None,
    stages: list[str],
    rounds: int,
    batch: int,
    workers: int | None,
    json_path: Path | None,
    cpu: bool,
    peers_python: Path | None,
    issue_path: Path | None,
) -> None:
    """See tools/benchmark.py."""
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as train.py does; peers and limits in this process gain from it too
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        work = Path(folder)
        own = work / "photographs"
        if photographs is None:
            from tools.demo import cut_tiles

            cut_tiles(own)
        else:  # on the same file system as the results, so that builds can hard-link files
            shutil.copytree(photographs, own)
        bench = Bench(own, work, device, rounds, workers or cpu_threads(), batch, peers_python)
        rows, failed = run_stages(bench, stages)
    facts = machine(device) | {"rounds": str(rounds)}
    listed = [asdict(row) | {"of_limit": row.of_limit, "of_peer": row.of_peer} for row in rows]
    written = json.dumps(
        {"device": facts["device"], "rounds": rounds, "machine": facts, "rows": listed}, indent=1
    )
    if json_path:
        write_text(json_path, written + "\n")
    if issue_path:
        echo(issue(facts, rows, failed, written, issue_path.read_text(errors="replace")))
    else:
        echo(
            f"Device: {facts['device']}; torch {torch.__version__}; medians of {rounds} turns\n\n{table(rows)}"
        )
    if failed:
        raise click.ClickException("; ".join(failed))
