"""Has the network learnt more than how frequent the classes are?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHARE = 0.95  # of the loss of guessing; below, the network has left that level
STEPS = 300  # before these no run is called stuck, unless it ends


class Watch:
    """Compares an epoch's mean loss with the loss of always guessing the frequencies of the classes.

    A network on a plateau gives every image the same answer; its loss is then the entropy of the labels. Some
    initial weights and rates never leave that level, and the accuracy of the largest class hides it.

    Args:
        classes: how many there are.
        smoothing: label smoothing, which raises the loss of the best guess.
    """

    def __init__(self, classes: int, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing
        self.learnt, self.warned = False, False
        self.loss, self.steps = 0.0, 0  # of the epoch so far
        self.counts = torch.zeros(classes, dtype=torch.int64)

    def add(self, loss: float, steps: int, counts: Tensor) -> None:
        """Call with the mean loss of the last `steps` steps and how often each label came, int64 (classes,)."""
        self.loss += loss * steps
        self.steps += steps
        self.counts += counts.cpu()

    def guess(self) -> float:
        """The loss of the best constant answer to the labels seen in this epoch."""
        share = self.counts.double() / self.counts.sum().clamp(min=1)
        target = (1 - self.smoothing) * share + self.smoothing / len(share)
        return -torch.special.xlogy(target, target).sum().item()

    def epoch_ends(self, step: int, last: bool) -> dict[str, float] | None:
        """Call at the end of an epoch; returns the two losses once, when the network is found to guess.

        Args:
            step: steps since the start of the run.
            last: whether the run ends here.
        """
        mean, guess = self.loss / max(1, self.steps), self.guess()
        self.loss, self.steps = 0.0, 0
        self.counts.zero_()
        self.learnt = self.learnt or mean < SHARE * guess
        if self.learnt or self.warned or not (step >= STEPS or last):
            return None
        self.warned = True
        return {"loss": mean, "guess": guess}

    def advice(self, losses: dict[str, float], step: int, fresh_start: str | None) -> str:
        """One line for the user of a network that guesses.

        Args:
            losses: of `epoch_ends`.
            step: steps so far.
            fresh_start: the initial weights' scheme, None where the run began with existing weights.
        """
        if fresh_start in ("paper", "he"):
            remedy = "begin again with --init torch and another --out"
        else:
            remedy = "look at the labels with tools/show.py batch, and begin again with another --lr"
        return (
            f"the network only guesses after {step} steps: its training loss is {losses['loss']:.3f}, that of "
            f"always answering with the frequencies of the classes {losses['guess']:.3f}; {remedy}"
        )

    def state_dict(self) -> dict[str, Any]:
        state = {"learnt": self.learnt, "warned": self.warned, "loss": self.loss, "steps": self.steps}
        return state | {"counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learnt, self.warned = bool(state["learnt"]), bool(state["warned"])
        self.loss, self.steps = float(state["loss"]), int(state["steps"])
        self.counts.copy_(state["counts"])
