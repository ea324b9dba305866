"""The one-pass kernel against DALI's operators, and what happens where it cannot be built."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st

import native
from base.errors import DataError
from model.alexnet import AlexNet
from model.training.precision import input_dtype
from pipeline.build.sources import open_source
from pipeline.build.split import Options, build_split
from pipeline.load.loader import Loader, eval_loader, train_loader
from pipeline.load.plan import Plan
from pipeline.load.views import Buffers, ViewCutter, ten_views
from pipeline.preprocess import MEANS, Preprocess
from pipeline.shards import ShardReader


@pytest.fixture(scope="module")
def raw_val(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The val split as raw records."""
    out = tmp_path_factory.mktemp("raw-records")
    build_split(open_source(class_folders / "val", "val"), out, Options(encoding="raw"), workers=1)
    return out / "val"


def cutter(mean: np.ndarray, crop: int, dtype: torch.dtype, threads: int) -> ViewCutter:
    cut = ViewCutter.of(mean, crop, dtype, threads)
    assert cut is not None
    return cut


@needs_compiler
@settings(deadline=None)  # the first example compiles the kernel
@given(
    size=st.integers(1, 40),
    count=st.integers(1, 5),
    each=st.integers(1, 3),
    threads=st.integers(1, 4),
    data=st.data(),
)
def test_every_size_equals_numpy(size: int, count: int, each: int, threads: int, data: st.DataObject) -> None:
    crop = data.draw(st.integers(1, size))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    mean = rng.uniform(0, 255, (size, size, 3)).astype(np.float32)
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    anchors = rng.integers(0, size - crop + 1, (count * each, 2), dtype=np.int32)
    flips = rng.integers(0, 2, count * each, dtype=np.int32)
    shifts = rng.normal(0, 20, (count * each, 3)).astype(np.float32)
    given_ = [torch.from_numpy(array) for array in (images, anchors, flips, shifts)]
    found = cutter(mean, crop, torch.float32, threads)(*given_)
    for i, (top, left) in enumerate(anchors):
        window = np.s_[top : top + crop, left : left + crop]
        expected = images[i // each][window].astype(np.float64) - mean[window] + shifts[i]
        np.testing.assert_allclose(found[i], expected[:, ::-1] if flips[i] else expected, atol=1e-4)
    rounded = cutter(np.asfortranarray(mean), crop, torch.bfloat16, threads)(*given_)
    assert torch.equal(rounded, found.bfloat16())  # torch rounds to the nearest even, too


@needs_compiler
@pytest.mark.parametrize("mode", MEANS)
@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (0, 2), (1, 1), (1, 3)])
def test_training_batches_are_those_of_dalis_operators(
    dataset: Path, mode: str, workers: int, prefetch: int
) -> None:
    """From one epoch into the next, and with DALI some batches ahead."""
    reader = ShardReader(dataset / "train")
    preprocess = Preprocess.load(dataset / "train", 224, mode)
    plan = Plan(len(reader), 16)
    first = plan.steps_per_epoch - 1

    def batches(**options: Any) -> Loader:
        options |= {"workers": workers, "prefetch": prefetch}
        return train_loader(reader, plan, preprocess, first_step=first, end_step=first + 3, **options)

    # with a mean a channel DALI subtracts mean minus shift, whose rounding is another
    exact = mode in ("pixel", "none")
    same = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-4)
    for (a, la), (b, lb) in zip(batches(), batches(fused=False), strict=True):
        assert same(a, b) and torch.equal(la, lb)
    for fused in (True, False):
        for (a, _), (b, _) in zip(
            batches(dtype=torch.bfloat16, fused=fused), batches(fused=fused), strict=True
        ):
            assert a.is_contiguous(memory_format=torch.channels_last) and torch.equal(a, b.bfloat16())


