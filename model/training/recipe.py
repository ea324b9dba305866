"""How the network is trained: initial weights, optimiser, learning-rate schedule (paper, section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from base.errors import ModelError

OPTIMIZERS = ("sgd", "lars")
SCHEDULES = ("plateau", "step", "cosine")


# --- initial weights -----------------------------------------------------------------------------------------


class Start(NamedTuple):
    """One layer's initial weights and biases: N(0, std) and a constant; std None: PyTorch's own for both."""

    std: float | None
    bias: float = 0.0


def _torch(layer: str, fan_in: int) -> Start:
    """PyTorch's own defaults, as in torchvision's alexnet: weights and biases uniform within 1 / sqrt(fan_in)."""
    return Start(None)


def _paper(layer: str, fan_in: int) -> Start:
    """Section 5 of the paper: N(0, 0.01); biases 1 in conv2, conv4, conv5 and the hidden layers.

    Known to stay at the level of guessing for long or for good (BVLC/caffe, pull request 327).
    """
    return Start(0.01, 1.0 if layer in ("conv2", "conv4", "conv5", "hidden") else 0.0)


def _cuda_convnet2(layer: str, fan_in: int) -> Start:
    """The paper's author's own file, cuda-convnet2's layers-imagenet-1gpu.cfg: N(0, 0.03) in conv3 to conv5."""
    return Start(0.03 if layer in ("conv3", "conv4", "conv5") else 0.01, _paper(layer, fan_in).bias)


def _he(layer: str, fan_in: int) -> Start:
    """He et al. 2015: variance 2 / fan_in, zero biases; N(0, 0.01) in the last layer.

    Without batch normalisation it is too large for pixels in levels.
    """
    return Start(0.01 if layer == "last" else math.sqrt(2 / fan_in))


def _cuda_convnet(layer: str, fan_in: int) -> Start:
    """cuda-convnet's layers-80sec.cfg and layers-18pct.cfg, for the variants of those names; biases are zero."""
    return Start({"conv1": 0.0001, "conv2": 0.01, "conv3": 0.01, "last of one": 0.01}.get(layer, 0.1))


INITS = {
    "torch": _torch,
    "cuda-convnet2": _cuda_convnet2,
    "paper": _paper,
    "he": _he,
    "cuda-convnet": _cuda_convnet,
}


@torch.no_grad()
def initialise(model: nn.Module, scheme: str, seed: int = 0) -> None:
    """Draw all weights anew, the same for the same seed on every device and rank.

    Args:
        model: an AlexNet, or any network of convolutions and fully connected layers.
        scheme: one of INITS; what each does, and where it is from, stands there.
        seed: of the draws; the caller's random state stays as it was.

    Raises:
        ModelError: an unknown scheme, or cuda-convnet's for a network other than its own two.
    """
    check_init(scheme, getattr(model, "variant", ""))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    convolutions = sum(isinstance(m, nn.Conv2d) for m in layers)
    # by the paper's numbers, also where a layer is left out
    numbers = getattr(model, "convolutions", range(1, 1 + convolutions))
    linears = len(layers) - convolutions
    names = [f"conv{n}" for n in numbers] + ["hidden"] * (linears - 1)
    names += ["last of one" if linears == 1 and scheme == "cuda-convnet" else "last"] * (linears > 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in zip(names, layers, strict=True):
            start = INITS[scheme](name, layer.weight[0].numel())
            if start.std is None:
                layer.reset_parameters()
                continue
            layer.weight.normal_(0, start.std)
            if layer.bias is not None:
                layer.bias.fill_(start.bias)


def check_init(scheme: str, variant: str) -> None:
    """Raises ModelError for an unknown scheme, or cuda-convnet's for a network other than its own two."""
    if scheme not in INITS:
        raise ModelError(f"init is {scheme!r}: use one of {', '.join(INITS)}")
    if scheme == "cuda-convnet" and not variant.startswith("cifar"):
        raise ModelError(
            "--init cuda-convnet is for the variants cifar-80sec and cifar-18pct: use cuda-convnet2"
        )


# --- optimiser -----------------------------------------------------------------------------------------------


def build_optimizer(
    model: nn.Module,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    kind: str = "sgd",
    sum_of_slices: Callable[[Tensor, list[nn.Parameter]], Tensor] | None = None,
    *,
    bias_lr: float = 1.0,
    layer_decay: Mapping[str, float] | None = None,
) -> torch.optim.SGD:
    """SGD as in the paper's update rule, weight decay on weights only (not on biases and norms); or LARS.

    torch's SGD keeps u = -v / lr where the paper keeps v = 0.9 v - 0.0005 lr w - lr g; the two are the same
    as long as lr stays, and `set_lr` makes them the same when it changes.

    Args:
        model: parameters that need no gradient are left out.
        lr, momentum, weight_decay: see section 5 of the paper.
        kind: one of OPTIMIZERS.
        sum_of_slices: see LARS.
        bias_lr: the rate of biases and norms over that of weights; 2 in cuda-convnet and Caffe.
        layer_decay: layer ("fc10") -> its own weight decay.

    Raises:
        ModelError: an unknown kind or layer.
    """
    if kind not in OPTIMIZERS:
        raise ModelError(f"optimizer is {kind!r}: use one of {', '.join(OPTIMIZERS)}")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: p for name, p in trained.items() if p.ndim > 1}
    own = {
        name: decay for layer, decay in (layer_decay or {}).items() if (name := _weight_of(layer, weights))
    }
    if own and kind == "lars":
        raise ModelError("a weight decay by layer goes with --optimizer sgd: lars has one for all layers")
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in weights.items() if name not in own], "weight_decay": weight_decay},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0, "scale": bias_lr},
        *({"params": [weights[name]], "weight_decay": decay} for name, decay in own.items()),
    ]
    for group in groups:
        group["scale"] = group.get("scale", 1.0)
        group |= {"lr": lr * group["scale"], "momentum": momentum, "base_momentum": momentum}
    optimizer: torch.optim.SGD
    if kind == "lars":
        optimizer = LARS(groups, lr, momentum, sum_of_slices)
    else:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    for parameter in trained.values():
        # torch would take the buffer's memory as it finds it if float16 overflows in the very first step
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _weight_of(layer: str, weights: Mapping[str, Tensor]) -> str:
    """The name of the weight of `layer`: "fc10" -> "classifier.fc10.weight"."""
    known = {name.split(".")[-2]: name for name in weights}
    if layer not in known:
        raise ModelError(f"there is no layer {layer} to decay: choose of {', '.join(known)}")
    return known[layer]


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


