"""Stage build: the whole command, against bare loops and a converter written with Pillow."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from pipeline.build.images import RejectedError, encode_bgr, prepare_bgr
from tools.bench.core import Bench, Row, build
from tools.bench.peer_loaders import square_image


def build_rate(source: Path, out: Path, workers: int) -> float:
    return build(source, out, workers).rate


def timed(files: list[Path], work: Callable[[bytes], object]) -> float:
    """Images per second of `work` on files held in memory, one after the other on one thread."""
    cv2.setNumThreads(1)
    contents = [path.read_bytes() for path in files]
    began = time.perf_counter()
    for content in contents:
        work(content)
    return len(contents) / (time.perf_counter() - began)


def opencv_loop(files: list[Path]) -> float:
    """Decoding, resizing and encoding with OpenCV."""

    def convert(content: bytes) -> None:
        image = cv2.imdecode(
            np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
        if image is None:  # a build reports it
            return
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[top : top + side, left : left + side]
        method = cv2.INTER_AREA if side > 256 else cv2.INTER_CUBIC
        square = cv2.resize(square, (256, 256), interpolation=method)
        cv2.imencode(".jpg", square, [cv2.IMWRITE_JPEG_QUALITY, 90])

    return timed(files, convert)


def own_loop(files: list[Path]) -> float:
    """The same with the build's functions: its work without files, checksums, statistics and LMDB."""

    def convert(content: bytes) -> None:
        with suppress(RejectedError):
            encode_bgr(prepare_bgr(content), "jpeg", 90)

    return timed(files, convert)


def pillow_loop(files: list[Path]) -> float:
    """A converter written with Pillow: images per second of this process."""
    with tempfile.TemporaryDirectory(dir=files[0].parents[2]) as folder:  # the disk that ours writes to
        began = time.perf_counter()
        for path in files:
            square_image(path).save(Path(folder, "pillow.jpg"), quality=90)
        return len(files) / (time.perf_counter() - began)


def at_once(
    pool: ProcessPoolExecutor, count: int, loop: Callable[[list[Path]], float], files: list[Path]
) -> float:
    """The total rate of `count` loops in as many processes."""
    return sum(pool.map(loop, [files] * count))


def bench_build(bench: Bench) -> Iterator[Row]:
    """The whole command against loops that only convert, one loop per worker."""
    source, images = bench.repeated(bench.enough), bench.enough * len(bench.files)
    for workers in sorted({1, bench.workers}):
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            at_once(pool, workers, own_loop, bench.files)  # starts the processes
            ours, limit, own, peer = bench.rates(
                partial(build_rate, source, bench.work / "built", workers),
                partial(at_once, pool, workers, opencv_loop, bench.files),
                partial(at_once, pool, workers, own_loop, bench.files),
                partial(at_once, pool, workers, pillow_loop, bench.files),
            )
        yield Row(
            "build", f"{workers} workers, {images:,} images, whole command", "images/s", ours,
            limit, f"OpenCV's decode+resize+encode in a bare loop, {workers} at once",
            peer, f"Pillow loop, {workers} at once",
        )  # fmt: skip
        yield Row(
            "build", f"{workers} workers, against its own functions in a bare loop", "images/s", ours,
            own, f"{workers} at once",
        )  # fmt: skip