@needs_compiler
@pytest.mark.parametrize("ten_crops", [False, True])
def test_evaluation_and_raw_records_too(dataset: Path, raw_val: Path, ten_crops: bool) -> None:
    """A raw data set, whose records are not decoded at all; the last batch is smaller."""
    preprocess = Preprocess.load(dataset / "train", 224)
    for data in (dataset / "val", raw_val):
        reader = ShardReader(data)
        for workers in (0, 1):
            options: dict[str, Any] = {"ten_crops": ten_crops, "workers": workers}
            loader = eval_loader(reader, preprocess, 7, prefetch=2, **options)
            first, fused = list(loader), list(loader)
            assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, fused, strict=True))
            plain = list(eval_loader(reader, preprocess, 7, fused=False, **options))
            assert len(fused) == len(plain) == -(-len(reader) // 7)
            for (a, la), (b, lb) in zip(fused, plain, strict=True):
                assert torch.equal(a, b) and torch.equal(la, lb)


def test_ten_views_are_the_papers() -> None:
    anchors, flips = ten_views(256, 224)
    assert anchors.tolist() == [[0, 0], [0, 32], [32, 0], [32, 32], [16, 16]] * 2
    assert flips.tolist() == [0] * 5 + [1] * 5


def test_memory_of_a_batch_is_reused_once_nothing_refers_to_it() -> None:
    buffers = Buffers()

    def make(count: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return buffers.empty((count, 5, 5, 3), dtype)

    first = make()
    assert first.shape == (4, 5, 5, 3) and first.dtype == torch.float32 and first.is_contiguous()
    place = first.data_ptr()
    assert place % Buffers.ALIGNMENT == 0
    row = first.movedim(-1, -3)[2]  # any view holds the memory, and so does autograd's graph
    row.fill_(7)
    del first
    assert make().data_ptr() != place
    weight = torch.ones((), requires_grad=True)
    product = weight * row
    del row
    for _ in range(5):
        make().fill_(0)
    product.sum().backward()
    assert weight.grad is not None and weight.grad.item() == 7 * 75
    del product, weight
    smaller, other = make(3, torch.bfloat16), make()
    assert place in (smaller.data_ptr(), other.data_ptr())
    larger = make(9)
    held = [make() for _ in range(2 * Buffers.MAX_KEPT)]
    tensors = [smaller, other, larger, *held]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert len(buffers._kept) == Buffers.MAX_KEPT


def test_batches_stay_what_they_were_while_they_are_held(dataset: Path) -> None:
    reader = ShardReader(dataset / "train")
    preprocess, plan = Preprocess.load(dataset / "train"), Plan(len(reader), 8)

    def batches() -> Loader:
        return train_loader(reader, plan, preprocess, end_step=8, workers=0, threads=1)

    copies = [images.clone() for images, _ in batches()]
    held = [images for images, _ in batches()]
    assert len(held) == 8 > Buffers.MAX_KEPT
    assert all(torch.equal(a, b) for a, b in zip(copies, held, strict=True))


@needs_compiler
def test_what_the_kernel_would_read_beyond_is_refused() -> None:
    mean = np.zeros((8, 8, 3), np.float32)
    cut = cutter(mean, 6, torch.float32, 1)
    images, anchors = torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int32)
    flips, shifts = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 3)
    assert cut(images, anchors, flips, shifts).shape == (2, 6, 6, 3)
    for wrong in (
        (images[:, :7], anchors, flips, shifts),
        (images.float(), anchors, flips, shifts),
        (images.transpose(1, 2), anchors, flips, shifts),
        (images[:0], anchors[:0], flips[:0], shifts[:0]),
        (images[:0], anchors, flips, shifts),
        (images, anchors + 3, flips, shifts),
        (images, anchors - 1, flips, shifts),
        (images, anchors[:1], flips, shifts),
        (images, anchors, flips.long(), shifts),
        (images, anchors, flips, shifts.double()),
        (images, anchors[:1], flips[:1], shifts[:1]),
    ):
        with pytest.raises(ValueError, match=r"expected contiguous|outside its image"):
            cut(*wrong)
    with pytest.raises(ValueError, match="a crop of 4 pixels does not fit a mean image"):
        ViewCutter.of(mean[:, :5], 4, torch.float32, 1)
    assert ViewCutter.of(mean, 4, torch.float16, 1) is None


