"""The one-pass kernel against DALI's operators, and what happens where it cannot be built."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import native
from pipeline.build import Options, build_split
from pipeline.loader import MEANS, Preprocess, eval_loader, train_loader
from pipeline.plan import Plan
from pipeline.raw import open_source
from pipeline.shards import ShardReader
from pipeline.views import Views, ten_views

needs_compiler = pytest.mark.skipif(native.library("views", "skipped") is None, reason="no C++ compiler")


@needs_compiler
@given(
    size=st.integers(1, 40),
    count=st.integers(1, 5),
    each=st.integers(1, 3),
    threads=st.integers(1, 4),
    data=st.data(),
)
def test_every_size_equals_numpy(size, count, each, threads, data):
    crop = data.draw(st.integers(1, size))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    mean = rng.uniform(0, 255, (size, size, 3)).astype(np.float32)
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    anchors = rng.integers(0, size - crop + 1, (count * each, 2), dtype=np.int32)
    flips = rng.integers(0, 2, count * each, dtype=np.int32)
    shifts = rng.normal(0, 20, (count * each, 3)).astype(np.float32)
    given_ = [torch.from_numpy(array) for array in (images, anchors, flips, shifts)]
    found = Views.of(mean, crop, torch.float32, threads)(*given_)
    for i, (top, left) in enumerate(anchors):
        window = np.s_[top : top + crop, left : left + crop]
        expected = images[i // each][window].astype(np.float64) - mean[window] + shifts[i]
        np.testing.assert_allclose(found[i], expected[:, ::-1] if flips[i] else expected, atol=1e-4)
    rounded = Views.of(mean, crop, torch.bfloat16, threads)(*given_)
    assert torch.equal(rounded, found.bfloat16())  # torch rounds to the nearest even, too


@needs_compiler
@pytest.mark.parametrize("mode", MEANS)
@pytest.mark.parametrize("workers", [0, 1])
def test_training_batches_are_dalis_to_the_bit(dataset, mode, workers):
    reader = ShardReader(dataset / "train")
    preprocess = Preprocess.load(dataset / "train", 224, mode)

    def batches(**options):
        return train_loader(reader, Plan(len(reader), 16), preprocess, end_step=3, workers=workers, **options)

    # with a mean a channel DALI subtracts mean minus shift, whose rounding is another
    same = torch.equal if mode == "pixel" else lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-4)
    for (a, la), (b, lb) in zip(batches(), batches(fused=False), strict=True):
        assert same(a, b) and torch.equal(la, lb)
    for dtype_of in ({}, {"fused": False}):
        for (a, _), (b, _) in zip(
            batches(dtype=torch.bfloat16, **dtype_of), batches(**dtype_of), strict=True
        ):
            assert a.is_contiguous(memory_format=torch.channels_last) and torch.equal(a, b.bfloat16())


@needs_compiler
@pytest.mark.parametrize("ten_crops", [False, True])
def test_evaluation_and_raw_records_too(class_folders, dataset, tmp_path, ten_crops):
    """A raw data set, whose records are not decoded at all; the last batch is smaller."""
    source = open_source(class_folders / "val", "val")
    build_split(source, tmp_path, Options(encoding="raw"), workers=1)
    preprocess = Preprocess.load(dataset / "train", 224)
    for data in (dataset / "val", tmp_path / "val"):
        reader = ShardReader(data)
        for workers in (0, 1):
            options = {"ten_crops": ten_crops, "workers": workers}
            fused = list(eval_loader(reader, preprocess, 7, **options))
            plain = list(eval_loader(reader, preprocess, 7, fused=False, **options))
            assert len(fused) == len(plain) == -(-len(reader) // 7)
            for (a, la), (b, lb) in zip(fused, plain, strict=True):
                assert torch.equal(a, b) and torch.equal(la, lb)


def test_ten_views_are_the_papers():
    anchors, flips = ten_views(256, 224)
    assert anchors.tolist() == [[0, 0], [0, 32], [32, 0], [32, 32], [16, 16]] * 2
    assert flips.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("variable", ["CXX=/no/such/compiler", "ALEXNET_NATIVE=0"])
def test_without_a_compiler_dalis_operators_do_it(dataset, monkeypatch, recwarn, variable):
    reader = ShardReader(dataset / "train")
    preprocess = Preprocess.load(dataset / "train", 224)

    def batch():
        return next(train_loader(reader, Plan(len(reader), 16), preprocess, end_step=1, workers=0))[0]

    expected = batch()
    monkeypatch.setenv(*variable.split("="))
    native.library.cache_clear()
    try:
        assert torch.equal(batch(), expected)
        warned = [str(w.message) for w in recwarn if "cropped by DALI's operators" in str(w.message)]
        assert len(warned) == (1 if variable.startswith("CXX") else 0)
    finally:
        native.library.cache_clear()


def test_the_kernels_are_part_of_an_installed_package(tmp_path):
    """A wheel without the .cpp files would be slow and say nothing."""
    code = (
        "from setuptools.build_meta import build_wheel; import sys, zipfile;"
        "print(*zipfile.ZipFile(f'{sys.argv[1]}/' + build_wheel(sys.argv[1])).namelist(), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"native/lrn.cpp", "native/views.cpp"} <= set(done.stdout.split())
