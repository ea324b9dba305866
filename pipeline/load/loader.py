"""Loader: runs the DALI graph and hands its batches to torch.

Output is NHWC, handed over through dlpack and permuted: a channels-last (N, 3, H, W) tensor, no copy. On the CPU
the graph ends with decoding, and one pass over the pixels does the rest (pipeline/load/views.py).
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Iterator
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
    """What a stored image takes on its way from the reader processes, at most, and on average."""
    average = sum(shard["bytes"] for shard in manifest.shards) // max(1, manifest.count)
    return average if manifest.encoding == "raw" else PADDED * average


class Loader:
    """Iterates over (images, labels): (N, 3, crop, crop) of `dtype` channels-last, int64 (N,).

    With `ten_crops` images are (N, 10, 3, crop, crop). `device`: 'cpu', or 'gpu' with its `device_id`. `dtype` is
    float32, on a GPU also float16, on the CPU bfloat16: what autocast would make of float32, without the trip
    through memory; any other is made of float32 in the end. `fused` False: DALI's operators on the CPU too.
    `decoder`, on a GPU: 'mixed' (nvJPEG) or 'cpu' (libjpeg-turbo on the host: the pixels of a CPU run).
    `workers` processes read the shards; 0 reads in this process. `prefetch` batches are made ahead (2 on a
    GPU, 1 on the CPU, where the batch is made when it is asked for). Batches are on `device`. Tensors stay valid
    as long as they are held. A training loader ends at its feed's end_step; an evaluation loader can be
    iterated over again. Raises DataError that names the shard and key of a record that does not decode, and the
    same again when asked for more.
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
        self._iteration = 0  # the batch that DALI gives next
        self._failed: DataError | None = None
        self._device = device
        self._dtype = dtype
        threads = threads or cpu_threads()
        # On the CPU, decoding ahead takes cores from under the step that runs on all of them, and each waits
        # for the other: one after the other is quicker.
        depth = prefetch or (2 if device == "gpu" else 1)
        self._cutter: ViewCutter | None = None
        if fused and device == "cpu":
            # decoding ahead competes for the cores with this pass, which the step waits for: one thread more
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
            exec_dynamic=True,  # outputs are new buffers, kept as long as torch holds them: no copy
        )
        others = set(multiprocessing.active_children())
        with light_readers(), warnings.catch_warnings():
            # ten crops in DALI's own graph need no anchors and flips
            warnings.filterwarnings("ignore", message=".*outputs at the indices.*are not used")
            try:
                self._pipe.build()
            except OSError as error:  # of the queues, when shared memory is full to the last byte
                raise DataError(
                    f"processes that read shards cannot be started ({error.strerror}): docker run --shm-size 1g, "
                    "or --workers 0"
                ) from None
            except RuntimeError as error:
                if "Workers initialization failed" not in str(error):
                    raise
                raise DataError("a process that reads shards died at its start: try --workers 0") from None
        self._watch = ReaderWatch(list(set(multiprocessing.active_children()) - others), self._pipe)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._failed:  # DALI may be a batch further now, or not
            raise self._failed
        try:
            with self._watch.inside():
                stream = [torch.cuda.current_stream()] if self._device == "gpu" else []
                outputs = self._pipe.run(*stream)
            # one tensor a batch: DALI refuses records that are not all of one size
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
        except Exception as error:  # DALI raises bare ones for what fails in a reader process
            self._failed = self._explain(error)
            raise self._failed from error
        self._iteration += 1
        return images.movedim(-1, -3).to(self._dtype), labels

    def _cut(self, cutter: ViewCutter, images: torch.Tensor) -> torch.Tensor:
        """The views of whole images: one each as the feed says, or ten."""
        if self._ten_views is None:
            return cutter(images, *map(torch.from_numpy, self.feed.views(self._iteration)))
        anchors, flips = self._ten_views
        count = len(images)
        ten = cutter(images, anchors.repeat(count, 1), flips.repeat(count), torch.zeros(10 * count, 3))
        return ten.unflatten(0, (count, 10))

    def _explain(self, error: Exception) -> DataError:
        """Which record broke the batch: DALI's message names none."""
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
        # the last line that says something: before it come tracebacks, after it DALI's advice
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
    """One rank's share of a whole set, every image once, centre crop (or ten crops); last batch may be smaller."""
    feed = EvalFeed(reader, batch, preprocess.size, preprocess.crop, rank, world_size)
    return Loader(feed, preprocess, batch, **options)


def time_decoders(
    reader: ShardReader, preprocess: Preprocess, batch: int, *, batches: int = 8, **options: Any
) -> list[float]:
    """For --decoder auto: images/s of this rank with each of DECODERS, without a training beside them.

    Times `batches` batches after a first one. Zeros where nothing is to be decoded or the rank has too few images
    to tell.

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
