"""Whole builds: determinism, kills and resumes, crashing files, full and read-only disks, the command line."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import CRASH, OPTIONS, ROOT, held_up, tree, wait_until

import pipeline.build.split
from base.errors import DataError, UserError
from base.files import lock
from pipeline.build.images import prepare
from pipeline.build.sources import find_splits, not_read, open_source
from pipeline.build.split import Options, build_split
from pipeline.shards import Manifest, ShardReader
from tools.build_lmdb import main as build
from tools.verify_lmdb import main as verify


@pytest.fixture(scope="module")
def expected(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of an undisturbed build with OPTIONS."""
    out = tmp_path_factory.mktemp("expected")
    build_split(open_source(class_folders / "train", "train"), out, OPTIONS, workers=1)
    return tree(out / "train")


def test_any_number_of_workers_gives_the_same_bytes(
    class_folders: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    seen: list[tuple[int, int]] = []
    summary = build_split(
        open_source(class_folders / "train", "train"),
        tmp_path,
        OPTIONS,
        workers=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert tree(tmp_path / "train") == expected
    assert (summary.accepted, summary.rejected, summary.resumed) == (96, [], 0)
    assert seen[0] == (0, 96) and seen[-1] == (96, 96)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_images_labels_and_statistics_are_those_of_the_source(class_folders: Path, tmp_path: Path) -> None:
    source = open_source(class_folders / "train", "train")
    build_split(source, tmp_path, Options(64, "raw", None, 20, seed=5), workers=2)
    reader = ShardReader(tmp_path / "train")
    manifest = reader.manifest
    stored = [reader.read(index) for index in range(len(reader))]
    want = [(prepare((source.path / i.name).read_bytes(), 64), i.label) for i in source.images]
    order = np.argsort(np.random.Philox(key=5).random_raw(96), kind="stable")
    for (image, label), index in zip(stored, order, strict=True):
        assert label == want[index][1] and np.array_equal(image, want[index][0])
    pixels = np.stack([image for image, _ in stored]).astype(np.int64)
    mean = manifest.load_mean(tmp_path / "train")
    assert mean.dtype == np.float32 and np.array_equal(mean, (pixels.sum(0) / 96).astype(np.float32))
    flat = pixels.reshape(-1, 3)
    assert np.allclose(manifest.channel_mean, flat.mean(0), rtol=1e-12)
    values, vectors = np.array(manifest.pca_eigenvalues), np.array(manifest.pca_eigenvectors)
    covariance = np.cov(flat.T / 255, bias=True)
    assert np.allclose(vectors @ np.diag(values) @ vectors.T, covariance, rtol=1e-9)


def test_odd_files_are_counted_and_named(class_folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    shutil.copytree(class_folders / "val", folder)
    jpeg = next((folder / "coffee").iterdir()).read_bytes()
    (folder / "coffee/empty.JPEG").write_bytes(b"")
    (folder / "coffee/cut.JPEG").write_bytes(jpeg[:-50])
    (folder / "rocket/notes.txt").write_text("no image")
    (folder / "rocket/broken.JPEG").symlink_to("nowhere")
    result = CliRunner().invoke(
        build, [str(folder), str(tmp_path / "out"), "--split", "val", "--workers", "2"]
    )
    assert result.exit_code == 0, result.output
    assert "28 images seen = 24 accepted + 4 rejected" in result.output
    assert "coffee/cut.JPEG': truncated JPEG" in result.output
    manifest = Manifest.load(tmp_path / "out/val")
    assert {entry["source"]: entry["reason"] for entry in manifest.rejected} == {
        "coffee/cut.JPEG": "truncated JPEG",
        "coffee/empty.JPEG": "empty file",
        "rocket/broken.JPEG": "cannot be read: No such file or directory",
        "rocket/notes.txt": "not a JPEG, PNG, GIF, BMP or WebP file",
    }
    assert manifest.count == 24 == sum(shard["count"] for shard in manifest.shards)
    assert CliRunner().invoke(verify, [str(tmp_path / "out")]).exit_code == 0


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "raw/a").mkdir(parents=True)
    (tmp_path / "raw/a/x.JPEG").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"none of the 1 images .* a/x.JPEG \(not a JPEG"):
        build_split(open_source(tmp_path / "raw", "train"), tmp_path, OPTIONS, workers=1)


# --- kills and resumes -------------------------------------------------------------------------------------


def _command(source: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--split", "train", "--size", "64", "--images-per-shard", "8", "--workers", "2"]
    return [sys.executable, str(ROOT / "tools/build_lmdb.py"), str(source), str(out), *fixed, *more]


@pytest.fixture(scope="module")
def slow_folders(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, each followed by 6 MB that decoders ignore: slow enough to be killed half-way."""
    root = tmp_path_factory.mktemp("slow")
    shutil.copytree(class_folders / "train", root / "train")
    for path in (root / "train").rglob("*.JPEG"):
        with path.open("ab") as file:
            file.write(bytes(6 << 20))
    return root


@pytest.mark.parametrize("when", [0, 5])
def test_resume_after_kill_9_equals_an_undisturbed_build(
    slow_folders: Path, tmp_path: Path, expected: dict[str, bytes], when: int
) -> None:
    command, quiet = _command(slow_folders, tmp_path, "--resume"), subprocess.DEVNULL
    with held_up(tmp_path, 11) as work:
        process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
        wait_until(lambda: (work / "build.json").exists() and len(list(work.glob("*.npz"))) >= when)
        process.kill()
        process.wait()
    assert not (tmp_path / "train").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in work.glob("shard-*.npz")}
    source = open_source(slow_folders / "train", "train")
    with pytest.raises(DataError, match="--resume"):
        build_split(source, tmp_path, OPTIONS, workers=2)
    with pytest.raises(DataError, match="other options"):
        build_split(source, tmp_path, replace(OPTIONS, seed=1), workers=2, resume=True)
    assert finished.items() <= {path.name: path.stat().st_mtime_ns for path in work.glob("*.npz")}.items()
    summary = build_split(source, tmp_path, OPTIONS, workers=2, resume=True)
    # A worker that was at its last image when the main process died may have finished its shard.
    assert 8 * len(finished) <= summary.resumed < 96
    assert tree(tmp_path / "train") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    # Once more: nothing is left to do, and nothing is done.
    before = (tmp_path / "train/manifest.json").stat().st_mtime_ns
    assert build_split(source, tmp_path, OPTIONS, workers=2, resume=True).resumed == 96
    assert (tmp_path / "train/manifest.json").stat().st_mtime_ns == before


def test_ctrl_c_is_one_line_and_leaves_no_process(slow_folders: Path, tmp_path: Path) -> None:
    with held_up(tmp_path, 11) as work:
        process = subprocess.Popen(
            _command(slow_folders, tmp_path, "--resume"),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_until(lambda: any(work.glob("shard-*.npz")))
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "Traceback" not in errors and errors.splitlines()[-1] == "Interrupted: continue with --resume."

    def group_is_gone() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(group_is_gone)


def test_ctrl_c_does_not_reach_a_worker_that_starts(tmp_path: Path) -> None:
    """The module of the job interrupts the fork server that imports it, and the job its worker."""
    (tmp_path / "interrupting.py").write_text(
        "import multiprocessing, os, signal, sys\n"
        "if 'forkserver' in ' '.join(sys.orig_argv): os.kill(os.getpid(), signal.SIGINT)\n"
        "def double(job, report): os.kill(os.getpid(), signal.SIGINT); return 2 * job\n"
    )
    code = (
        "import interrupting; from pipeline.build.workers import WorkerPool\n"
        "with WorkerPool(interrupting.double, 2) as pool:\n"
        "    for job in range(4): pool.submit(job, job)\n"
        "    print(sorted((number, event.result) for number, event in pool.events(lambda: None)))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[(0, 0), (1, 2), (2, 4), (3, 6)]\n", "")


def test_a_kill_at_the_very_end_is_finished_by_resume(
    class_folders: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(class_folders / "train", "train")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.build.split, "_publish", killed)
        build_split(source, tmp_path, OPTIONS, workers=2)
    shutil.rmtree(tmp_path / "train.partial/work")
    build_split(source, tmp_path, OPTIONS, workers=2, resume=True)
    assert tree(tmp_path / "train") == expected


def test_existing_output_needs_a_flag(
    class_folders: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    source = open_source(class_folders / "train", "train")
    other = Options(size=32)
    build_split(source, tmp_path, other, workers=2)
    for resume, flag in ((False, "--overwrite"), (True, "--overwrite")):
        with pytest.raises(DataError, match=flag):
            build_split(source, tmp_path, OPTIONS, workers=2, resume=resume)
    assert Manifest.load(tmp_path / "train").size == 32
    build_split(source, tmp_path, OPTIONS, workers=2, overwrite=True)
    assert tree(tmp_path / "train") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize("flag", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize(
    "place",
    [
        *("train/n01440764/photo.jpg", "train/photo.jpg", "train/work/photo.jpg", "train/.git/config"),
        *(
            "train/holiday.tmp/photo.jpg",
            "train/shard-00000/photo.jpg",
            "train/shard-00000/n01440764/photo.jpg",
        ),
        *("train.partial/n01440764/photo.jpg", "train.replaced/n01440764/photo.jpg"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_what_no_build_made_is_never_deleted(
    class_folders: Path, tmp_path: Path, expected: dict[str, bytes], flag: list, place: str, finished: bool
) -> None:
    """Photographs named as OUT by mistake, or anything else, in the way or within a data set."""
    for name, content in expected.items() if finished else ():
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(content)
    theirs = tmp_path / place
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_bytes(b"a photograph")
    command = [str(class_folders), str(tmp_path), "--split", "train", "--workers", "1"]
    command += ["--size", "64", "--images-per-shard", "8"]
    CliRunner().invoke(build, [*command, *flag])
    assert theirs.read_bytes() == b"a photograph"


def test_what_comes_while_a_build_is_at_work_is_not_deleted(
    class_folders: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    source = open_source(class_folders / "train", "train")
    theirs = tmp_path / "train/n01440764/photo.jpg"

    def come(done: int, total: int) -> None:
        theirs.parent.mkdir(parents=True, exist_ok=True)
        theirs.write_bytes(b"a photograph")

    for overwrite in (False, True):
        with pytest.raises(DataError, match="holds n01440764, which no build made: move it away"):
            build_split(source, tmp_path, OPTIONS, workers=2, progress=come, overwrite=overwrite)
        assert theirs.read_bytes() == b"a photograph"
        shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    build_split(source, tmp_path, OPTIONS, workers=2, resume=True)
    assert tree(tmp_path / "train") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_split_in_the_way_is_told_before_the_other_is_built(class_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    result = CliRunner().invoke(build, [str(class_folders), str(tmp_path)])
    assert result.exit_code == 1 and f"{tmp_path / 'val'} already exists" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["val"]
    result = CliRunner().invoke(build, [str(class_folders), str(tmp_path / ("a" * 300))])
    assert result.exit_code == 1 and "File name too long" in result.output


def test_a_source_is_not_its_own_output(class_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(class_folders, tmp_path / "photos")
    before = tree(tmp_path / "photos")
    result = CliRunner().invoke(build, [str(tmp_path / "photos"), str(tmp_path / "photos"), "--overwrite"])
    assert result.exit_code == 1 and "give another OUT" in result.output
    assert tree(tmp_path / "photos") == before


def test_folders_that_may_have_been_meant_are_named(class_folders: Path, tmp_path: Path) -> None:
    for name, split in (("train", "train"), ("extra", "val")):
        shutil.copytree(class_folders / split, tmp_path / "photos" / name)
    options = [str(tmp_path / "out"), "--workers", "2", "--size", "32"]
    result = CliRunner().invoke(build, [str(tmp_path / "photos"), *options])
    assert result.exit_code == 0 and "also holds extra, which is not read" in result.output
    assert f"{len(list((class_folders / 'train').iterdir()))} classes" in result.output
    shutil.copytree(class_folders / "val", tmp_path / "photos/val")
    shutil.rmtree(tmp_path / "photos/extra")
    (tmp_path / "photos/ILSVRC2012_devkit_t12").mkdir()
    (tmp_path / "photos/lists").mkdir()
    (tmp_path / "photos/lists/names.txt").write_text("coffee a cup\n")
    split_found = find_splits(tmp_path / "photos")
    photos = tmp_path / "photos"
    assert not_read(photos, split_found, [photos / "lists/names.txt"]) == (photos, [])
    shutil.rmtree(tmp_path / "photos/val")
    (tmp_path / "photos/train").rename(tmp_path / "photos/training")
    (tmp_path / "photos/testing").mkdir()
    result = CliRunner().invoke(build, [str(tmp_path / "photos"), *options])
    assert result.exit_code == 1 and "testing and training, which look like splits" in result.output


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_val_may_have_another_name(name: str, class_folders: Path, tmp_path: Path) -> None:
    """Folders of CIFAR-10 have test/, other data sets valid/. Test images without classes are not taken."""
    photos = tmp_path / "photos"
    shutil.copytree(class_folders / "train", photos / "train")
    shutil.copytree(class_folders / "val", photos / name)
    result = CliRunner().invoke(build, [str(photos), str(tmp_path / "out"), "--workers", "1", "--size", "32"])
    assert result.exit_code == 0 and f"val is {photos / name}\n" in result.output
    assert "not read" not in result.output
    found = {split: Manifest.load(tmp_path / "out" / split).count for split in ("train", "val")}
    assert found == {split: len(list((class_folders / split).glob("*/*"))) for split in found}
    options = [str(photos), str(tmp_path / "own"), "--workers", "1", "--size", "32"]
    result = CliRunner().invoke(build, [*options, "--split", "val"])
    assert result.exit_code == 0 and f"val is {photos / name}\n" in result.output
    # the held-out images stay so if others are validated
    result = CliRunner().invoke(build, [*options, "--val-fraction", "0.5", "--overwrite"])
    assert result.exit_code == 0 and f"also holds {name}, which is not read" in result.output
    assert Manifest.load(tmp_path / "own/val").count == found["train"] / 2
    next((photos / name).iterdir()).rename(photos / name / "another class")
    assert find_splits(photos) == {"train": photos / "train"}


def test_a_build_without_a_compiler_says_so_once(
    class_folders: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """Once although several processes look for the kernel, and not inside the progress bar."""
    command = [sys.executable, "tools/build_lmdb.py", str(class_folders), str(tmp_path), "--split", "train"]
    command += ["--size", "64", "--images-per-shard", "8", "--workers", "2"]
    environment = {**os.environ, "CXX": "/no/such/compiler", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("ALEXNET_NATIVE", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("prepared by OpenCV alone, which is slower: ") == 1
    assert tree(tmp_path / "train") == expected
    again = subprocess.run([*command, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "OpenCV alone" not in again.stderr  # nothing was left to do


def test_two_builds_at_once_are_refused(class_folders: Path, tmp_path: Path) -> None:
    source = open_source(class_folders / "val", "val")
    (tmp_path / "val.partial").mkdir()
    for resume in (True, False):
        with (
            lock(tmp_path / "val.partial", ""),
            pytest.raises(UserError, match="another build is running"),
        ):
            build_split(source, tmp_path, OPTIONS, workers=1, resume=resume)


# --- workers that die --------------------------------------------------------------------------------------


def _write_shard_or_die(job: Any, report: Any) -> None:
    """In a worker: as the real one, with a decoder that crashes on one file and once on another."""

    def decoder(data: bytes, size: int) -> np.ndarray:
        if data == CRASH:
            os.kill(os.getpid(), signal.SIGSEGV)
        once = job.partial.parent / "killed-once"
        if job.number == 1 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(data, size)

    real = pipeline.build.split.prepare_bgr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.build.split, "prepare_bgr", decoder)
        real_write_shard(job, report)


real_write_shard = pipeline.build.split.write_shard


@pytest.mark.slow
def test_a_file_that_crashes_the_decoder_is_rejected(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "raw"
    shutil.copytree(class_folders / "val", folder)
    (folder / "coffee/evil.JPEG").write_bytes(CRASH)
    (folder / "rocket/evil.JPEG").write_bytes(CRASH)
    monkeypatch.setattr(pipeline.build.split, "write_shard", _write_shard_or_die)
    summary = build_split(open_source(folder, "val"), tmp_path, OPTIONS, workers=2)
    assert (tmp_path / "killed-once").exists()
    assert summary.accepted == 24
    assert summary.rejected == [
        {"source": f"{name}/evil.JPEG", "reason": "crashed the decoder"} for name in ("coffee", "rocket")
    ]


def _always_die(job: Any, report: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_workers_that_always_die_end_the_build(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.build.split, "write_shard", _always_die)
    with pytest.raises(DataError, match="fewer --workers"):
        build_split(open_source(class_folders / "val", "val"), tmp_path, OPTIONS, workers=2)


# --- disks -------------------------------------------------------------------------------------------------


def test_full_disk_is_one_line_and_resumable(
    class_folders: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        source = open_source(class_folders / "train", "train")
        with pytest.raises(DataError, match="full: free some space, then continue with --resume") as caught:
            build_split(source, disk, OPTIONS, workers=2)
        assert "\n" not in caught.value.message
        assert [path.name for path in disk.iterdir()] == ["train.partial"]
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        summary = build_split(source, disk, OPTIONS, workers=2, resume=True)
        assert summary.resumed > 0 and tree(disk / "train") == expected
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert len([ShardReader(disk / "train").read(index) for index in range(96)]) == 96
        with pytest.raises(DataError, match="Read-only file system"):
            build_split(source, disk, OPTIONS, workers=2, overwrite=True)
        assert tree(disk / "train") == expected
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_file_size_limit_is_one_line(class_folders: Path, tmp_path: Path) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    arguments = [str(class_folders / "val"), str(tmp_path), "--workers", "2"]
    code = f"{limited}from tools.build_lmdb import main; main({arguments!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "File too large" in result.stderr.splitlines()[-1]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 60_000


# --- the command line --------------------------------------------------------------------------------------


def test_both_splits_from_one_folder(class_folders: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(build, [str(class_folders), str(tmp_path), "--size", "32", "--quality", "80"])
    assert result.exit_code == 0, result.output
    for split, count in (("train", 96), ("val", 24)):
        manifest = Manifest.load(tmp_path / split)
        assert (manifest.count, manifest.size, manifest.quality) == (count, 32, 80)
        text = json.loads((tmp_path / split / "manifest.json").read_text())
        assert text["classes"][1] == {"name": None, "wnid": "chelsea"}
    result = CliRunner().invoke(verify, [str(tmp_path)])
    assert result.exit_code == 0 and "96 images, 4 classes" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resume", "--overwrite"],
        ["--encoding", "png", "--quality", "80"],
        ["--encoding", "gif"],
        ["--workers", "0"],
        ["--quality", "101"],
        ["--seed", "-1"],
        ["--labels", "nowhere.txt"],
        ["--images-per-shard", "0"],
    ],
)
def test_bad_usage_exits_with_2(class_folders: Path, tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(build, [str(class_folders), str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "out").exists()


def test_failed_work_exits_with_1_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(build, [str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert result.exit_code == 1 and result.output.count("\n") == 1 and "does not exist" in result.output
    result = CliRunner().invoke(verify, [str(tmp_path / "nowhere")])
    assert result.exit_code == 1 and "tools/build_lmdb.py" in result.output
