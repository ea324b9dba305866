"""Stages read, load and scale: records from shards, and batches from the loader."""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from base.machine import keep_freed_memory
from pipeline.load.loader import DECODERS, Loader, train_loader
from pipeline.load.plan import Plan
from pipeline.preprocess import Preprocess
from pipeline.shards import ShardReader
from tools.bench import core
from tools.bench.core import Bench, Row, build
from tools.bench.peer_loaders import anonymous_memory
from tools.bench.reference import import_torchvision

IMAGENET, IMAGENET_21K = 1_281_167, 15_000_000


def bench_read(bench: Bench) -> Iterator[Row]:
    """Random reads of records by one process, against copying the same bytes in memory."""
    reader = ShardReader(bench.data / "train")
    order = np.random.default_rng(0).integers(0, len(reader), 20_000).tolist()
    held = [np.array(reader.read(i)[0]) for i in range(len(reader))]

    def ours() -> float:
        began = time.perf_counter()
        for index in order:
            reader.read(index)
        return len(order) / (time.perf_counter() - began)

    def copy() -> float:
        began = time.perf_counter()
        for index in order:
            held[index].copy()
        return len(order) / (time.perf_counter() - began)

    rate, limit = bench.rates(ours, copy)
    yield Row("read", "random order, one worker", "images/s", rate, limit, "memory copy of the same bytes")


def loader(bench: Bench, data: Path, steps: int, mean: str = "pixel", **options: Any) -> Loader:
    """The training loader that train.py would use on this device; `options` are those of `Loader`."""
    reader = ShardReader(data / "train")
    preprocess = Preprocess.load(data / "train", 224, mean)
    gpu = bench.device.type == "cuda"
    plan = Plan(len(reader), min(bench.batch, len(reader)))
    return train_loader(
        reader, plan, preprocess, end_step=steps, device="gpu" if gpu else "cpu",
        device_id=0 if gpu else None, threads=bench.threads, dtype=bench.dtype, **options,
    )  # fmt: skip


