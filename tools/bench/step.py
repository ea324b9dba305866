"""Stages lrn, step and train: the network by itself, and trained from shards."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from model.alexnet import AlexNet
from model.lrn import LRN
from model.parallel.ranks import Ranks
from model.training import recipe
from model.training.config import Config
from model.training.precision import amp_dtype, input_dtype
from model.training.state import TrainState
from model.training.step import train_step
from pipeline.load.plan import Plan
from pipeline.preprocess import Preprocess
from tools.bench.core import Bench, Row
from tools.bench.load import loader
from tools.bench.reference import import_torchvision


def bench_lrn(bench: Bench) -> Iterator[Row]:
    """Forward and backward of ReLU, LRN and max pool, as in the network, against using each tensor once."""
    dtype = bench.amp or torch.float32
    for name, shape in (("conv1", (96, 55, 55)), ("conv2", (256, 27, 27))):
        x = torch.randn(bench.batch, *shape, device=bench.device, dtype=dtype)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        grad = torch.randn_like(F.max_pool2d(x.detach(), 3, 2))

        def run(forward: Callable[[torch.Tensor], torch.Tensor], x: Any = x, grad: Any = grad) -> float:
            def both() -> None:
                x.grad = None
                forward(x).backward(grad)

            return bench.batch / bench.seconds(both)

        # forward reads x and writes y; backward reads x and the gradient of y and writes the gradient of x
        source, target = (torch.empty_like(x, requires_grad=False) for _ in range(2))
        y = torch.empty_like(grad)

        def touch(
            source: Any = source, target: Any = target, x: Any = x, y: Any = y, grad: Any = grad
        ) -> float:
            def both() -> None:
                with torch.no_grad():
                    y.copy_(grad)
                    torch.add(source, x, out=target)

            return bench.batch / bench.seconds(both)

        def torchs(x: torch.Tensor) -> torch.Tensor:
            # LRN in float32, as under autocast: on the CPU it does not support bfloat16
            y = F.local_response_norm(F.relu(x).float(), 5, 5e-4, 0.75, 2.0).to(x.dtype)
            return F.max_pool2d(y, 3, 2)

        ours, limit, peer = bench.rates(
            partial(run, LRN(relu=True, pool=(3, 2))), touch, partial(run, torchs)
        )
        yield Row(
            "lrn", f"ReLU, LRN, pool after {name}, forward + backward", "images/s",
            ours, limit, "each tensor read or written once", peer, "torch's relu, local_response_norm, max_pool2d",
        )  # fmt: skip


def started(ranks: Ranks, batch: int, **options: Any) -> TrainState:
    """The state of a training of the paper's network on 1000 classes, ready for `train_step`.

    Args:
        batch: the global batch.
        options: fields of Config.
    """
    config = Config(global_batch=batch, **options)
    config.fill(images := 1_281_167)
    nothing = np.zeros((256, 256, 3), np.float32)
    preprocess = Preprocess(256, config.crop, "none", nothing, np.zeros((3, 3), np.float32))
    classes: list[dict[str, str | None]] = [{"wnid": str(label), "name": None} for label in range(1000)]
    state = TrainState(config, ranks, Plan(images, batch, crop=config.crop), classes, preprocess)
    state.start()
    return state


def step_rate(bench: Bench, step: Callable[[], None]) -> float:
    return bench.batch / bench.seconds(step, least=3.0)


class PeerStep:
    """The training step of another network with channels-last memory, autocast and fused SGD, as in ours."""

    def __init__(self, bench: Bench, network: torch.nn.Module) -> None:
        self.bench, self.amp = bench, bench.amp
        self.network = network.to(bench.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = recipe.build_optimizer(self.network)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.bench.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            loss = F.cross_entropy(self.network(images).float(), labels)
        loss.backward()
        self.optimizer.step()


def held_batch(batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(batch, 3, 224, 224, device=device) * 60
    images = images.to(input_dtype(amp_dtype("auto", device), device))
    labels = torch.randint(0, 1000, (batch,), device=device)
    return images.to(memory_format=torch.channels_last), labels


def forward_flops(layer: torch.nn.Module, out: torch.Tensor) -> int:
    """Multiplications and additions that a layer needs for its output `out`; 0 if it has no matrix product."""
    if not isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
        return 0
    return 2 * out.numel() * layer.weight[0].numel()


def flops(network: torch.nn.Module, images: torch.Tensor) -> float:
    """Multiplications and additions per image of convolutions and matrix products, forward and backward.

    Backward takes twice as many as forward, for the gradients of weights and of inputs. The first layer needs no
    gradient of its input.
    """
    counts: list[int] = []

    def count(layer: Any, _inputs: Any, out: torch.Tensor) -> None:
        counts.append(forward_flops(layer, out))

    layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        network(images[:1])
    for hook in hooks:
        hook.remove()
    return 3 * sum(counts) - counts[0]


def gemm_rate(bench: Bench, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product."""
    n = 8192 if bench.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
    return 2 * n**3 / bench.seconds(lambda: a @ b, least=1.0)


def reference_rate(device: torch.device, amp: torch.dtype | None, batch: int, least: float) -> float:
    """The rate of torchvision's alexnet with the step of its references/classification/train.py.

    That is torch's default memory format and optimiser, with autocast. Runs in its own process.
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
    """The paper's step against the matrix-product rate, the same step without LRN, and torchvision's alexnet."""
    images, labels = held_batch(bench.batch, bench.device)
    work = flops(AlexNet(), images.float().cpu())
    ranks = Ranks(gpu=bench.device.type == "cuda")
    ours, plain = started(ranks, bench.batch), started(ranks, bench.batch, lrn=False)
    peer = PeerStep(bench, import_torchvision().models.alexnet())
    dtype = ours.amp or torch.float32
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:

        def script(least: float = 3) -> float:
            return pool.submit(reference_rate, bench.device, ours.amp, bench.batch, least).result()

        script(0)  # starts the process
        rate, without, gemm, peer_rate, script_rate = bench.rates(
            lambda: step_rate(bench, lambda: train_step(ours, images, labels)),
            lambda: step_rate(bench, lambda: train_step(plain, images, labels)),
            lambda: gemm_rate(bench, dtype) / work,
            # float32, as torchvision's loader gives them
            lambda: step_rate(bench, lambda: peer(images.float(), labels)),
            script,
        )
    kind = str(dtype).removeprefix("torch.")
    yield Row(
        "step", f"paper network, batch {bench.batch}, {kind}", "images/s", rate,
        gemm, f"{work / 1e9:.2f} GFLOP per image at the {kind} matrix-product rate",
        script_rate, "torchvision alexnet, its reference script's step",
    )  # fmt: skip
    yield Row(
        "step", "against torchvision's network in our step", "images/s", rate,
        peer=peer_rate, peer_is="torchvision alexnet, channels-last, fused SGD, memory kept",
    )  # fmt: skip
    yield Row("step", "with LRN against without", "images/s", rate, without, "the same network without LRN")


def bench_train(bench: Bench) -> Iterator[Row]:
    """Training from shards, against training on one batch held in memory."""
    state = started(Ranks(gpu=bench.device.type == "cuda"), bench.batch)
    step = partial(train_step, state)
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

    ours, limit = bench.rates(shards, lambda: step_rate(bench, lambda: step(images, labels)))
    yield Row("train", "from shards", "images/s", ours, limit, "one batch held in memory")
