"""Stage ranks: the layouts on several ranks, compared with data parallelism."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from model.alexnet import AlexNet
from model.parallel.layouts import bytes_sent
from model.parallel.ranks import Ranks, launch
from model.training.step import train_step
from tools.bench.core import Bench, Row
from tools.bench.step import held_batch, started

# name, layout, whether gradients are sent as bfloat16
LAYOUT_CASES = [
    ("data", "data", False),
    ("data, --compress", "data", True),
    ("hybrid", "hybrid", False),
    ("towers", "towers", False),
]


def sent(kind: str, compress: bool, ranks: int, batch: int, width: int) -> float:
    """Bytes that each rank sends per step: the paper's network with 224 pixels and 1000 classes.

    `width`: bytes of an activation.
    """
    if kind != "towers":
        with torch.device("meta"):
            return bytes_sent(AlexNet(1000), kind, ranks, batch, width, compress)
    # the edges of LRN's windows, the maps that conv3 reads, the fully connected layers' inputs, logits twice
    maps = 4 * 55 * 55 + 4 * 27 * 27 + 256 * 13 * 13
    return 2 * (ranks - 1) / ranks * batch * (maps + 256 * 6 * 6 + 4096 + 2 * 1000) * width


def time_layouts(ranks: Ranks, config: dict[str, Any]) -> None:
    """Times one rank's steps of each layout alternately on one batch; the first rank writes the seconds of each."""
    batch = config["batch"]
    images, labels = held_batch(batch, ranks.device)

    def contestant(kind: str, compress: bool) -> Callable[[], None]:
        state = started(ranks, batch, layout=kind, compress=compress)
        own = slice(state.layout.first_row, state.layout.first_row + state.layout.batch)
        return lambda: train_step(state, images[own], labels[own])

    steps = [
        contestant(kind, compress) for _, kind, compress in LAYOUT_CASES[: 4 if ranks.world_size == 2 else 3]
    ]
    taken: list[list[float]] = [[] for _ in steps]
    for turn in range(config["rounds"] + 1):
        for times, step in zip(taken, steps, strict=True):
            ranks.any(False)  # waits for all ranks and devices
            began = time.perf_counter()
            for _ in range(config["steps"]):
                step()
            ranks.any(False)
            if turn:  # the first turn is a warm-up
                times.append((time.perf_counter() - began) / config["steps"])
    if ranks.first:
        config["out"].write_text(json.dumps([statistics.median(times) for times in taken]))


def bench_ranks(bench: Bench) -> Iterator[Row]:
    """The layouts on all GPUs, or on two CPU ranks over the loopback."""
    gpu = bench.device.type == "cuda"
    ranks, width = (torch.cuda.device_count() if gpu else 2), 2 if bench.amp else 4
    if ranks == 1:
        tqdm.write("ranks is left out: there is one GPU; use --cpu to measure on the CPU")
        return
    batch, out = max(1, bench.batch // ranks) * ranks, bench.work / "ranks.json"
    config = {"batch": batch, "rounds": bench.rounds, "steps": 20 if gpu else 2, "out": out}
    launch(time_layouts, config, ranks, gpu)
    seconds = json.loads(out.read_text())
    for (name, kind, compress), took in zip(LAYOUT_CASES, seconds, strict=False):
        megabytes = sent(kind, compress, ranks, batch, width) / 1e6
        what = f"{name}, {ranks} ranks, batch {batch}: {took * 1e3:,.0f} ms, each sends {megabytes:.1f} MB per step"
        yield Row("ranks", what, "images/s", batch / took, peer=batch / seconds[0], peer_is="data")
