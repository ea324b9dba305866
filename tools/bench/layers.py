"""Stage layers: how long each layer takes in a training step, against its own limit on this machine."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.parallel.ranks import Ranks
from model.training.state import TrainState
from model.training.step import train_step
from tools.bench.core import Bench, Row
from tools.bench.step import forward_flops, gemm_rate, held_batch, started

ADDED = 2**28  # bytes, more than caches hold
STEPS = 10  # per round


class Stopwatch:
    """Measures the parts of a step; each lasts until the next one begins.

    Args:
        device: on a GPU, times are those of its own clock, by CUDA events.
    """

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def begin(self, part: str) -> None:
        now: Any = time.perf_counter()
        if self.gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((part, now))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part since the last call, without the part that began last."""
        if self.gpu:
            torch.cuda.synchronize()
        taken: dict[str, float] = {}
        for (part, start), (_, end) in itertools.pairwise(self._marks):
            lasted = start.elapsed_time(end) / 1000 if self.gpu else end - start
            taken[part] = taken.get(part, 0.0) + lasted
        self._marks.clear()
        return taken


class Needs(NamedTuple):
    """The least work of a part of a step: its arithmetic, and each of its tensors read or written once."""

    flops: int
    bytes: int

    def limit(self, flops_per_second: float, bytes_per_second: float) -> tuple[float, str]:
        """The seconds that it takes at these rates, and which of the two rates limits it."""
        return max((self.flops / flops_per_second, "products"), (self.bytes / bytes_per_second, "memory"))


def needs(layer: nn.Module, x: Tensor, y: Tensor, first: bool) -> tuple[Needs, Needs]:
    """What a layer's forward and backward pass from x to y need; the first layer needs no gradient of x."""
    flops = forward_flops(layer, y)
    weights = sum(parameter.nbytes for parameter in layer.parameters())
    gradients = 1 if first else 2  # of the weights, and of x
    return (
        Needs(flops, x.nbytes + y.nbytes + weights),
        Needs(gradients * flops, gradients * x.nbytes + y.nbytes + 2 * weights),
    )


def watch(state: TrainState, stopwatch: Stopwatch) -> dict[str, Needs]:
    """Let each step of `state` tell the stopwatch what begins; returns what each part needs, after a first step.

    The network's loss and what happens between the steps are called "rest".
    """
    work: dict[str, Needs] = {}
    layers = [
        (name, layer)
        for part in (state.network.features, state.network.classifier)
        for name, layer in part.named_children()
        if not isinstance(layer, nn.Identity)
    ]
    last = layers[-1][1]

    def follow(name: str, layer: nn.Module) -> None:
        forward, backward = f"{name}, forward", f"{name}, backward"

        def ends(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            work[forward], work[backward] = needs(layer, inputs[0], y, first=layer is layers[0][1])
            if layer is last:
                stopwatch.begin("rest")
            y.register_hook(lambda gradient: stopwatch.begin(backward))

        layer.register_forward_pre_hook(lambda layer, inputs: stopwatch.begin(forward))
        layer.register_forward_hook(ends)

    for name, layer in layers:
        follow(name, layer)

    def updates(*_: Any) -> None:
        # reads weights, gradients and momentum, and writes weights and momentum
        work["SGD"] = Needs(0, 5 * sum(parameter.nbytes for parameter in state.network.parameters()))
        stopwatch.begin("SGD")

    state.optimizer.register_step_pre_hook(updates)
    state.optimizer.register_step_post_hook(lambda *_: stopwatch.begin("rest"))
    return work


def memory_rate(bench: Bench) -> float:
    """Bytes per second of a large sum in place, which reads two tensors and writes one."""
    a, b = (torch.ones(ADDED // 4, device=bench.device) for _ in range(2))
    return 3 * ADDED / bench.seconds(lambda: a.add_(b))


def bench_layers(bench: Bench) -> Iterator[Row]:
    """Each layer's forward and backward pass in real steps, the update, and the whole step, against their limits.

    The limit is the arithmetic at the rate of a large matrix product, or each tensor read or written once at the
    rate of a large sum, whichever takes longer. A layer's time includes autocast's copies of its weights and
    gradients, and what lies between it and the next layer.
    """
    images, labels = held_batch(bench.batch, bench.device)
    state, stopwatch = started(Ranks(gpu=bench.device.type == "cuda"), bench.batch), Stopwatch(bench.device)
    work = watch(state, stopwatch)
    steps: list[dict[str, float]] = []
    rates: list[tuple[float, float]] = []
    for _ in range(bench.rounds):
        rates.append((gemm_rate(bench, state.amp or torch.float32), memory_rate(bench)))
        train_step(state, images, labels)  # a warm-up
        stopwatch.seconds()
        for _ in range(STEPS):  # without waiting for the device after each, as in training
            stopwatch.begin("rest")
            train_step(state, images, labels)
        stopwatch.begin("rest")
        taken = {part: seconds / STEPS for part, seconds in stopwatch.seconds().items()}
        steps.append(taken | {"whole step": sum(taken.values())})
    products, memory = (max(values) for values in zip(*rates, strict=True))
    limits = {part: least.limit(products, memory) for part, least in work.items()}
    limits["whole step"] = sum(seconds for seconds, _ in limits.values()), "sum of these"
    for part, (limit, limit_is) in limits.items():
        took = statistics.median(step[part] for step in steps)
        yield Row(
            "layers",
            f"{part}: {took * 1e3:,.1f} ms",
            "images/s",
            bench.batch / took,
            bench.batch / limit,
            limit_is,
        )
