"""What current recipes add to the paper's: mixup, label smoothing, averaged weights. All off by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def mix(images: Tensor, keep: Tensor) -> Tensor:
    """Each image blended with its neighbour (rows 0 and 1, 2 and 3, ...): mixup (Zhang et al., arXiv:1710.09412).

    images: (N, 3, H, W), N even; keep: (N,) in 0..1, how much of itself each image keeps. Returns a new tensor
    of the same dtype and memory format.
    """
    return torch.lerp(
        images[neighbours(len(images), images.device)], images, keep.to(images)[:, None, None, None]
    )


def cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, keep: Tensor | None = None
) -> Tensor:
    """Mean cross entropy of logits (N, classes) with labels (N,); after `mix`, with both images' labels.

    `smoothing` gives that share of the target to all classes alike (Szegedy et al., arXiv:1512.00567).
    """
    if keep is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    own = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    other = labels[neighbours(len(labels), labels.device)]
    others = F.cross_entropy(logits, other, label_smoothing=smoothing, reduction="none")
    return torch.lerp(others, own, keep.to(own)).mean()


def neighbours(n: int, device: torch.device) -> Tensor:
    """1, 0, 3, 2, ...: whom each of n rows is mixed with."""
    return torch.arange(n, device=device) ^ 1


class Ema:
    """An exponential moving average of a network's weights and buffers, for evaluation.

    The first step's weights are taken as they are; after n steps the next is averaged in with the decay
    min(decay, (1 + n) / (10 + n)), so that the first are soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        def average(averaged: Tensor, new: Tensor, _count: Tensor | int) -> Tensor:
            if not averaged.is_floating_point():
                return new
            return torch.lerp(new, averaged, min(decay, (1 + self._steps) / (10 + self._steps)))

        self._steps = 0  # the library's own count would have to be fetched from the device
        self._averaged = AveragedModel(network, avg_fn=average, use_buffers=True)

    @property
    def network(self) -> nn.Module:
        """The averaged network."""
        return self._averaged.module

    def update(self, network: nn.Module) -> None:
        """To be called after each step of the optimiser."""
        self._averaged.update_parameters(network)
        self._steps += 1

    def state_dict(self, whole: Callable[[str, Tensor], Tensor] = lambda _, value: value) -> dict[str, Any]:
        """`whole(name, tensor)` makes a whole tensor of a rank's slice (`model.layouts.Layout.whole`)."""
        model = {name: whole(name, value) for name, value in self.network.state_dict().items()}
        return {"model": model, "steps": self._steps}

    def load_state_dict(
        self, state: dict[str, Any], part: Callable[[str, Tensor], Tensor] = lambda _, value: value
    ) -> None:
        """`part(name, tensor)` takes a rank's slice of a whole tensor (`model.layouts.Layout.part`)."""
        self.network.load_state_dict({name: part(name, value) for name, value in state["model"].items()})
        self._steps = state["steps"]
        self._averaged.n_averaged.fill_(self._steps)