def load_rate(bench: Bench, data: Path, mean: str = "pixel", decoder: str = "mixed") -> float:
    """Images per second from the loader, without its start and the first batches, which allocate memory.

    One batch is prepared ahead, since nothing else needs the cores here.
    """
    steps, first = max(8, core.LOAD_IMAGES // bench.batch), 8
    batches = loader(bench, data, first + steps, mean, prefetch=2, decoder=decoder)
    for _ in range(first):
        next(batches)
    bench.sync()
    began, done = time.perf_counter(), 0
    for _ in range(steps):
        done += len(next(batches)[1])
    bench.sync()
    rate = done / (time.perf_counter() - began)
    batches.close()
    return rate


def load_cases(gpu: bool) -> list[tuple[str, str, str]]:
    """Encoding of the shards, mean, and the decoder of a GPU run."""
    jpeg = [
        ("jpeg", mean, decoder)
        for mean in ("pixel", "channel")
        for decoder in (DECODERS if gpu else ("cpu",))
    ]
    return [*jpeg, ("raw", "pixel", "none")]


def bench_load(bench: Bench) -> Iterator[Row]:
    """Augmented batches, against only decoding the same records with libjpeg-turbo on as many threads."""
    reader = ShardReader(bench.data / "train")
    records = [np.array(reader.read(i)[0]) for i in range(len(reader))]
    cv2.setNumThreads(1)

    def bare() -> float:
        with ThreadPoolExecutor(bench.threads) as pool:
            began, times = time.perf_counter(), max(1, core.LOAD_IMAGES // len(records))
            for _ in range(times):
                for _ in pool.map(
                    lambda record: cv2.imdecode(record, cv2.IMREAD_COLOR), records, chunksize=32
                ):
                    pass
            return times * len(records) / (time.perf_counter() - began)

    def torchvision_loader() -> float:
        tv = import_torchvision()
        transform = tv.transforms.Compose(
            [
                tv.transforms.RandomResizedCrop(224),
                tv.transforms.RandomHorizontalFlip(),
                tv.transforms.ToTensor(),
                tv.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        images = tv.datasets.ImageFolder(str(bench.photographs / "train"), transform)
        batches = torch.utils.data.DataLoader(
            images, bench.batch, shuffle=True, num_workers=bench.threads, drop_last=True
        )
        stream = iter(batches)
        next(stream)  # starts the workers
        began, done = time.perf_counter(), 0
        for _, labels in stream:
            done += len(labels)
        return done / (time.perf_counter() - began)

    dtype = str(bench.dtype).removeprefix("torch.")
    gpu = bench.device.type == "cuda"
    for encoding, mean, decoder in load_cases(gpu):
        data = bench.built(encoding)
        ours, limit, peer = bench.rates(
            partial(load_rate, bench, data, mean, decoder), bare, torchvision_loader
        )
        what = f"{encoding} shards to augmented batches, {mean} mean, {dtype}, one ahead"
        yield Row(
            "load", f"{what}, decoder {decoder}" if gpu else what, "images/s", ours,
            limit, f"bare libjpeg-turbo decode, {bench.threads} threads",
            peer, "torchvision ImageFolder + DataLoader",
        )  # fmt: skip


def first_batch(bench: Bench, data: Path) -> tuple[float, int]:
    """Seconds until a loader's first batch, and the bytes that this process and its readers then hold."""
    keep_freed_memory()
    began = time.perf_counter()
    next(batches := loader(bench, data, 4))
    seconds, held = time.perf_counter() - began, anonymous_memory()
    batches.close()
    return seconds, held


def bench_scale(bench: Bench) -> Iterator[Row]:
    """Rates at 1, 2, 4 and 8 times BUILD_IMAGES; the sampler's start at the sizes of ImageNet and ImageNet-21k."""
    sizes = (1, 2, 4, 8)
    sets = {times: bench.work / f"scaled{times}" for times in sizes}
    builds = {
        times: build(bench.repeated(times * bench.enough), sets[times], bench.workers) for times in sizes
    }
    first_batches: dict[int, list[tuple[float, int]]] = {times: [] for times in sizes}
    for _ in range(bench.rounds):
        for times, data in sets.items():
            # each in its own process, since freed memory that is kept would be counted again
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                first_batches[times].append(pool.submit(first_batch, bench, data).result())
    starts, memory = (
        {times: statistics.median(turn[what] for turn in turns) for times, turns in first_batches.items()}
        for what in range(2)
    )
    loads = dict(
        zip(sizes, bench.rates(*(partial(load_rate, bench, sets[times]) for times in sizes)), strict=True)
    )
    for times in sizes:
        size = f"{times} x {bench.enough * len(bench.files):,} images"
        yield Row(
            "scale", f"build, {size}", "images/s", builds[times].rate, builds[1].rate, "the rate at 1 x"
        )
        yield Row("scale", f"load, {size}", "images/s", loads[times], loads[1], "the rate at 1 x")
        yield Row("scale", f"first batch after start, {size}", "s", starts[times], starts[1], "at 1 x")
        yield Row(
            "scale", f"build's largest process, {size}", "MB",
            builds[times].peak / 1e6, builds[1].peak / 1e6, "at 1 x",
        )  # fmt: skip
        yield Row("scale", f"loader's memory, {size}", "MB", memory[times] / 1e6, memory[1] / 1e6, "at 1 x")
        shutil.rmtree(sets[times])
    for count in (IMAGENET, IMAGENET_21K):
        began = time.perf_counter()
        plan = Plan(count, 128)
        order = plan.order(0)
        seconds = time.perf_counter() - began
        what = f"sampler start at {count:,} images ({order.nbytes / 1e6:.0f} MB)"
        yield Row("scale", what, "1/s", 1 / seconds)
        steps = 2000
        began = time.perf_counter()
        for step in range(steps):
            plan.samples(0, step), plan.views(0, step)
        yield Row(
            "scale", f"sampler at {count:,} images", "images/s", steps * 128 / (time.perf_counter() - began)
        )
