"""Every stage of the main job against the machine's own limit and against what a user would pick instead.

Each figure is a ratio of rates taken in turns in one run, so that it holds on a noisy machine too.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from base.machine import cpu_threads, keep_freed_memory
from model.alexnet import AlexNet
from model.lrn import LRN
from model.parallel.layouts import Layout
from model.parallel.ranks import Ranks, launch
from model.training import recipe
from model.training.precision import amp_dtype, input_dtype
from pipeline.build.images import RejectedError, encode_bgr, prepare_bgr
from pipeline.load.loader import Loader, train_loader
from pipeline.load.plan import Plan
from pipeline.preprocess import Preprocess
from pipeline.shards import Manifest, ShardReader
from tools.peers import import_torchvision

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("build", "read", "load", "lrn", "step", "train", "ranks", "scale")
LONG = ("scale",)  # builds 240,000 images, 5 GB of them
IMAGENET, IMAGENET_21K = 1_281_167, 15_000_000
BUILD_IMAGES = 16_000  # at least, where a build is timed: its start then counts for little, as with ImageNet
LOAD_IMAGES = 12_000  # about so many, where a loader or decoding is timed


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
    """What the stages share: photographs, a folder to build in, the device, how often to measure."""

    photographs: Path
    work: Path
    device: torch.device
    rounds: int
    workers: int
    batch: int

    @property
    def files(self) -> list[Path]:
        return sorted(p for p in (self.photographs / "train").rglob("*") if p.is_file())

    @property
    def enough(self) -> int:
        """How many times the photographs are BUILD_IMAGES."""
        return math.ceil(BUILD_IMAGES / len(self.files))

    def repeated(self, times: int) -> Path:
        """A folder with every training photograph `times` times: symbolic links, as hard ones are limited."""
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
    def dtype(self) -> torch.dtype:
        """Of the images that train.py would ask for on this device."""
        return input_dtype(amp_dtype("auto", self.device), self.device)

    def rates(self, *contestants: Callable[[], float]) -> list[float]:
        """The median rate of each, run in turns; a contestant returns how many items a second it did."""
        taken: list[list[float]] = [[] for _ in contestants]
        for _ in range(self.rounds):
            for rates, contestant in zip(taken, contestants, strict=True):
                rates.append(contestant())
        return [statistics.median(rates) for rates in taken]

    def seconds(self, work: Callable[[], object], least: float = 0.5) -> float:
        """Seconds one call takes, warm, over at least `least` seconds; CUDA events on a GPU."""
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
    rate: float  # images a second of the whole process, start-up and manifest included
    peak: float  # bytes, of its largest process


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


def build_rate(source: Path, out: Path, workers: int) -> float:
    return build(source, out, workers).rate


def timed(files: list[Path], work: Callable[[bytes], object]) -> float:
    """Files that are in memory, one after the other: images a second of this process, on one thread."""
    cv2.setNumThreads(1)
    contents = [path.read_bytes() for path in files]
    began = time.perf_counter()
    for content in contents:
        work(content)
    return len(contents) / (time.perf_counter() - began)


def opencv_loop(files: list[Path]) -> float:
    """Decode, resize, encode by OpenCV and nothing else."""

    def convert(content: bytes) -> None:
        image = cv2.imdecode(
            np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
        if image is None:  # a build lists it; here it costs its time
            return
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[top : top + side, left : left + side]
        method = cv2.INTER_AREA if side > 256 else cv2.INTER_CUBIC
        square = cv2.resize(square, (256, 256), interpolation=method)
        cv2.imencode(".jpg", square, [cv2.IMWRITE_JPEG_QUALITY, 90])

    return timed(files, convert)


def own_loop(files: list[Path]) -> float:
    """The same by the build's functions: what is left of its work without files, checksums, statistics, LMDB."""

    def convert(content: bytes) -> None:
        with suppress(RejectedError):
            encode_bgr(prepare_bgr(content), "jpeg", 90)

    return timed(files, convert)


def pillow_loop(files: list[Path]) -> float:
    """The converter one writes with Pillow: images a second of this process."""
    from PIL import Image

    with tempfile.TemporaryDirectory(dir=files[0].parents[2]) as folder:  # the disk that ours writes to
        began = time.perf_counter()
        for path in files:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            scale = 256 / min(image.size)
            image = image.resize(
                (max(256, round(image.width * scale)), max(256, round(image.height * scale)))
            )
            left, top = (image.width - 256) // 2, (image.height - 256) // 2
            image.crop((left, top, left + 256, top + 256)).save(Path(folder, "pillow.jpg"), quality=90)
        return len(files) / (time.perf_counter() - began)


