"""Loader: runs the DALI graph and passes its batches to torch.

The graph's NHWC output is passed through dlpack and permuted to a channels-last (N, 3, H, W) tensor, without a
copy. On the CPU the graph ends with decoding, and one pass over the pixels does the rest (pipeline/load/views.py).
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from nvidia.dali import Pipeline

from base.errors import DataError
from base.machine import cpu_threads
from pipeline.load.feed import PADDED, READ_AHEAD, EvalFeed, TrainFeed
from pipeline.load.graph import graph
from pipeline.load.plan import Plan
from pipeline.load.readers import ReaderWatch, check_shared_memory, light_readers
from pipeline.load.views import ViewCutter, ten_views
from pipeline.preprocess import Preprocess, decode
from pipeline.shards import Manifest, ShardReader

DECODERS = ("mixed", "cpu")


def record_bytes(manifest: Manifest) -> int:
    """Bytes of shared memory that an average record takes on its way from a reader process."""
    average = sum(shard["bytes"] for shard in manifest.shards) // max(1, manifest.count)
    return average if manifest.encoding == "raw" else PADDED * average


class Loader:
    """Iterates over (images, labels): channels-last (N, 3, crop, crop) of `dtype`, and int64 (N,), on `device`.

    A training loader ends at its feed's end_step. An evaluation loader can be iterated over again. Tensors stay
    valid as long as they are held.

    Args:
        batch: images per batch.
        device: "cpu", or "gpu" with its `device_id`.
        threads: decoding threads; by default one per core.
        workers: processes that read the shards; 0 reads in this process.
        prefetch: batches in preparation; by default 2 on a GPU, and 1 on the CPU, which prepares a batch when it
            is asked for.
        ten_crops: images are (N, 10, 3, crop, crop), the crops of section 4.1.
        dtype: float16 on a GPU and bfloat16 on the CPU are written directly, as autocast would round them. Other
            types are converted from float32.
        fused: False uses DALI's operators on the CPU too.
        decoder: on a GPU, "mixed" (nvJPEG) or "cpu" (libjpeg-turbo on the host, which gives the pixels of a CPU
            run).

    Raises:
        DataError: a record does not decode (the error names shard and key), or the readers failed. Each later call
            raises it again.
    """

    def __init__(
        self,
        feed: TrainFeed | EvalFeed,
        preprocess: Preprocess,
        batch: int,
        *,
        device: str = "cpu",
        device_id: int | None = None,
        threads: int | None = None,
        workers: int = 1,
        prefetch: int | None = None,
        ten_crops: bool = False,
        dtype: torch.dtype = torch.float32,
        fused: bool = True,
        decoder: str = "mixed",
    ) -> None:
        self.feed = feed
        self.preprocess = preprocess
        self._iteration = 0  # number of the next batch
        self._failed: DataError | None = None
        self._device = device
        self._dtype = dtype
        threads = threads or cpu_threads()
        # On the CPU, decoding ahead competes with the training step, which uses all cores: taking turns is faster.
        depth = prefetch or (2 if device == "gpu" else 1)
        self._cutter: ViewCutter | None = None
        if fused and device == "cpu":
            # decoding ahead competes with this pass, which the caller waits for: use one more thread
            cutting = threads + (depth > 1)
            self._cutter = ViewCutter.of(preprocess.mean, preprocess.crop, dtype, cutting)
        self._ten_views: list[torch.Tensor] | None = None
        if ten_crops:
            self._ten_views = [torch.from_numpy(a) for a in ten_views(preprocess.size, preprocess.crop)]
        if workers:
            check_shared_memory(batch * record_bytes(feed.reader.manifest), depth + READ_AHEAD)
        self._pipe: Pipeline = graph(
            feed,
            preprocess,
            device,
            raw=feed.reader.manifest.encoding == "raw",
            ten_crops=ten_crops,
            half=dtype == torch.float16,
            parallel=workers > 0,
            decoded=self._cutter is not None,
            decoder=decoder,
            batch_size=batch,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=depth,
            py_num_workers=max(1, workers),
            py_start_method="spawn",  # fork would copy a process that holds CUDA and OpenMP threads
            exec_dynamic=True,  # each output is a new buffer that lives while torch holds it: no copy
        )
        others = set(multiprocessing.active_children())
        with light_readers(), warnings.catch_warnings():
            # ten crops in DALI's own graph do not use anchors, flips and shifts
            warnings.filterwarnings("ignore", message=".*outputs at the indices.*are not used")
            try:
                self._pipe.build()
            except OSError as error:  # raised by the queues if shared memory is full
                raise DataError(
                    f"processes that read shards cannot be started ({error.strerror}): use docker run "
                    "--shm-size 1g, or --workers 0"
                ) from None
            except RuntimeError as error:
                if "Workers initialization failed" not in str(error):
                    raise
                raise DataError("a process that reads shards died at its start: try --workers 0") from None
        self._watch = ReaderWatch(list(set(multiprocessing.active_children()) - others), self._pipe)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._failed:  # it is unknown which batch DALI would give next
            raise self._failed
        try:
            with self._watch.inside():
                stream = [torch.cuda.current_stream()] if self._device == "gpu" else []
                outputs = self._pipe.run(*stream)
            # one tensor per batch: DALI raises if records differ in size
            images, labels, *shapes = (torch.from_dlpack(output.as_tensor()) for output in outputs)
            if self._cutter:
                images = self._cut(self._cutter, images)
            else:
                size = self.preprocess.size
                if any(shape[:2] != [size, size] for shape in shapes[0].tolist()):
                    raise ValueError(f"records are not all of {size}x{size} pixels")
        except StopIteration:
            with self._watch.inside():
                self._pipe.reset()
            self._iteration = 0
            raise
        except DataError as error:
            self._failed = error
            raise
        except Exception as error:  # DALI raises plain Exceptions for failures in a reader process
            self._failed = self._explain(error)
            raise self._failed from error
        self._iteration += 1
        return images.movedim(-1, -3).to(self._dtype), labels

    def _cut(self, cutter: ViewCutter, images: torch.Tensor) -> torch.Tensor:
        """The views of whole images: one per image as the feed says, or ten."""
        if self._ten_views is None:
            return cutter(images, *map(torch.from_numpy, self.feed.views(self._iteration)))
        anchors, flips = self._ten_views
        count = len(images)
        ten = cutter(images, anchors.repeat(count, 1), flips.repeat(count), torch.zeros(10 * count, 3))
        return ten.unflatten(0, (count, 10))

    def _explain(self, error: Exception) -> DataError:
        """Finds the record that broke the batch, which DALI's message does not name."""
        reader = self.feed.reader
        size = reader.manifest.size
        for index in map(int, self.feed.samples(self._iteration)):
            try:
                record, _ = reader.read(index)
            except DataError as unreadable:
                return unreadable
            image = decode(record, size) if record.ndim == 1 else record
            if image is None or image.shape != (size, size, 3):
                shard, key = reader.locate(index)
                return DataError(
                    f"shard {shard}, key {key.decode()}: the record does not decode to {size}x{size} RGB; "
                    "run tools/verify_lmdb.py, then build the data set again"
                )
        # the last line that names an error: tracebacks precede it, DALI's advice follows it
        lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
        causes = [line for line in lines if "Error" in line and not line.startswith("Critical error")]
        return DataError(f"the loader failed: {(causes or lines)[-1]}")

    def close(self) -> None:
        """Stops the reader processes and frees their shared memory."""
        self._watch.close()
        del self._pipe


