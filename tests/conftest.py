"""Photographs from the scikit-image wheel, and a small data set made from them."""

import math
import os
import signal
import tempfile
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import ROOT

import pipeline.load.readers
from pipeline.build.sources import open_source
from pipeline.build.split import Options, build_split

CLASSES = ("astronaut", "chelsea", "coffee", "rocket")
TRAIN_TILES, VAL_TILES = 24, 6  # per class


@pytest.fixture(scope="session")
def photos() -> dict[str, Path]:
    """Name -> path of photographs between 300 and 1411 pixels wide."""
    spec = find_spec("skimage")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "data"
    files = [
        *(f"{name}.png" for name in ("astronaut", "chelsea", "coffee", "ihc", "motorcycle_left")),
        *(f"{name}.jpg" for name in ("rocket", "retina", "hubble_deep_field")),
    ]
    return {Path(name).stem: folder / name for name in files}


@pytest.fixture(scope="session")
def class_folders(photos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SOURCE/{train,val}/<class>/*.JPEG: 96 and 24 tiles of four photographs, in many sizes."""
    source = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(12)
    for name in CLASSES:
        photo = cv2.imread(str(photos[name]))
        assert photo is not None
        for split, count in (("train", TRAIN_TILES), ("val", VAL_TILES)):
            folder = source / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(180, 300, 2)
                top = rng.integers(0, photo.shape[0] - height + 1)
                left = rng.integers(0, photo.shape[1] - width + 1)
                tile = photo[top : top + height, left : left + width]
                cv2.imwrite(str(folder / f"{name}_{i}.JPEG"), tile)
    return source


@pytest.fixture(scope="session")
def dataset(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATA with train/ (96 images, 3 shards) and val/ (24 images, 1 shard) of four classes. Do not change it."""
    data = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        source = open_source(class_folders / split, split)
        build_split(source, data, Options(images_per_shard=32), workers=2)
    return data


@pytest.fixture(autouse=True, scope="session")
def no_reader_ends_the_tests() -> None:
    """Disable the time limit after which a trainer that waits for a dead reader ends its own process."""
    pipeline.load.readers.PATIENCE = math.inf


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Make tests independent of how they are started and of the user's cache of kernels."""
    # before test modules are imported, because some compile kernels then
    cache = tempfile.TemporaryDirectory(prefix="alexnet-tests-")
    config.add_cleanup(cache.cleanup)
    os.environ["XDG_CACHE_HOME"] = cache.name
    os.environ.pop("ALEXNET_NATIVE", None)
    # `nohup make test &` ignores these signals, and child processes inherit that; they do not inherit a handler
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests in tests/system as slow; skip those marked `gpu` without a GPU."""
    import torch

    without_gpu = not torch.cuda.is_available()
    for item in items:
        if ROOT / "tests/system" in item.path.parents:
            item.add_marker(pytest.mark.slow)
        if without_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))