def at_once(
    pool: ProcessPoolExecutor, count: int, loop: Callable[[list[Path]], float], files: list[Path]
) -> float:
    """The summed rate of as many loops in as many processes."""
    return sum(pool.map(loop, [files] * count))


def bench_build(bench: Bench) -> Iterator[Row]:
    """The whole command against bare loops and a converter with Pillow, as many of each at once as workers."""
    source, images = bench.repeated(bench.enough), bench.enough * len(bench.files)
    for workers in sorted({1, bench.workers}):
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            at_once(pool, workers, own_loop, bench.files)  # starts the processes
            ours, limit, own, peer = bench.rates(
                partial(build_rate, source, bench.work / "built", workers),
                partial(at_once, pool, workers, opencv_loop, bench.files),
                partial(at_once, pool, workers, own_loop, bench.files),
                partial(at_once, pool, workers, pillow_loop, bench.files),
            )
        yield Row(
            "build", f"{workers} workers, {images:,} images, whole command", "images/s", ours,
            limit, f"OpenCV's decode+resize+encode in a bare loop, {workers} at once",
            peer, f"Pillow loop, {workers} at once",
        )  # fmt: skip
        yield Row(
            "build", f"{workers} workers, against its own functions in a bare loop", "images/s", ours,
            own, f"{workers} at once",
        )  # fmt: skip


def bench_read(bench: Bench) -> Iterator[Row]:
    """Random reads of records by one process against copying the same bytes in memory."""
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

    mine, limit = bench.rates(ours, copy)
    yield Row("read", "random order, one worker", "images/s", mine, limit, "memory copy of the same bytes")


def loader(bench: Bench, data: Path, steps: int, mean: str = "pixel", prefetch: int | None = None) -> Loader:
    reader = ShardReader(data / "train")
    preprocess = Preprocess.load(data / "train", 224, mean)
    gpu = bench.device.type == "cuda"
    plan = Plan(len(reader), min(bench.batch, len(reader)))
    return train_loader(
        reader, plan, preprocess, end_step=steps, device="gpu" if gpu else "cpu",
        device_id=0 if gpu else None, threads=bench.threads, dtype=bench.dtype, prefetch=prefetch,
    )  # fmt: skip