@needs_compiler
def test_where_no_thread_can_start_the_work_is_done_all_the_same() -> None:
    """A limit on threads, as containers have, met in a process of its own."""
    code = """
import resource, numpy as np, torch
from pipeline.load.views import ViewCutter
cut = ViewCutter.of(np.zeros((8, 8, 3), np.float32), 8, torch.float32, 64)
arguments = (
    torch.full((64, 8, 8, 3), 7, dtype=torch.uint8), torch.zeros(64, 2, dtype=torch.int32),
    torch.zeros(64, dtype=torch.int32), torch.zeros(64, 3),
)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (20 << 20),) * 2)  # room for two threads' stacks
assert cut(*arguments).eq(7).all()
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=200)


@needs_compiler
@pytest.mark.parametrize("environment", [{"CXX": "/no/such/compiler"}, {"ALEXNET_NATIVE": "0"}], ids=str)
def test_without_a_compiler_dalis_operators_do_it(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    reader = ShardReader(dataset / "train")
    preprocess = Preprocess.load(dataset / "train", 224)

    def batch(**options: Any) -> torch.Tensor:
        plan = Plan(len(reader), 16)
        return next(train_loader(reader, plan, preprocess, end_step=1, workers=0, **options))[0]

    expected = batch(fused=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    native._load.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert torch.equal(batch(), expected)
        warnings_given = [str(w.message) for w in warned if "cropped by DALI's operators" in str(w.message)]
        assert len(warnings_given) == ("CXX" in environment) and all(
            "/no/such/compiler" in line for line in warnings_given
        )
    finally:
        native._load.cache_clear()


@pytest.mark.parametrize("variant", ["paper", "cifar-18pct"])
def test_a_step_on_what_the_loader_rounds_is_a_step_on_what_autocast_rounds(variant: str) -> None:
    """Nothing before the first convolution may round a second time."""
    torch.manual_seed(0)
    network = AlexNet(10, variant, image_size=67 if variant == "paper" else 32)
    images = torch.randn(4, 3, *[67 if variant == "paper" else 32] * 2) * 60
    images = images.to(memory_format=torch.channels_last)
    gradients = []
    for batch in (images, images.bfloat16()):
        network.set_position(0, 0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(batch).float().logsumexp(1).sum()
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_images_are_of_the_type_that_the_network_takes() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert input_dtype(None, cpu) == input_dtype(None, gpu) == torch.float32
    assert input_dtype(torch.bfloat16, cpu) == torch.bfloat16
    assert input_dtype(torch.bfloat16, cpu, mixup=0.2) == torch.float32
    assert input_dtype(torch.bfloat16, gpu) == input_dtype(torch.float16, gpu, mixup=0.2) == torch.float16


@pytest.mark.parametrize("fused", [True, False])
def test_a_raw_record_of_another_size_is_named(
    dataset: Path, raw_val: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    reader, read = ShardReader(raw_val), ShardReader.read

    def damaged(self: ShardReader, index: int) -> tuple[np.ndarray, int]:
        data, label = read(self, index)
        return (np.zeros((300, 300, 3), np.uint8) if index == 3 else data), label

    monkeypatch.setattr(ShardReader, "read", damaged)
    shard, key = reader.locate(3)
    loader = eval_loader(reader, Preprocess.load(dataset / "train"), 8, workers=0, fused=fused)
    with pytest.raises(DataError, match=f"{shard}, key {key.decode()}"):
        next(loader)


def test_a_compiler_that_hangs_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexec sleep 60\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("ALEXNET_NATIVE", raising=False)
    monkeypatch.setattr(native, "SECONDS_TO_BUILD", 0.2)
    native._load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cropped by DALI's operators, which is slower: .*timed out"):
            assert ViewCutter.of(np.zeros((1, 1, 3), np.float32), 1, torch.float32, 1) is None
    finally:
        native._load.cache_clear()
