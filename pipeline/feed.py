"""What DALI's external_source asks for: records, labels and the plan's numbers of one batch.

Runs in light worker processes of its own, so nothing here imports torch. Both feeds are pure functions of
the batch number, which is all that DALI hands to a worker.
https://docs.nvidia.com/deeplearning/dali/user-guide/docs/examples/general/data_loading/parallel_external_source.html
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.plan import Plan, rank_slice
from pipeline.shards import ShardReader

# n records: HWC RGB uint8 of raw shards, or encoded bytes: mostly one array, (n, longest), with zeros behind them
PADDED = 3  # times as many bytes with those zeros, at most
Records = list[np.ndarray] | np.ndarray
# one batch of n samples: records, and arrays over n of label int64 (n,), anchor int32 (n, 2), flip int32 (n,),
# shift float32 (n, 3) in levels of 0..255
FeedBatch = tuple[Records, np.ndarray, np.ndarray, np.ndarray, np.ndarray]

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _read(reader: ShardReader, samples: np.ndarray) -> tuple[Records, np.ndarray]:
    """The records and labels of `samples`.

    DALI spends some 20 us on every array on its way between processes, half of them in the trainer's main thread:
    encoded records go as one, unless one is so long that the others would be mostly zeros. Decoders end where an
    image ends, and `ShardReader` sees to it that it does.
    """
    read, labels = zip(*(reader.read(int(i)) for i in samples), strict=True)
    records: Records = list(read)
    longest = max(map(len, read))
    if read[0].ndim == 1 and len(read) * longest <= PADDED * sum(map(len, read)):
        records = np.empty((len(read), longest), np.uint8)
        for row, record in zip(records, read, strict=True):
            row[: len(record)] = record
            row[len(record) :] = 0
    return records, np.array(labels, dtype=np.int64)


class _Feed:
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Only happens in a reader process, which has to go when the trainer does, however that ends."""
        self.__dict__.update(state)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # killed before that line, the trainer would never be heard of again
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)


@dataclass
class TrainFeed(_Feed):
    """This rank's share of every global batch from `first_step` on, across epochs without a pause.

    Steps are counted from the start of training: step // steps_per_epoch is the epoch. Ends before `end_step`.
    `color_basis`: (3, 3) float32, columns 255 * p_i * lambda_i (paper 4.1): the shift is basis @ (a1, a2, a3).
    """

    reader: ShardReader
    plan: Plan
    color_basis: np.ndarray
    rank: int
    world_size: int
    first_step: int
    end_step: int

    def samples(self, iteration: int) -> np.ndarray:
        """Data set indices of the iteration's batch, (n,) uint32."""
        epoch, step = divmod(self.first_step + iteration, self.plan.steps_per_epoch)
        return self.plan.samples(epoch, step)[rank_slice(self.plan.global_batch, self.rank, self.world_size)]

    def __call__(self, info: Any) -> FeedBatch:
        if self.first_step + info.iteration >= self.end_step:
            raise StopIteration
        records, labels = _read(self.reader, self.samples(info.iteration))
        epoch, step = divmod(self.first_step + info.iteration, self.plan.steps_per_epoch)
        mine = rank_slice(self.plan.global_batch, self.rank, self.world_size)
        anchor, flip, color = (values[mine] for values in self.plan.views(epoch, step))
        shift = color @ self.color_basis.T.astype(np.float32)
        return records, labels, anchor, flip, shift


@dataclass
class EvalFeed(_Feed):
    """This rank's share of the whole set in order, every image exactly once; the last batch may be smaller."""

    reader: ShardReader
    batch: int
    size: int
    crop: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        share = rank_slice(len(self.reader), self.rank, self.world_size)
        self.indices = np.arange(share.start, share.stop)

    def samples(self, iteration: int) -> np.ndarray:
        """Data set indices of the iteration's batch, (n,)."""
        return self.indices[iteration * self.batch : (iteration + 1) * self.batch]

    def __call__(self, info: Any) -> FeedBatch:
        samples = self.samples(info.iteration)
        if not len(samples):
            raise StopIteration
        records, labels = _read(self.reader, samples)
        n = len(samples)
        center = np.full((n, 2), (self.size - self.crop) // 2, dtype=np.int32)
        return records, labels, center, np.zeros(n, np.int32), np.zeros((n, 3), np.float32)
