"""Builds from one large file are killed, and continue where they were: the same bytes as without the kill."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import OPTIONS, ROOT, held_up, tree, wait_until, webdataset, write_parquet

from pipeline.build.sources import open_source
from pipeline.build.split import build_split


def _parquet(folder: Path, photographs: list[tuple[bytes, int]]) -> None:
    rows = [(content, None, label) for content, label in photographs]
    for number in range(2):
        write_parquet(folder / f"train-{number:05d}-of-00002.parquet", rows[number::2], None)


def _webdataset(folder: Path, photographs: list[tuple[bytes, int]]) -> None:
    images = {f"{number:04d}": content for number, (content, _) in enumerate(photographs)}
    labels = {f"{number:04d}": label for number, (_, label) in enumerate(photographs)}
    folder.mkdir()
    for number in range(2):
        part = {key: images[key] for key in list(images)[number::2]}
        (folder / f"x-train-{number:04d}.tar").write_bytes(webdataset(part, labels))


@pytest.mark.parametrize("make", [_parquet, _webdataset])
def test_parquet_and_webdataset_builds_resume_after_kill_9(
    class_folders: Path, tmp_path: Path, make: Callable[[Path, list[tuple[bytes, int]]], None]
) -> None:
    folders = sorted((class_folders / "train").iterdir())
    photographs = [(p.read_bytes(), label) for label, f in enumerate(folders) for p in sorted(f.iterdir())]
    make(tmp_path / "source", photographs)
    source = open_source(tmp_path / "source", "train")
    build_split(source, tmp_path / "whole", OPTIONS, workers=1)
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools/build_lmdb.py"), str(tmp_path / "source"), str(out)]
    options = ["--split", "train", "--size", "64", "--images-per-shard", "8", "--workers", "2", "--resume"]
    with held_up(out, 11) as work:
        process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: len(list(work.glob("*.npz"))) >= 3)
        process.kill()
        process.wait()
        finished = len(list(work.glob("*.npz")))
        assert not (out / "train").exists()
    summary = build_split(source, out, OPTIONS, workers=2, resume=True)
    assert 8 * finished <= summary.resumed < summary.accepted == 96
    assert tree(out / "train") == tree(tmp_path / "whole/train")
    assert [path.name for path in out.iterdir()] == ["train"]
