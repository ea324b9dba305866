"""The DALI graph in its GPU form, as far as a machine without a GPU can check it."""

import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import needs_compiler

from pipeline.build.sources import open_source
from pipeline.build.split import Options, build_split
from pipeline.load import loader
from pipeline.load.feed import EvalFeed
from pipeline.load.graph import graph
from pipeline.load.loader import DECODERS, fastest_decoder, train_loader
from pipeline.load.plan import Plan
from pipeline.preprocess import MEANS, Preprocess
from pipeline.shards import ShardReader


@pytest.mark.parametrize("records", ["mixed", "cpu", "raw"])
@pytest.mark.parametrize("mode", MEANS)
def test_all_forms_serialize(records: str, mode: str, dataset: Path) -> None:
    """Serializing checks each operator, its arguments and backend."""
    preprocess = Preprocess.load(dataset / "train", 224, mode)
    feed = EvalFeed(ShardReader(dataset / "val"), 8, 256, 224, 0, 1)
    for ten_crops, half, parallel in product((False, True), repeat=3):
        pipe = graph(
            feed,
            preprocess,
            "gpu",
            raw=records == "raw",
            ten_crops=ten_crops,
            half=half,
            parallel=parallel,
            decoder="cpu" if records == "cpu" else "mixed",
            batch_size=8,
            num_threads=1,
            device_id=None,
            py_start_method="spawn",
            exec_dynamic=True,
        )
        text = pipe.serialize()
        assert (b"mixed" in text) == (records == "mixed")
        assert (b"decoders" in text) == (records != "raw")
        operators = [(op.name, op._op.device) for op in pipe._ops or []]  # DALI has no public way to ask
        crops = [device for name, device in operators if "CropMirrorNormalize" in name]
        assert crops == ["gpu"] * (10 if ten_crops else 1)  # crop, flip and colour
        subtractions = [d for name, d in operators if "Arithmetic" in name and d == "gpu"]
        assert len(subtractions) == (mode == "pixel")  # of the mean image


@needs_compiler
@pytest.mark.parametrize("crop", [256, 227, 100])
def test_crops_of_any_size_equal_the_kernels(crop: int, dataset: Path) -> None:
    """DALI takes the position as a fraction of the free space: rounding must not move the crop."""
    reader, preprocess = ShardReader(dataset / "train"), Preprocess.load(dataset / "train", crop)
    plan = Plan(len(reader), 32, crop=crop)
    graphs, kernel = (
        train_loader(reader, plan, preprocess, end_step=3, workers=0, fused=fused) for fused in (False, True)
    )
    for (a, _), (b, _) in zip(graphs, kernel, strict=True):
        assert a.shape == (32, 3, crop, crop) and torch.equal(a, b)


def test_raw_records_travel_as_one_array(class_folders: Path, tmp_path: Path) -> None:
    """Then DALI copies a batch to the GPU in one go."""
    build_split(open_source(class_folders / "val", "val"), tmp_path, Options(256, "raw", None), workers=1)
    reader = ShardReader(tmp_path / "val")
    records, labels = EvalFeed(reader, 5, 256, 224, 0, 1).records(type("Info", (), {"iteration": 1}))
    assert isinstance(records, np.ndarray) and records.shape == (5, 256, 256, 3)
    for row, index in enumerate(range(5, 10)):
        pixels, label = reader.read(index)
        assert np.array_equal(records[row], pixels) and labels[row] == label


@pytest.mark.parametrize(("mixed", "cpu", "expected"), [(0.5, 0.1, "cpu"), (0.1, 0.5, "mixed")])
def test_the_faster_decoder_is_chosen(
    mixed: float, cpu: float, expected: str, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, closed = [0.0], []

    class Batches:
        """A loader that takes `mixed` or `cpu` seconds per batch."""

        def __init__(self, decoder: str) -> None:
            self.decoder = decoder

        def __iter__(self) -> "Batches":
            return self

        def __next__(self) -> tuple[None, torch.Tensor]:
            clock[0] += {"mixed": mixed, "cpu": cpu}[self.decoder]
            return None, torch.zeros(64)

        def close(self) -> None:
            closed.append(self.decoder)

    def batches(*_: Any, decoder: str, **__: Any) -> Batches:
        return Batches(decoder)

    monkeypatch.setattr(loader, "eval_loader", batches)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    reader, preprocess = ShardReader(dataset / "train"), Preprocess.load(dataset / "train")
    asked: list[list[float]] = []

    def over_ranks(rates: list[float]) -> list[float]:
        asked.append(rates)
        return [2 * rate for rate in rates]

    decoder, line = fastest_decoder(reader, preprocess, 48, over_ranks, batches=4)
    # one more batch may be taken from a loader than is counted
    assert decoder == expected and closed == ["mixed", "cpu"]
    measured = {name: 2 * rate for name, rate in zip(DECODERS, *asked, strict=True)}
    assert (
        line == f", decoder {expected} (mixed {measured['mixed']:,.0f}, cpu {measured['cpu']:,.0f} images/s)"
    )
    # another rank may measure the opposite: all go by the sum
    other = fastest_decoder(reader, preprocess, 48, lambda rates: [1000 / rate for rate in rates], batches=4)
    assert other[0] != expected
    # too few images to tell
    assert fastest_decoder(reader, preprocess, 49, list, batches=4) == ("mixed", "")
