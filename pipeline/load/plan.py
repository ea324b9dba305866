"""The sample, crop, flip and colour shift at each step, as a pure function of (seed, epoch, step, position).

The only cached value is the order of the current epoch. A run therefore resumes exactly in mid-epoch, and the
stream does not depend on the number of ranks, as long as the global batch is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from base.errors import DataError

ORDER, VIEW, DROPOUT, MIXUP = range(4)  # one Philox key per purpose, so that the streams never overlap
AUGMENTATIONS = ("all", "crop", "flip", "none")


class Views(NamedTuple):
    """Crop, flip and colour of each sample of one global batch of N."""

    anchor: np.ndarray  # (N, 2) int32: top row and left column of the crop, pixels
    flip: np.ndarray  # (N,) int32: 1 mirrors left to right
    color: np.ndarray  # (N, 3) float32: the paper's a1..a3, one draw of N(0, color_std) per image and use


@dataclass(frozen=True)
class Plan:
    """The random decisions of a training run (paper, section 4.1).

    The data set has `count` samples; a step over all ranks uses `global_batch` of them. Crop offsets are in
    0..size-crop-1 in both axes, which gives the paper's 32 * 32 * 2 = 2048 views for sizes of 256 and 224. Each
    epoch has its own order, whose last `count % global_batch` samples are left out. Raises DataError if the data
    set is smaller than one global batch.
    """

    count: int
    global_batch: int
    seed: int = 0
    size: int = 256
    crop: int = 224
    augment: str = "all"
    color_std: float = 0.1
    _order: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.count < self.global_batch:
            raise DataError(
                f"the training set has {self.count} images, fewer than one global batch of {self.global_batch}: "
                f"use --global-batch {max(1, self.count)} or less"
            )
        if not 0 < self.crop <= self.size:
            raise DataError(f"a crop of {self.crop} does not fit into images of {self.size} pixels")
        if self.augment not in AUGMENTATIONS:
            raise DataError(f"augment is {self.augment!r}: use one of {', '.join(AUGMENTATIONS)}")

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.global_batch

    def _generator(self, purpose: int, epoch: int, step: int) -> np.random.Generator:
        # Philox increments the first word of the counter, so the streams of two (step, epoch) never overlap
        key = np.array([self.seed & (2**64 - 1), purpose], dtype=np.uint64)
        counter = np.array([0, 0, step, epoch], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's order of all samples: (count,) uint32, a permutation."""
        if epoch not in self._order:
            self._order.clear()  # batches are requested in order, so one epoch is enough
            order = np.arange(self.count, dtype=np.uint32)
            self._generator(ORDER, epoch, 0).shuffle(order)
            self._order[epoch] = order
        return self._order[epoch]

    def samples(self, epoch: int, step: int) -> np.ndarray:
        """Indices into the data set of one global batch: (global_batch,) uint32."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch}")
        return self.order(epoch)[step * self.global_batch : (step + 1) * self.global_batch]

    def views(self, epoch: int, step: int) -> Views:
        """Crop, flip and colour draws of one global batch."""
        n, random = self.global_batch, self._generator(VIEW, epoch, step)
        # always drawn, in this order, so that disabling one augmentation does not change the others
        anchor = random.integers(0, max(1, self.size - self.crop), size=(n, 2), dtype=np.int32)
        flip = random.integers(0, 2, size=n, dtype=np.int32)
        color = (random.standard_normal((n, 3)) * self.color_std).astype(np.float32)
        if self.augment in ("flip", "none"):
            anchor = np.full_like(anchor, (self.size - self.crop) // 2)
        if self.augment in ("crop", "none"):
            flip = np.zeros_like(flip)
        return Views(anchor, flip, color)

    def dropout_key(self, epoch: int, step: int) -> int:
        """63 random bits that determine all dropout masks of one step."""
        return int(self._generator(DROPOUT, epoch, step).integers(0, 2**63 - 1))

    def mixup(self, epoch: int, step: int, alpha: float) -> np.ndarray:
        """The weight of each image in its mixture: (global_batch,) float32 in 0..1, from Beta(alpha, alpha).

        Each image is mixed with its neighbour at position XOR 1 of the global batch (Zhang et al.,
        arXiv:1710.09412). The neighbour is random, because the order is. It is on the same rank if every rank has
        an even share.
        """
        random = self._generator(MIXUP, epoch, step)
        return random.beta(alpha, alpha, self.global_batch).astype(np.float32)

    def __getstate__(self) -> dict[str, object]:
        # without the order: 60 MB for 15 million samples, which a reader process computes in about a second
        return {**self.__dict__, "_order": {}}


def rank_slice(total: int, rank: int, world_size: int) -> slice:
    """The contiguous share of `rank` in `total` positions. The shares of all ranks cover each position once."""
    return slice(total * rank // world_size, total * (rank + 1) // world_size)
