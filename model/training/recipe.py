"""How the network is trained: initialisation, optimiser, learning-rate schedule (paper, section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import ModelError

INITS = ("paper", "he", "torch")
OPTIMIZERS = ("sgd", "lars")
SCHEDULES = ("plateau", "step", "cosine")
DEFAULT_INIT = {"paper": "paper", "owt": "torch", "bn": "he", "cifar": "torch"}


@torch.no_grad()
def initialise(model: nn.Module, scheme: str = "paper", seed: int = 0) -> None:
    """Draw all weights anew, the same for the same seed on every device and rank.

    'paper' (section 5): weights N(0, 0.01); biases 1 in the second, fourth and fifth convolution and in the
    hidden fully connected layers, else 0. 'he': variance 2 / fan_in (He et al. 2015) with zero biases, and
    N(0, 0.01) in the last layer; without batch normalisation too large for pixels in levels. 'torch': the
    layers' own defaults, as in torchvision's alexnet; leaves the plateau sooner that the paper's begins on.
    """
    if scheme not in INITS:
        raise ModelError(f"init is {scheme!r}: use one of {', '.join(INITS)}")
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d)]
    hidden = [m for m in layers if isinstance(m, nn.Linear)][:-1]
    # by the paper's numbers, also where a layer is left out
    numbers = getattr(model, "convolutions", range(1, 1 + len(convolutions)))
    second = {id(m) for number, m in zip(numbers, convolutions, strict=True) if number in (2, 4, 5)}
    ones = second | {id(m) for m in hidden}
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        for layer in layers:
            if scheme == "torch":
                layer.reset_parameters()
                continue
            fan_in = layer.weight[0].numel()
            std = 0.01 if scheme == "paper" or layer is layers[-1] else math.sqrt(2 / fan_in)
            layer.weight.normal_(0, std)
            if layer.bias is not None:
                layer.bias.fill_(1.0 if scheme == "paper" and id(layer) in ones else 0.0)


def build_optimizer(
    model: nn.Module,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    kind: str = "sgd",
    sum_of_slices: Callable[[Tensor, list[nn.Parameter]], Tensor] | None = None,
) -> torch.optim.SGD:
    """SGD as in the paper's update rule, weight decay on weights only (not on biases and norms); or LARS.

    torch's SGD keeps u = -v / lr where the paper keeps v = 0.9 v - 0.0005 lr w - lr g; the two are the same
    as long as lr stays, and `set_lr` makes them the same when it changes. `sum_of_slices`: see LARS.
    """
    if kind not in OPTIMIZERS:
        raise ModelError(f"optimizer is {kind!r}: use one of {', '.join(OPTIMIZERS)}")
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer: torch.optim.SGD
    if kind == "lars":
        optimizer = LARS(groups, lr, momentum, sum_of_slices)
    else:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    for parameter in (*weights, *others):
        # torch would take the buffer's memory as it finds it if float16 overflows in the very first step
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class LARS(torch.optim.SGD):
    """A rate for each layer, for large batches (You, Gitman, Ginsburg 2017, arXiv:1708.03888, algorithm 1).

        l = trust |w| / (|g| + decay |w|)        v <- momentum v + lr l (g + decay w)        w <- w - v

    for each tensor of the first group of parameters, the weights; other groups, biases and norms, take plain
    SGD's steps. Kept as SGD keeps v, so `set_lr` applies.

    Args:
        groups: of the first, `weight_decay` is the formula's decay.
        sum_of_slices: of values, one row a parameter, the sums over the ranks that hold slices of that parameter.
        trust: 0.001 in the paper.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float,
        sum_of_slices: Callable[[Tensor, list[nn.Parameter]], Tensor] | None = None,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, fused=True)
        weights = self.param_groups[0]
        # SGD's own decay would come on top
        weights["decay"], weights["weight_decay"], weights["trust"] = weights["weight_decay"], 0.0, trust
        self.sum_of_slices = sum_of_slices
        # the norms are of gradients without a loss scale, so GradScaler must take it off before the step
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        parameters = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        norms = [torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, gradients)]
        squares = torch.stack(norms, 1).square()
        if self.sum_of_slices:
            squares = self.sum_of_slices(squares, parameters)
        w, g = squares.sqrt().unbind(1)
        rates = group["trust"] * w / (g + group["decay"] * w)
        rates = torch.where((w > 0) & (g > 0), rates, 1.0)  # a layer of zeros must be able to begin
        torch._foreach_add_(gradients, parameters, alpha=group["decay"])
        torch._foreach_mul_(gradients, list(rates.unbind()))
        return super().step(closure)


@torch.no_grad()
def set_lr(optimizer: torch.optim.SGD, lr: float) -> None:
    """Change the learning rate and keep the paper's velocity v, which lives in units of the old rate."""
    for group in optimizer.param_groups:
        old, group["lr"] = group["lr"], lr
        if old == lr or lr == 0:
            continue
        for parameter in group["params"]:
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                buffer.mul_(old / lr)


class Schedule:
    """The learning rate at each step, counted from the start of training.

    'plateau' (paper): divided by 10 whenever the validation error has not improved for `patience` epochs.
    'step': divided by 10 every third of `epochs`. 'cosine': to zero at the end. All rise linearly from zero
    over the first `warmup_epochs`.
    """

    def __init__(
        self,
        kind: str,
        lr: float,
        epochs: int,
        steps_per_epoch: int,
        warmup_epochs: float = 0,
        patience: int = 5,
    ) -> None:
        if kind not in SCHEDULES:
            raise ModelError(f"schedule is {kind!r}: use one of {', '.join(SCHEDULES)}")
        self.kind, self.base_lr, self.patience = kind, lr, patience
        self.total, self.warmup = epochs * steps_per_epoch, round(warmup_epochs * steps_per_epoch)
        self.steps_per_epoch = steps_per_epoch
        self.drops, self.best, self.bad_epochs = 0, math.inf, 0

    def lr(self, step: int) -> float:
        """The rate of step `step`."""
        if step < self.warmup:
            return self.base_lr * ((step + 1) / self.warmup)
        if self.kind == "plateau":
            return self.base_lr * 0.1**self.drops
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        if self.kind == "cosine":
            return self.base_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.base_lr * 0.1 ** min(2, int(3 * step / max(1, self.total)))

    def validated(self, error: float) -> None:
        """To be told the validation error after each epoch."""
        if error < self.best:
            self.best, self.bad_epochs = error, 0
        else:
            self.bad_epochs += 1
            if self.bad_epochs >= self.patience:
                self.drops, self.bad_epochs = self.drops + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"drops": self.drops, "best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drops, self.best, self.bad_epochs = state["drops"], state["best"], state["bad_epochs"]
