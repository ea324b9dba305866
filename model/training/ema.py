"""An exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """An exponential moving average of a network's weights and buffers, for evaluation.

    After n steps the decay is min(decay, (1 + n) / (10 + n)), so that the first weights have little influence. The
    first step copies the weights.

    Attributes:
        network: the averaged network.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay, self._steps = decay, 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Call after each step of the optimiser. Does not wait for the device, unlike torch's AveragedModel."""
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps)) if self._steps else 0.0
        averaged, new = (list(chain(n.parameters(), n.buffers())) for n in (self.network, network))
        for old, value in zip(averaged, new, strict=True):
            if not old.is_floating_point():
                old.copy_(value)
        torch._foreach_lerp_(
            [t for t in averaged if t.is_floating_point()],
            [t for t in new if t.is_floating_point()],
            1 - decay,
        )
        self._steps += 1

    def state_dict(self, whole: Callable[[str, Tensor], Tensor] = lambda _, value: value) -> dict[str, Any]:
        """`whole(name, tensor)` gathers a whole tensor from the ranks' slices (`Layout.whole`)."""
        model = {name: whole(name, value) for name, value in self.network.state_dict().items()}
        return {"model": model, "steps": self._steps}

    def load_state_dict(
        self, state: dict[str, Any], part: Callable[[str, Tensor], Tensor] = lambda _, value: value
    ) -> None:
        """`part(name, tensor)` takes this rank's slice of a whole tensor (`Layout.part`)."""
        self.network.load_state_dict({name: part(name, value) for name, value in state["model"].items()})
        self._steps = state["steps"]
