"""Provides DALI's external_source with the records, labels and random numbers of each batch.

Runs in light reader processes, so nothing here imports torch. If DALI does not need the random numbers, the
trainer's process computes them itself. Both feeds are pure functions of the batch number, which is all that DALI
passes to a reader process.
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

from pipeline.load.plan import Plan, rank_slice
from pipeline.shards import ShardReader

# batches that reader processes prepare in advance, so that a slow read does not stall the graph
READ_AHEAD = 2
PADDED = 3  # maximum size of padded records, relative to the records themselves
# n records: one array (HWC RGB uint8 of raw shards, or zero-padded encoded bytes) or a list of arrays
Records = list[np.ndarray] | np.ndarray
# anchor int32 (n, 2), flip int32 (n,), shift float32 (n, 3) in levels of 0..255
Cuts = tuple[np.ndarray, np.ndarray, np.ndarray]
# records, labels int64 (n,), and the three arrays of Cuts
FeedBatch = tuple[Records, np.ndarray, np.ndarray, np.ndarray, np.ndarray]

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _read(reader: ShardReader, samples: np.ndarray) -> tuple[Records, np.ndarray]:
    """Read the records and labels of `samples`.

    The records are returned as one array if possible, because DALI spends about 20 us on each array that it passes
    between processes, half of it in the trainer's main thread, and copies each array to the GPU separately. Encoded
    records are padded with zeros, unless one is so long that the array would be mostly zeros. Decoders stop at the
    end of the image, which `ShardReader` checks is there.
    """
    indices = samples.tolist()
    rows = None
    reader.prefetch(indices)
    if reader.manifest.encoding != "raw":
        stored = [reader.stored_bytes(index) for index in indices]
        if len(stored) * max(stored) <= PADDED * sum(stored):
            rows = np.empty((len(stored), max(stored)), np.uint8)
    records, labels = [], []
    for position, index in enumerate(indices):
        record, label = reader.read(index)
        labels.append(label)
        if rows is None:
            records.append(record)
        else:  # copy at once, while the record is in the cache, so that its memory can be reused
            rows[position, : len(record)] = record
            rows[position, len(record) :] = 0
    if reader.manifest.encoding == "raw" and len({record.shape for record in records}) == 1:
        rows = np.stack(records)
    return records if rows is None else rows, np.array(labels, np.int64)


class _Feed:
    """Base class of both feeds. Subclasses define the samples and views of each iteration."""

    reader: ShardReader

    def records(self, info: Any) -> tuple[Records, np.ndarray]:
        """Records and labels of DALI's iteration; StopIteration after the last batch."""
        samples = self.samples(info.iteration)
        if not len(samples):
            raise StopIteration
        return _read(self.reader, samples)

    def __call__(self, info: Any) -> FeedBatch:
        return *self.records(info), *self.views(info.iteration)

    def samples(self, iteration: int) -> np.ndarray:
        raise NotImplementedError

    def views(self, iteration: int) -> Cuts:
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Runs in a reader process, which must end with the trainer, even if that is killed."""
        self.__dict__.update(state)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # If the trainer was killed before the call above, no signal will come.
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)


@dataclass
class TrainFeed(_Feed):
    """This rank's share of each global batch from `first_step` up to `end_step` (exclusive), across epochs.

    Steps are counted from the start of training: step // steps_per_epoch is the epoch. `color_basis` is (3, 3)
    float32 with columns 255 * p_i * lambda_i (paper 4.1); the colour shift is basis @ (a1, a2, a3).
    """

    reader: ShardReader
    plan: Plan
    color_basis: np.ndarray
    rank: int
    world_size: int
    first_step: int
    end_step: int

    def samples(self, iteration: int) -> np.ndarray:
        """Data set indices of the iteration's batch, (n,) uint32; empty from `end_step` on."""
        if self.first_step + iteration >= self.end_step:
            return np.empty(0, np.uint32)
        return self.plan.samples(*self._position(iteration))[self._rank_rows]

    def views(self, iteration: int) -> Cuts:
        """The iteration's crops, flips and colour shifts."""
        rows = self._rank_rows
        anchor, flip, color = (values[rows] for values in self.plan.views(*self._position(iteration)))
        return anchor, flip, color @ self.color_basis.T.astype(np.float32)

    def _position(self, iteration: int) -> tuple[int, int]:
        """Return (epoch, step in the epoch)."""
        return divmod(self.first_step + iteration, self.plan.steps_per_epoch)

    @property
    def _rank_rows(self) -> slice:
        return rank_slice(self.plan.global_batch, self.rank, self.world_size)


@dataclass
class EvalFeed(_Feed):
    """This rank's share of the data set in order, each image exactly once; the last batch can be smaller."""

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

    def views(self, iteration: int) -> Cuts:
        """Centre crops without flips and colour shifts."""
        n = len(self.samples(iteration))
        center = np.full((n, 2), (self.size - self.crop) // 2, dtype=np.int32)
        return center, np.zeros(n, np.int32), np.zeros((n, 3), np.float32)
