"""Detects a network that has learnt no more than the frequencies of the classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHARE = 0.95  # a network has learnt once its loss is below this share of the loss of guessing
STEPS = 300  # a run is not reported before this step unless it ends earlier


class Watch:
    """Compares an epoch's mean loss with the loss of always predicting the frequencies of the classes.

    A network on a plateau gives the same answer for every image, so its loss is the entropy of the labels. With
    some initial weights and learning rates it never leaves this plateau, which the accuracy alone may hide.

    Args:
        classes: number of classes.
        smoothing: label smoothing, which increases the loss of guessing.
    """

    def __init__(self, classes: int, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing
        self.learnt, self.warned = False, False
        self.loss, self.steps = 0.0, 0  # sum of the losses of this epoch, and their number
        self.counts = torch.zeros(classes, dtype=torch.int64)

    def add(self, loss: float, steps: int, counts: Tensor) -> None:
        """Add the mean loss of the last `steps` steps, and how often each label occurred, int64 (classes,)."""
        self.loss += loss * steps
        self.steps += steps
        self.counts += counts.cpu()

    def guess(self) -> float:
        """The loss of the best constant answer for the labels of this epoch."""
        share = self.counts.double() / self.counts.sum().clamp(min=1)
        target = (1 - self.smoothing) * share + self.smoothing / len(share)
        return -torch.special.xlogy(target, target).sum().item()

    def epoch_ends(self, step: int, last: bool) -> dict[str, float] | None:
        """Call at the end of an epoch; returns the loss and the loss of guessing if the network only guesses, once.

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
        """A line for the user about a network that only guesses.

        Args:
            losses: the result of `epoch_ends`.
            step: steps since the start of the run.
            fresh_start: the value of --init; None if the run started from existing weights.
        """
        if fresh_start in ("paper", "he"):
            remedy = "start again with --init torch and another --out"
        elif step < STEPS:
            remedy = "train longer (--epochs) before you change anything"
        else:
            remedy = "check the labels with tools/show.py batch, and start again with another --lr"
        return (
            f"the network only guesses after {step} steps: its training loss is {losses['loss']:.3f}, and "
            f"always predicting the frequencies of the classes gives {losses['guess']:.3f}; {remedy}"
        )

    def state_dict(self) -> dict[str, Any]:
        state = {"learnt": self.learnt, "warned": self.warned, "loss": self.loss, "steps": self.steps}
        return state | {"counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learnt, self.warned = bool(state["learnt"]), bool(state["warned"])
        self.loss, self.steps = float(state["loss"]), int(state["steps"])
        self.counts.copy_(state["counts"])
