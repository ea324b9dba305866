"""The DALI graph against NumPy written from the paper, and the GPU form as far as a CPU can check it."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from faults.processes import shared_memory_of
from helpers import decode

from base.errors import DataError
from pipeline.build.sources import open_source
from pipeline.build.split import Options, build_split
from pipeline.load.loader import eval_loader, train_loader
from pipeline.load.plan import Plan, rank_slice
from pipeline.preprocess import MEANS, Preprocess
from pipeline.shards import Manifest, ShardReader

LEVELS = 1e-3  # tolerance of float32 sums of levels 0..255, in levels


def pixels(reader: ShardReader, index: int) -> np.ndarray:
    record, _ = reader.read(index)
    return decode(record).astype(np.float64)


def oracle(
    image: np.ndarray,
    mean: np.ndarray,
    manifest: Manifest,
    anchor: Sequence[int],
    flip: bool,
    draw: Sequence[float],
    crop: int,
) -> np.ndarray:
    """Paper 4.1 with its own symbols: [p1 p2 p3][a1 l1, a2 l2, a3 l3]^T added, mean activity subtracted."""
    p, lam = np.array(manifest.pca_eigenvectors), np.array(manifest.pca_eigenvalues)
    shifted = image / 255 + sum(draw[i] * lam[i] * p[:, i] for i in range(3))
    centred = shifted * 255 - mean
    patch = centred[anchor[0] : anchor[0] + crop, anchor[1] : anchor[1] + crop]
    return patch[:, ::-1] if flip else patch


def mean_of(dataset: Path, mode: str) -> np.ndarray:
    manifest = Manifest.load(dataset / "train")
    if mode == "pixel":
        return np.load(dataset / "train" / "mean.npy").astype(np.float64)
    levels = {"channel": manifest.channel_mean, "imagenet": [123.675, 116.28, 103.53]}
    return np.array(levels.get(mode, [0, 0, 0]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", MEANS)
def test_training_batches_equal_the_paper(dataset: Path, mode: str, fused: bool) -> None:
    reader = ShardReader(dataset / "train")
    plan = Plan(len(reader), 16, seed=5)
    preprocess = Preprocess.load(dataset / "train", 224, mode)
    mean = mean_of(dataset, mode)
    steps = plan.steps_per_epoch + 2  # over the end of an epoch
    loader = train_loader(reader, plan, preprocess, end_step=steps, workers=0, threads=2, fused=fused)
    seen = 0
    for number, (images, labels) in enumerate(loader):
        epoch, step = divmod(number, plan.steps_per_epoch)
        samples, views = plan.samples(epoch, step), plan.views(epoch, step)
        assert images.shape == (16, 3, 224, 224) and images.dtype == torch.float32
        assert labels.dtype == torch.int64
        for row, index in enumerate(map(int, samples)):
            expected = oracle(
                pixels(reader, index),
                mean,
                reader.manifest,
                views.anchor[row],
                views.flip[row],
                views.color[row],
                224,
            )
            np.testing.assert_allclose(images[row].permute(1, 2, 0), expected, atol=LEVELS)
            assert labels[row] == reader.read(index)[1]
            seen += 1
    assert seen == steps * 16


@pytest.mark.parametrize("fused", [True, False])
def test_images_are_channels_last_without_a_copy_and_stay_valid(dataset: Path, fused: bool) -> None:
    reader = ShardReader(dataset / "train")
    plan = Plan(len(reader), 8)
    options = {"end_step": 6, "workers": 0, "fused": fused}
    loader = train_loader(reader, plan, Preprocess.load(dataset / "train"), **options)
    held = [images for images, _ in loader]
    sums = [float(images.double().sum()) for images in held]
    assert all(i.is_contiguous(memory_format=torch.channels_last) for i in held)
    again = train_loader(reader, plan, Preprocess.load(dataset / "train"), **options)
    assert sums == [float(images.double().sum()) for images, _ in again]  # no buffer was written over


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", ["pixel", "channel"])
def test_ten_crops_are_corners_and_centre_then_mirrored(dataset: Path, mode: str, fused: bool) -> None:
    reader = ShardReader(dataset / "val")
    preprocess = Preprocess.load(dataset / "train", 224, mode)
    images, labels = next(eval_loader(reader, preprocess, 4, ten_crops=True, workers=0, fused=fused))
    assert images.shape == (4, 10, 3, 224, 224) and labels.shape == (4,)
    anchors = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
    for row in range(4):
        for view in range(10):
            anchor, flip = anchors[view % 5], view >= 5
            expected = oracle(
                pixels(reader, row), mean_of(dataset, mode), reader.manifest, anchor, flip, (0, 0, 0), 224
            )
            np.testing.assert_allclose(images[row, view].permute(1, 2, 0), expected, atol=LEVELS)


@pytest.mark.parametrize(("batch", "world"), [(1, 1), (7, 1), (64, 1), (5, 3), (3, 4)])
def test_evaluation_counts_every_image_once_every_time(dataset: Path, batch: int, world: int) -> None:
    reader = ShardReader(dataset / "val")
    preprocess = Preprocess.load(dataset / "train", 224, "none")
    expected = np.stack([pixels(reader, i)[16:240, 16:240].mean() for i in range(len(reader))])
    loaders = [
        eval_loader(reader, preprocess, batch, rank=r, world_size=world, workers=0) for r in range(world)
    ]
    for _ in range(2):
        found = [image.mean().item() for loader in loaders for images, _ in loader for image in images]
        np.testing.assert_allclose(found, expected, atol=0.01)


@pytest.mark.parametrize("workers", [0, 1])
def test_png_records_of_any_length_give_the_pixels_of_raw_ones(
    class_folders: Path, dataset: Path, tmp_path: Path, workers: int
) -> None:
    preprocess = Preprocess.load(dataset / "train")
    batches = []
    for encoding in ("png", "raw"):
        out = tmp_path / encoding
        build_split(open_source(class_folders / "val", "val"), out, Options(256, encoding, None), workers=1)
        batches.append(eval_loader(ShardReader(out / "val"), preprocess, 16, workers=workers))
    for (png, some), (raw, others) in zip(*batches, strict=True):
        assert torch.equal(png, raw) and torch.equal(some, others)


def test_ranks_and_resumption_leave_the_stream_as_it_was(dataset: Path) -> None:
    reader = ShardReader(dataset / "train")
    plan = Plan(len(reader), 16, seed=1)
    preprocess = Preprocess.load(dataset / "train")

    def batches(rank: int, world: int, first: int) -> list[torch.Tensor]:
        loader = train_loader(
            reader, plan, preprocess, rank=rank, world_size=world, first_step=first, end_step=8, workers=0
        )
        return [images.clone() for images, _ in loader]

    whole = batches(0, 1, 0)
    parts = [batches(rank, 4, 3) for rank in range(4)]
    assert len(whole) == 8 and len(parts[0]) == 5
    for step in range(5):
        assert torch.equal(torch.cat([part[step] for part in parts]), whole[3 + step])


def test_reader_processes_give_the_same_and_end_with_the_loader(dataset: Path) -> None:
    reader = ShardReader(dataset / "train")
    plan = Plan(len(reader), 16)
    preprocess = Preprocess.load(dataset / "train")
    children, shared = set(multiprocessing.active_children()), shared_memory_of(os.getpid())
    apart = train_loader(reader, plan, preprocess, end_step=3, workers=2)
    here = train_loader(reader, plan, preprocess, end_step=3, workers=0)
    for (a, la), (b, lb) in zip(apart, here, strict=True):
        assert torch.equal(a, b) and torch.equal(la, lb)
    readers = set(multiprocessing.active_children()) - children
    pids = [os.getpid(), *(r.pid for r in readers if r.pid)]
    shared = set.union(*map(shared_memory_of, pids)) - shared
    assert len(readers) == len(pids) - 1 == 2 and shared
    apart.close()
    assert set(multiprocessing.active_children()) == children
    assert not shared & {path.name for path in Path("/dev/shm").iterdir()}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["pixel", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gpu_gives_what_the_cpu_gives(dataset: Path, mode: str, dtype: torch.dtype) -> None:
    reader = ShardReader(dataset / "train")
    plan = Plan(len(reader), 16)
    preprocess = Preprocess.load(dataset / "train", 224, mode)
    cpu = train_loader(reader, plan, preprocess, end_step=3, workers=0)
    gpu = train_loader(
        reader, plan, preprocess, end_step=3, workers=1, device="gpu", device_id=0, dtype=dtype
    )
    for (a, la), (b, lb) in zip(cpu, gpu, strict=True):
        assert b.is_cuda and b.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(la, lb.cpu())
        # nvJPEG's inverse DCT and chroma filter differ from libjpeg-turbo's by a few levels
        assert (a - b.float().cpu()).abs().mean() < 1.5


def test_a_record_that_does_not_decode_is_named_by_a_reader_process_too(
    dataset: Path, tmp_path: Path
) -> None:
    """All records of one shard lose their bytes on disk, the file's size stays."""
    data = tmp_path / "train"
    shutil.copytree(dataset / "train", data)
    reader = ShardReader(data)
    file = data / reader.manifest.shards[1]["name"] / "data.mdb"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"shard.*key"):
        list(
            train_loader(reader, Plan(len(reader), 32), Preprocess.load(data), end_step=3, workers=1)
        )  # fmt: skip