def train_loader(
    reader: ShardReader,
    plan: Plan,
    preprocess: Preprocess,
    *,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
    end_step: int,
    **options: Any,
) -> Loader:
    """The plan's stream of batches for one rank, from `first_step` (counted from the start) to `end_step`.

    `options` are those of Loader. Raises ValueError if `plan` and `preprocess` differ in size or crop, or if the
    global batch is not a multiple of `world_size`.
    """
    if (plan.size, plan.crop) != (preprocess.size, preprocess.crop):
        raise ValueError(
            f"the plan crops {plan.crop} of {plan.size} pixels, the preprocessing {preprocess.crop} of "
            f"{preprocess.size}: give both the same"
        )
    if plan.global_batch % world_size:
        raise ValueError(f"a global batch of {plan.global_batch} cannot be divided among {world_size} ranks")
    feed = TrainFeed(
        reader, plan, preprocess.color_basis, rank, world_size, first_step=first_step, end_step=end_step
    )
    return Loader(feed, preprocess, plan.global_batch // world_size, **options)


def eval_loader(
    reader: ShardReader,
    preprocess: Preprocess,
    batch: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> Loader:
    """One rank's share of a set: every image once, centre crop or ten crops. The last batch may be smaller."""
    feed = EvalFeed(reader, batch, preprocess.size, preprocess.crop, rank, world_size)
    return Loader(feed, preprocess, batch, **options)


def fastest_decoder(
    reader: ShardReader,
    preprocess: Preprocess,
    batch: int,
    sum_over_ranks: Callable[[list[float]], list[float]],
    **options: Any,
) -> tuple[str, str]:
    """For --decoder auto: the decoder with the highest rate, the same on all ranks, and the rates for the user.

    Args:
        sum_over_ranks: the sums of some numbers over all ranks.
        options: of `eval_loader`, with device "gpu".
    """
    totals = sum_over_ranks(time_decoders(reader, preprocess, batch, **options))
    decoder = DECODERS[totals.index(max(totals))]
    measured = ", ".join(f"{name} {rate:,.0f}" for name, rate in zip(DECODERS, totals, strict=True))
    return decoder, f", decoder {decoder} ({measured} images/s)" if max(totals) else ""


def time_decoders(
    reader: ShardReader, preprocess: Preprocess, batch: int, *, batches: int = 8, **options: Any
) -> list[float]:
    """For --decoder auto: images per second of this rank with each of DECODERS, while nothing is trained.

    Times `batches` batches after a first one. Returns zeros if records need no decoding or the rank has too few
    images.

    Args:
        options: of `eval_loader`, with device "gpu".
    """
    rates = [0.0] * len(DECODERS)
    if reader.manifest.encoding == "raw" or len(reader) < 2 * batch * options.get("world_size", 1):
        return rates
    for number, decoder in enumerate(DECODERS):
        loader = eval_loader(reader, preprocess, batch, decoder=decoder, **options)
        try:
            next(loader)
            start, images = time.perf_counter(), 0
            for _, (_, labels) in zip(range(batches), loader, strict=False):
                images += len(labels)
            torch.cuda.synchronize()
            rates[number] = images / (time.perf_counter() - start)
        finally:
            loader.close()
    return rates
