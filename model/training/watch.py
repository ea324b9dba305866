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
        self.classes = classes
        self.learnt, self.warned = False, False
        # of the last steps: mean losses, the numbers of their steps, and how often each label occurred
        self.recent: deque[tuple[float, int, Tensor]] = deque()

    def add(self, loss: float, steps: int, counts: Tensor) -> None:
        """Add the mean loss of the last `steps` steps, and how often each label occurred, int64 (classes,)."""
        self.recent.append((loss, steps, counts.cpu().clone()))
        while self._steps() - self.recent[0][1] >= self.span:
            self.recent.popleft()
        self.learnt = self.learnt or (self._steps() >= self.span and self.loss() < SHARE * self.guess())

    def _steps(self) -> int:
        return sum(steps for _, steps, _ in self.recent)

    def loss(self) -> float:
        """The mean loss of the last RECENT steps or of an epoch, or of a few more steps."""
        return sum(loss * steps for loss, steps, _ in self.recent) / max(1, self._steps())

    def guess(self) -> float:
        """The loss of the best constant answer for the labels of the same steps."""
        counts = torch.zeros(self.classes, dtype=torch.int64)
        for *_, labels in self.recent:
            counts += labels
        share = counts.double() / counts.sum().clamp(min=1)
        target = (1 - self.smoothing) * share + self.smoothing / self.classes
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
        return {"learnt": self.learnt, "warned": self.warned, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also takes the state of earlier versions, which had the sums of an epoch."""
        self.learnt, self.warned = bool(state["learnt"]), bool(state["warned"])
        recent = state.get("recent")
        if recent is None:
            steps = state["steps"]
            recent = [(state["loss"] / steps, steps, state["counts"])] if steps else []
        zeros = torch.zeros(self.classes, dtype=torch.int64)
        self.recent = deque((float(loss), int(steps), zeros + counts) for loss, steps, counts in recent)