def test_reader_processes_are_light_and_deaf_to_ctrl_c(dataset: Path) -> None:
    reader = ShardReader(dataset / "train")
    plan = Plan(len(reader), 16)
    loader = train_loader(reader, plan, Preprocess.load(dataset / "train"), end_step=6, workers=1)
    next(loader)
    children = [Path(f"/proc/{p.pid}") for p in multiprocessing.active_children()]
    assert children and not any("libtorch" in (c / "maps").read_text() for c in children)
    for child in children:
        os.kill(int(child.name), signal.SIGINT)
    assert len(list(loader)) == 5


@pytest.mark.parametrize("fused", [True, False])
def test_a_record_that_does_not_decode_is_named(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    reader = ShardReader(dataset / "train")
    plan = Plan(len(reader), 8)
    broken = int(plan.samples(0, 1)[3])
    read = ShardReader.read

    def damaged(self: ShardReader, index: int) -> tuple[np.ndarray, int]:
        data, label = read(self, index)
        return (data[:40] if index == broken else data), label

    monkeypatch.setattr(ShardReader, "read", damaged)
    shard, key = reader.locate(broken)
    loader = train_loader(
        reader, plan, Preprocess.load(dataset / "train"), end_step=3, workers=0, fused=fused
    )
    next(loader)
    for _ in range(3):  # nothing comes after it, which could be seen through another batch's crops
        with pytest.raises(DataError, match=f"{shard}, key {key.decode()}"):
            next(loader)


@pytest.mark.parametrize("size", [200, 300])
@pytest.mark.parametrize("every", [True, False], ids=["all", "one"])
@pytest.mark.parametrize("fused", [True, False])
def test_records_of_another_size_are_named(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, fused: bool, every: bool, size: int
) -> None:
    """Smaller than a crop, and larger than what the crops were planned for, which would go unnoticed."""
    reader = ShardReader(dataset / "train")
    plan = Plan(len(reader), 8)
    wrong = int(plan.samples(0, 0)[0 if every else 3])
    other = cv2.imencode(".jpg", np.zeros((size, size, 3), np.uint8))[1].ravel()
    read = ShardReader.read

    def damaged(self: ShardReader, index: int) -> tuple[np.ndarray, int]:
        data, label = read(self, index)
        return (other if every or index == wrong else data), label

    monkeypatch.setattr(ShardReader, "read", damaged)
    shard, key = reader.locate(wrong)
    loader = train_loader(
        reader, plan, Preprocess.load(dataset / "train"), end_step=3, workers=0, fused=fused
    )
    with pytest.raises(DataError, match=f"{shard}, key {key.decode()}"):
        list(loader)


def test_preprocess_survives_a_checkpoint(dataset: Path, tmp_path: Path) -> None:
    preprocess = Preprocess.load(dataset / "train", 200, "channel")
    torch.save(preprocess.state_dict(), tmp_path / "p.pt")
    back = Preprocess.from_state_dict(torch.load(tmp_path / "p.pt", weights_only=True))
    assert (back.size, back.crop, back.mean_mode) == (256, 200, "channel")
    assert np.array_equal(back.mean, preprocess.mean)
    assert np.array_equal(back.color_basis, preprocess.color_basis)


def test_unknown_mean_and_oversized_share_are_refused(dataset: Path) -> None:
    with pytest.raises(DataError, match="use one of"):
        Preprocess.load(dataset / "train", 224, "median")
    assert rank_slice(3, 3, 4) == slice(2, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 10**9},
        {"size": "256"},
        {"crop": 257},
        {"crop": 0},
        {"mean_mode": ["pixel"]},
        {"mean": torch.zeros(4, 4, 3)},
        {"mean": torch.zeros(256, 256, 3, dtype=torch.float64)},
        {"mean": torch.full((256, 256, 3), torch.nan)},
        {"mean": None},
        {"color_basis": torch.zeros(3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_preprocessing_of_a_strangers_checkpoint_is_checked(dataset: Path, change: dict[str, Any]) -> None:
    state = Preprocess.load(dataset / "train").state_dict()
    Preprocess.from_state_dict(state)
    with pytest.raises(ValueError, match=r"its |a crop of"):
        Preprocess.from_state_dict({**state, **change})


def test_plan_and_preprocessing_have_to_fit(dataset: Path) -> None:
    reader = ShardReader(dataset / "train")
    preprocess = Preprocess.load(dataset / "train", crop=192)
    with pytest.raises(ValueError, match="crops 224 of 256 pixels, the preprocessing 192 of 256"):
        train_loader(reader, Plan(len(reader), 8), preprocess, end_step=1)
    with pytest.raises(ValueError, match="batch of 8 cannot be divided among 3 ranks"):
        train_loader(reader, Plan(len(reader), 8, crop=192), preprocess, end_step=1, world_size=3)