def set_lr(optimizer: torch.optim.SGD, lr: float) -> None:
    """Set the rate of the next step, and keep the paper's velocity v across the change.

    torch's buffer is v in units of the rate, so its next update takes the ratio of the two rates into the momentum
    factor: momentum * old / new. That costs nothing, where scaling the buffers would pass over all weights. If
    float16 overflows in just that step, which is then skipped, the velocity is off by the ratio for some steps.
    """
    for group in optimizer.param_groups:
        old, group["lr"] = group["lr"], lr * group["scale"]
        group["momentum"] = group["base_momentum"] * (old / group["lr"] if group["lr"] else 1.0)


# --- schedule ------------------------------------------------------------------------------------------------


class Schedule:
    """The learning rate at each step, counted from the start of training.

    'plateau' (paper): divided by 10 whenever the validation error has not improved for `patience` epochs. 'step':
    divided by 10 at each of `milestones`, by default after each third of `epochs`. 'cosine': to zero at the end.
    All rise linearly from zero over the first `warmup_epochs`.

    Args:
        kind: one of SCHEDULES.
        lr: the rate after the warm-up.
        epochs: of the whole run; steps_per_epoch: steps in each.
        warmup_epochs: may be a fraction.
        patience: in epochs.
        milestones: in epochs, rising.
    """

    def __init__(
        self,
        kind: str,
        lr: float,
        epochs: int,
        steps_per_epoch: int,
        warmup_epochs: float = 0,
        patience: int = 5,
        milestones: Sequence[int] = (),
    ) -> None:
        if kind not in SCHEDULES:
            raise ModelError(f"schedule is {kind!r}: use one of {', '.join(SCHEDULES)}")
        self.kind, self.base_lr, self.patience = kind, lr, patience
        self.total, self.warmup = epochs * steps_per_epoch, round(warmup_epochs * steps_per_epoch)
        self.steps_per_epoch, self.milestones = steps_per_epoch, tuple(milestones)
        self.drops, self.best, self.bad_epochs = 0, math.inf, 0

    def lr(self, step: int) -> float:
        """The rate of step `step`."""
        if step < self.warmup:
            return self.base_lr * ((step + 1) / self.warmup)
        if self.kind == "plateau":
            return self.base_lr * 0.1**self.drops
        if self.kind == "step":
            past = sum(step >= epoch * self.steps_per_epoch for epoch in self.milestones)
            thirds = min(2, int(3 * step / max(1, self.total)))
            return self.base_lr * 0.1 ** (past if self.milestones else thirds)
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.base_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def validated(self, error: float, guessing: bool = False) -> None:
        """Call after each epoch with the validation error in 0..1.

        An epoch of a network that is still `guessing` does not count: dividing the rate would keep it there.
        """
        if guessing:
            return
        if error < self.best:
            self.best, self.bad_epochs = error, 0
        else:
            self.bad_epochs += 1
            if self.bad_epochs >= self.patience:
                self.drops, self.bad_epochs = self.drops + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"drops": self.drops, "best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drops, self.best = int(state["drops"]), float(state["best"])
        self.bad_epochs = int(state["bad_epochs"])