def load_rate(bench: Bench, data: Path, mean: str = "pixel") -> float:
    """Images a second out of the loader, start-up and the first batches, for which memory is new, left out.

    A batch is made ahead: here nothing else wants the cores.
    """
    steps, first = max(8, LOAD_IMAGES // bench.batch), 8
    batches = loader(bench, data, first + steps, mean, prefetch=2)
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


def bench_load(bench: Bench) -> Iterator[Row]:
    """Augmented batches against bare libjpeg-turbo decodes of the same records on as many threads."""
    reader = ShardReader(bench.data / "train")
    records = [np.array(reader.read(i)[0]) for i in range(len(reader))]
    cv2.setNumThreads(1)

    def bare() -> float:
        with ThreadPoolExecutor(bench.threads) as pool:
            began, times = time.perf_counter(), max(1, LOAD_IMAGES // len(records))
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
        next(stream)  # the workers' start
        began, done = time.perf_counter(), 0
        for _, labels in stream:
            done += len(labels)
        return done / (time.perf_counter() - began)

    dtype = str(bench.dtype).removeprefix("torch.")
    for encoding, mean in (("jpeg", "pixel"), ("jpeg", "channel"), ("raw", "pixel")):
        data = bench.built(encoding)
        ours, limit, peer = bench.rates(partial(load_rate, bench, data, mean), bare, torchvision_loader)
        yield Row(
            "load", f"{encoding} shards to augmented batches, {mean} mean, {dtype}, one ahead", "images/s", ours,
            limit, f"bare libjpeg-turbo decode, {bench.threads} threads",
            peer, "torchvision ImageFolder + DataLoader",
        )  # fmt: skip


def bench_lrn(bench: Bench) -> Iterator[Row]:
    """Forward and backward of both layers against one read and one write of each tensor they must touch."""
    dtype = amp_dtype("auto", bench.device) or torch.float32
    for name, shape in (("conv1", (96, 55, 55)), ("conv2", (256, 27, 27))):
        x = torch.randn(bench.batch, *shape, device=bench.device, dtype=dtype)
        x = x.to(memory_format=torch.channels_last).relu_().requires_grad_()
        grad = torch.randn_like(x)

        def run(forward: Callable[[torch.Tensor], torch.Tensor], x: Any = x, grad: Any = grad) -> float:
            def both() -> None:
                x.grad = None
                forward(x).backward(grad)

            return bench.batch / bench.seconds(both)

        # forward reads x and writes y; backward reads x and the gradient and writes the gradient of x
        source, target = (torch.empty_like(x, requires_grad=False) for _ in range(2))

        def touch(source: Any = source, target: Any = target, x: Any = x) -> float:
            def both() -> None:
                with torch.no_grad():
                    target.copy_(source)
                    torch.add(source, x, out=target)

            return bench.batch / bench.seconds(both)

        ours, limit, peer = bench.rates(
            partial(run, LRN()),
            touch,
            # in float32, to which autocast brings it: on the CPU it knows no bfloat16
            partial(run, lambda t: F.local_response_norm(t.float(), 5, 5e-4, 0.75, 2.0).to(t.dtype)),
        )
        yield Row(
            "lrn", f"after {name}, forward + backward", "images/s",
            ours, limit, "each tensor read or written once", peer, "torch's local_response_norm",
        )  # fmt: skip


class Step:
    """One training step, forward, backward and update, on batches as they come."""

    def __init__(self, bench: Bench, network: torch.nn.Module) -> None:
        self.bench, self.amp = bench, amp_dtype("auto", bench.device)
        self.network = network.to(bench.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = recipe.build_optimizer(self.network)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.bench.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            loss = F.cross_entropy(self.network(images).float(), labels)
        loss.backward()
        self.optimizer.step()

    def rate(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        return len(labels) / self.bench.seconds(lambda: self(images, labels), least=3.0)


def held_batch(batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(batch, 3, 224, 224, device=device) * 60
    images = images.to(input_dtype(amp_dtype("auto", device), device))
    labels = torch.randint(0, 1000, (batch,), device=device)
    return images.to(memory_format=torch.channels_last), labels


def flops(network: torch.nn.Module, images: torch.Tensor) -> float:
    """Of forward and backward an image: multiplications and additions of convolutions and matrix products.

    Backward takes twice the forward's, for the gradients of weights and inputs; the first layer needs no latter.
    """
    counts: list[int] = []

    def count(layer: Any, _inputs: Any, out: torch.Tensor) -> None:
        counts.append(2 * out[0].numel() * layer.weight[0].numel())

    layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        network(images[:1])
    for hook in hooks:
        hook.remove()
    return 3 * sum(counts) - counts[0]


def gemm_rate(bench: Bench, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product."""
    n = 8192 if bench.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
    return 2 * n**3 / bench.seconds(lambda: a @ b, least=1.0)


def reference_rate(device: torch.device, amp: torch.dtype | None, batch: int, least: float) -> float:
    """torchvision's alexnet, stepped as its references/classification/train.py does, in a process of its own.

    That is: layout, optimiser and memory as torch has them by default; with autocast, which it has for GPUs.
    """
    network = import_torchvision().models.alexnet().to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return batch / Bench(Path(), Path(), device, 1, 1, batch).seconds(step, least)


def bench_step(bench: Bench) -> Iterator[Row]:
    """The paper's step against the matrix-product rate; without LRN; and torchvision's alexnet."""
    images, labels = held_batch(bench.batch, bench.device)
    network = AlexNet()
    recipe.initialise(network, "torch")
    work = flops(network, images.float().cpu())
    ours, plain = Step(bench, network), Step(bench, AlexNet(lrn=False))
    peer = Step(bench, import_torchvision().models.alexnet())
    dtype = ours.amp or torch.float32
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:

        def script(least: float = 3) -> float:
            return pool.submit(reference_rate, bench.device, ours.amp, bench.batch, least).result()

        script(0)  # starts the process
        mine, without, gemm, theirs, scripts = bench.rates(
            lambda: ours.rate(images, labels),
            lambda: plain.rate(images, labels),
            lambda: gemm_rate(bench, dtype) / work,
            lambda: peer.rate(images.float(), labels),  # as its loader gives them
            script,
        )
    kind = str(dtype).removeprefix("torch.")
    yield Row(
        "step", f"paper network, batch {bench.batch}, {kind}", "images/s", mine,
        gemm, f"{work / 1e9:.2f} GFLOP an image at the {kind} matrix-product rate",
        scripts, "torchvision alexnet as its script steps it",
    )  # fmt: skip
    yield Row(
        "step", "against torchvision's network in our step", "images/s", mine,
        peer=theirs, peer_is="torchvision alexnet, channels-last, fused SGD, memory kept",
    )  # fmt: skip
    yield Row("step", "with LRN against without", "images/s", mine, without, "the same network without LRN")


def bench_train(bench: Bench) -> Iterator[Row]:
    """Training from shards against training on one batch held in memory."""
    network = AlexNet()
    recipe.initialise(network, "torch")
    step = Step(bench, network)
    images, labels = held_batch(bench.batch, bench.device)

    def shards() -> float:
        batches = loader(bench, bench.data, 16)
        for _ in range(4):
            step(*next(batches))
        bench.sync()
        began, done = time.perf_counter(), 0
        for batch_images, batch_labels in batches:
            step(batch_images, batch_labels)
            done += len(batch_labels)
        bench.sync()
        rate = done / (time.perf_counter() - began)
        batches.close()
        return rate

    ours, limit = bench.rates(shards, lambda: step.rate(images, labels))
    yield Row("train", "from shards", "images/s", ours, limit, "one batch held in memory")


def anonymous_memory() -> int:
    """Bytes that this process and its children hold, pages of mapped files left out."""
    total, children = 0, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for process in ("self", *children):
        with suppress(OSError):  # gone meanwhile
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:")):
                    total += int(line.split()[1]) * 1024
    return total


def first_batch(bench: Bench, data: Path) -> tuple[float, int]:
    """Seconds to a loader's first batch, and the bytes that this process and its readers hold then."""
    keep_freed_memory()
    began = time.perf_counter()
    next(batches := loader(bench, data, 4))
    seconds, held = time.perf_counter() - began, anonymous_memory()
    batches.close()
    return seconds, held


def bench_scale(bench: Bench) -> Iterator[Row]:
    """The same rates at 1, 2, 4 and 8 times BUILD_IMAGES; the sampler's start at the size of ImageNet and -21k."""
    sizes = (1, 2, 4, 8)
    sets = {times: bench.work / f"scaled{times}" for times in sizes}
    builds = {
        times: build(bench.repeated(times * bench.enough), sets[times], bench.workers) for times in sizes
    }
    begun: dict[int, list[tuple[float, int]]] = {times: [] for times in sizes}
    for _ in range(bench.rounds):
        for times, data in sets.items():
            # each in a process of its own: memory that is kept would be counted again
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                begun[times].append(pool.submit(first_batch, bench, data).result())
    starts, memory = (
        {times: statistics.median(turn[what] for turn in turns) for times, turns in begun.items()}
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
            "scale",
            f"build's largest process, {size}",
            "MB",
            builds[times].peak / 1e6,
            builds[1].peak / 1e6,
            "at 1 x",
        )
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


# how the paper's network lies on several ranks: name, layout, gradients sent as bfloat16
LAIN = [
    ("data", "data", False),
    ("data, --compress", "data", True),
    ("hybrid", "hybrid", False),
    ("towers", "towers", False),
]


def sent(kind: str, compress: bool, ranks: int, batch: int, width: int) -> float:
    """Bytes that each rank sends a step, by its collectives: the paper's network on 224 pixels, 1000 classes.

    What is gathered on the way forward is reduced on the way back: each rank sends (ranks - 1) / ranks of the whole
    twice, and of an averaged gradient as well. `width`: bytes of an activation.
    """
    convolutions, connected, features, hidden, classes = 2_334_080, 58_631_144, 256 * 6 * 6, 4096, 1000
    if kind == "data":
        total = (convolutions + connected) * (2 if compress else 4)
    elif kind == "hybrid":
        total = (convolutions + classes) * 4 + batch * (features + hidden + classes) * width
    else:  # the edges of LRN's windows, the maps that conv3 reads, the fully connected layers' inputs, logits twice
        maps = 4 * 55 * 55 + 4 * 27 * 27 + 256 * 13 * 13
        total = batch * (maps + features + hidden + 2 * classes) * width
    return 2 * (ranks - 1) / ranks * total


def time_layouts(ranks: Ranks, config: dict[str, Any]) -> None:
    """One rank's steps of each layout in turns, on one held batch; the first rank writes the seconds of each."""
    amp, batch = amp_dtype("auto", ranks.device), config["batch"]
    images, labels = held_batch(batch, ranks.device)

    def contestant(kind: str, compress: bool) -> Callable[[], None]:
        network = AlexNet()
        recipe.initialise(network, "torch")
        network = network.to(ranks.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        layout = Layout(network, kind, ranks, batch)
        optimizer, forward = recipe.build_optimizer(network), layout.distribute(True, compress)
        own = slice(layout.first_row, layout.first_row + layout.batch)

        def step() -> None:
            network.set_position(0, layout.first_row)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(ranks.device.type, amp or torch.bfloat16, enabled=amp is not None):
                loss = F.cross_entropy(forward(images[own]).float(), labels[own])
            loss.backward()
            optimizer.step()

        return step

    steps = [contestant(kind, compress) for _, kind, compress in LAIN[: 4 if ranks.world_size == 2 else 3]]
    taken: list[list[float]] = [[] for _ in steps]
    for turn in range(config["rounds"] + 1):
        for times, step in zip(taken, steps, strict=True):
            ranks.any(False)  # all begin together and, the device done, end together
            began = time.perf_counter()
            for _ in range(config["steps"]):
                step()
            ranks.any(False)
            if turn:  # the first is for warming up
                times.append((time.perf_counter() - began) / config["steps"])
    if ranks.first:
        config["out"].write_text(json.dumps([statistics.median(times) for times in taken]))


def bench_ranks(bench: Bench) -> Iterator[Row]:
    """The layouts on all GPUs, or on two CPU ranks over the loopback, beside data parallelism."""
    gpu = bench.device.type == "cuda"
    ranks, width = (torch.cuda.device_count() if gpu else 2), 2 if amp_dtype("auto", bench.device) else 4
    if ranks == 1:
        tqdm.write("ranks: left out, there is one GPU; measure on the CPU with --cpu")
        return
    batch, out = max(1, bench.batch // ranks) * ranks, bench.work / "ranks.json"
    config = {"batch": batch, "rounds": bench.rounds, "steps": 20 if gpu else 2, "out": out}
    launch(time_layouts, config, ranks, gpu)
    seconds = json.loads(out.read_text())
    for (name, kind, compress), took in zip(LAIN, seconds, strict=False):
        megabytes = sent(kind, compress, ranks, batch, width) / 1e6
        what = f"{name}, {ranks} ranks, batch {batch}: {took * 1e3:,.0f} ms, each sends {megabytes:.1f} MB a step"
        yield Row("ranks", what, "images/s", batch / took, peer=batch / seconds[0], peer_is="data")


def table(rows: list[Row]) -> str:
    """The table for people, Markdown."""
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


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("photographs", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--stage",
    "stages",
    type=click.Choice(STAGES),
    multiple=True,
    default=[stage for stage in STAGES if stage not in LONG],
    show_default="all but scale, which builds 5 GB",
    help="Only these (repeatable).",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Medians over so many turns."
)
@click.option("--batch", type=click.IntRange(2), default=128, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=None, show_default="cores", help="Of the build.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows here too."
)
@click.option("--cpu", is_flag=True, help="Leave a GPU alone.")
def main(
    photographs: Path | None,
    stages: tuple[str, ...],
    rounds: int,
    batch: int,
    workers: int | None,
    json_path: Path | None,
    cpu: bool,
) -> None:
    """Measure each stage on PHOTOGRAPHS, class folders in train/ (and val/), on the device that is here.

    Without PHOTOGRAPHS: the demo's tiles. Prints a Markdown table; ratios were taken in turns in this run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as train.py does; peers and limits in this process gain by it as well
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        work = Path(folder)
        if photographs is None:
            from tools.demo import cut_tiles

            photographs = work / "photographs"
            cut_tiles(photographs)
        else:  # beside the results, so that links to the files can be made
            shutil.copytree(photographs, work / "photographs")
            photographs = work / "photographs"
        bench = Bench(photographs, work, device, rounds, workers or cpu_threads(), batch)
        rows: list[Row] = []
        progress = tqdm([s for s in STAGES if s in stages])
        for stage in progress:
            progress.set_description(stage)
            rows += globals()[f"bench_{stage}"](bench)
        progress.close()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {cpu_threads()} cores"
    print(f"Device: {name}; torch {torch.__version__}; medians of {rounds} turns\n\n{table(rows)}")
    if json_path:
        listed = [asdict(row) | {"of_limit": row.of_limit, "of_peer": row.of_peer} for row in rows]
        json_path.write_text(json.dumps({"device": name, "rounds": rounds, "rows": listed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
