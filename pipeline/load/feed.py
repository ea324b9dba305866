"""What DALI's external_source asks for: records, labels and the plan's numbers of one batch.

Runs in light worker processes of its own, so nothing here imports torch; where the numbers do not go through
DALI, the trainer's process asks for them itself. Both feeds are pure functions of the batch number, which is all
that DALI hands to a worker.
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

READ_AHEAD = 2  # batches that the reader processes are ahead: a slow read does not stall the graph
PADDED = 3  # times as many bytes with those zeros, at most
# n records: one array, HWC RGB uint8 of raw shards or encoded bytes with zeros behind them, or a list of arrays
Records = list[np.ndarray] | np.ndarray
# arrays over n samples: anchor int32 (n, 2), flip int32 (n,), shift float32 (n, 3) in levels of 0..255
Cuts = tuple[np.ndarray, np.ndarray, np.ndarray]
# records, label int64 (n,), and the three of Cuts
FeedBatch = tuple[Records, np.ndarray, np.ndarray, np.ndarray, np.ndarray]

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _read(reader: ShardReader, samples: np.ndarray) -> tuple[Records, np.ndarray]:
    """The records and labels of `samples`.

    DALI spends some 20 us on every array on its way between processes, half of them in the trainer's main thread,
    and copies each to the GPU by itself: records go as one array. Encoded ones are padded, unless one is so long
    that the others would be mostly zeros: decoders end where an image ends, and `ShardReader` sees to it that it
    does.
    """
    indices = samples.tolist()
    rows = None
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
        else:  # at once, while it is in the cache: its memory serves for the next
            rows[position, : len(record)] = record
            rows[position, len(record) :] = 0
    if reader.manifest.encoding == "raw" and len({record.shape for record in records}) == 1:
        rows = np.stack(records)
    return records if rows is None else rows, np.array(labels, np.int64)


class _Feed:
    """What both feeds have in common. `samples` tells the positions in the data set of an iteration's batch."""

    reader: ShardReader

    def records(self, info: Any) -> tuple[Records, np.ndarray]:
        """Records and labels alone, as DALI asks for them; StopIteration after the last batch."""
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
        """Data set indices of the iteration's batch, (n,) uint32; none from `end_step` on."""
        if self.first_step + iteration >= self.end_step:
            return np.empty(0, np.uint32)
        return self.plan.samples(*self._position(iteration))[self._mine]

    def views(self, iteration: int) -> Cuts:
        """The iteration's crops, flips and colour shifts."""
        mine = self._mine
        anchor, flip, color = (values[mine] for values in self.plan.views(*self._position(iteration)))
        return anchor, flip, color @ self.color_basis.T.astype(np.float32)

    def _position(self, iteration: int) -> tuple[int, int]:
        """Epoch, and step in it."""
        return divmod(self.first_step + iteration, self.plan.steps_per_epoch)

    @property
    def _mine(self) -> slice:
        return rank_slice(self.plan.global_batch, self.rank, self.world_size)


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

    def views(self, iteration: int) -> Cuts:
        """Centre crops, not mirrored, colours as they are."""
        n = len(self.samples(iteration))
        center = np.full((n, 2), (self.size - self.crop) // 2, dtype=np.int32)
        return center, np.zeros(n, np.int32), np.zeros((n, 3), np.float32)
