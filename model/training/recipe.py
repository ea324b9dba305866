"""Initial weights, optimiser and learning-rate schedule (paper, section 5)."""

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
    """A layer's initial weights, N(0, std), and its constant bias; with std None, PyTorch's defaults for both."""

    std: float | None
    bias: float = 0.0


def _torch(layer: str, fan_in: int) -> Start:
    """PyTorch's defaults, as in torchvision's alexnet: weights and biases uniform within 1 / sqrt(fan_in)."""
    return Start(None)


def _paper(layer: str, fan_in: int) -> Start:
    """Section 5 of the paper: N(0, 0.01); biases 1 in conv2, conv4, conv5 and the hidden layers.

    Known to learn nothing for many steps or at all (BVLC/caffe, pull request 327).
    """
    return Start(0.01, 1.0 if layer in ("conv2", "conv4", "conv5", "hidden") else 0.0)


def _cuda_convnet2(layer: str, fan_in: int) -> Start:
    """layers-imagenet-1gpu.cfg of the author's cuda-convnet2: N(0, 0.03) in conv3 to conv5."""
    return Start(0.03 if layer in ("conv3", "conv4", "conv5") else 0.01, _paper(layer, fan_in).bias)


def _he(layer: str, fan_in: int) -> Start:
    """He et al. 2015: variance 2 / fan_in, zero biases; N(0, 0.01) in the last layer.

    Too large without batch normalisation, because pixels are in 0..255.
    """
    return Start(0.01 if layer == "last" else math.sqrt(2 / fan_in))


def _cuda_convnet(layer: str, fan_in: int) -> Start:
    """cuda-convnet's layers-80sec.cfg and layers-18pct.cfg, for the variants of these names; zero biases."""
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
    """Draw the initial weights; the same seed gives the same weights on every device and rank.

    Args:
        model: an AlexNet, or any network of convolutions and fully connected layers.
        scheme: one of INITS.
        seed: seed of the random numbers; the global random state does not change.

    Raises:
        ModelError: the scheme is unknown, or is cuda-convnet's and the network is not one of the CIFAR variants.
    """
    check_init(scheme, getattr(model, "variant", ""))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    convolutions = sum(isinstance(m, nn.Conv2d) for m in layers)
    # the paper's numbers, even if a layer is omitted
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
    """Raises ModelError if the scheme is unknown or is not for this variant."""
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
    """SGD with the paper's update rule, or LARS; weight decay does not apply to biases and norms.

    The paper updates v = 0.9 v - 0.0005 lr w - lr g. torch's SGD keeps u = -v / lr, which is the same as long as lr
    is constant; `set_lr` keeps it the same when lr changes.

    Args:
        model: parameters that need no gradient are ignored.
        lr, momentum, weight_decay: see section 5 of the paper.
        kind: one of OPTIMIZERS.
        sum_of_slices: see LARS.
        bias_lr: learning rate of biases and norms relative to that of weights; 2 in cuda-convnet and Caffe.
        layer_decay: weight decay of individual layers by name ("fc10").

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
        raise ModelError("--layer-decay needs --optimizer sgd: lars has one weight decay for all layers")
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
        # torch leaves the buffer uninitialised if float16 overflows in the first step
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _weight_of(layer: str, weights: Mapping[str, Tensor]) -> str:
    """The name of the weight of `layer`: "fc10" -> "classifier.fc10.weight"."""
    known = {name.split(".")[-2]: name for name in weights}
    if layer not in known:
        raise ModelError(f"there is no layer {layer} to decay: choose from {', '.join(known)}")
    return known[layer]


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rates for large batches (You, Gitman, Ginsburg 2017, arXiv:1708.03888, algorithm 1).

        l = trust |w| / (|g| + decay |w|)        v <- momentum v + lr l (g + decay w)        w <- w - v

    for each tensor in the first group of parameters, the weights. The other groups, biases and norms, are updated
    by plain SGD. v is kept as in torch's SGD, so `set_lr` applies.

    Args:
        groups: parameter groups; the `weight_decay` of the first one is the formula's decay.
        lr, momentum: as for SGD.
        sum_of_slices: takes one row of values per parameter and returns their sums over the ranks that hold slices
            of that parameter (`Layout.sum_of_slices`).
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
        # step() applies the decay, so SGD must not
        weights["decay"], weights["weight_decay"], weights["trust"] = weights["weight_decay"], 0.0, trust
        self.sum_of_slices = sum_of_slices
        # the norms need unscaled gradients, so GradScaler must unscale them before the step
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
        rates = torch.where((w > 0) & (g > 0), rates, 1.0)  # so that a layer of zeros can start
        torch._foreach_add_(gradients, parameters, alpha=group["decay"])
        torch._foreach_mul_(gradients, list(rates.unbind()))
        return super().step(closure)


def set_lr(optimizer: torch.optim.SGD, lr: float) -> None:
    """Set the learning rate of the next step and preserve the paper's velocity v.

    torch's buffer is v divided by the rate. Instead of rescaling the buffers, which would take a pass over all
    weights, the next update's momentum becomes momentum * old / new. If float16 overflows in that step, it is
    skipped and the velocity is off by this ratio for some steps.
    """
    for group in optimizer.param_groups:
        old, group["lr"] = group["lr"], lr * group["scale"]
        group["momentum"] = group["base_momentum"] * (old / group["lr"] if group["lr"] else 1.0)


# --- schedule ------------------------------------------------------------------------------------------------


class Schedule:
    """The learning rate of each step.

    "plateau" (paper) divides the rate by 10 if the validation error has not improved for `patience` epochs. "step"
    divides it by 10 at each of `milestones`, by default after each third of `epochs`. "cosine" decays it to zero.
    All start with a linear warm-up from zero.

    Args:
        kind: one of SCHEDULES.
        lr: the rate after the warm-up.
        epochs: number of epochs of the whole run.
        steps_per_epoch: number of steps per epoch.
        warmup_epochs: length of the warm-up, which may be a fraction.
        patience: number of epochs, for "plateau".
        milestones: increasing numbers of epochs, for "step".
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
        """The rate of step `step`, counted from 0 at the start of the run."""
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

        Ignores epochs of a network that is still `guessing`, because a lower rate would keep it from learning.
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
