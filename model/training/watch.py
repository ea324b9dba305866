"""Detects a network that has learnt no more than the frequencies of the classes."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

SHARE = 0.95  # a network has learnt once its loss is below this share of the loss of guessing
STEPS = 300  # a run is not reported before this step unless it ends earlier
RECENT = 100  # steps over which the loss is averaged; fewer if an epoch is shorter


class Watch:
    """Compares the loss of the last steps with the loss of always predicting the frequencies of the classes.

    A network on a plateau gives the same answer for every image, so its loss is the entropy of the labels. With
    some initial weights and learning rates it never leaves this plateau, which the accuracy alone may hide.

    Args:
        classes: number of classes.
        smoothing: label smoothing, which increases the loss of guessing.
        steps_per_epoch: number of steps.
    """

    def __init__(self, classes: int, smoothing: float = 0.0, steps_per_epoch: int = RECENT) -> None:
        self.smoothing = smoothing
        self.span = min(RECENT, steps_per_epoch)
        self.learnt, self.warned = False, False
        self.recent: deque[tuple[float, int]] = deque()  # mean losses, and the numbers of their steps
        self.counts = torch.zeros(classes, dtype=torch.int64)  # of all labels so far

    def add(self, loss: float, steps: int, counts: Tensor) -> None:
        """Add the mean loss of the last `steps` steps, and how often each label occurred, int64 (classes,)."""
        self.recent.append((loss, steps))
        while sum(steps for _, steps in self.recent) - self.recent[0][1] >= self.span:
            self.recent.popleft()
        self.counts += counts.cpu()
        enough = sum(steps for _, steps in self.recent) >= self.span
        self.learnt = self.learnt or (enough and self.loss() < SHARE * self.guess())

    def loss(self) -> float:
        """The mean loss of the last RECENT steps or of an epoch, or of a few more steps."""
        steps = sum(steps for _, steps in self.recent)
        return sum(loss * steps for loss, steps in self.recent) / max(1, steps)

    def guess(self) -> float:
        """The loss of the best constant answer for the labels so far."""
        share = self.counts.double() / self.counts.sum().clamp(min=1)
        target = (1 - self.smoothing) * share + self.smoothing / len(share)
        return -torch.special.xlogy(target, target).sum().item()

    def epoch_ends(self, step: int, last: bool) -> dict[str, float] | None:
        """Call at the end of an epoch; returns the loss and the loss of guessing if the network only guesses, once.

        Args:
            step: steps since the start of the run.
            last: whether the run ends here.
        """
        if self.learnt or self.warned or not (step >= STEPS or last):
            return None
        self.warned = True
        return {"loss": self.loss(), "guess": self.guess()}

    def advice(self, losses: dict[str, float], step: int, poor_start: bool) -> str:
        """A line for the user about a network that only guesses.

        Args:
            losses: the result of `epoch_ends`.
            step: steps since the start of the run.
            poor_start: whether the initial weights often keep this network from learning.
        """
        if poor_start:
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
        state = {"learnt": self.learnt, "warned": self.warned, "recent": list(self.recent)}
        return state | {"counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learnt, self.warned = bool(state["learnt"]), bool(state["warned"])
        self.recent = deque((float(loss), int(steps)) for loss, steps in state["recent"])
        self.counts.copy_(state["counts"])
