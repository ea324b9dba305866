"""Builds on a Dask cluster: the same bytes as on one machine, whatever becomes of the workers."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_build import CRASH, OPTIONS, ROOT, _tree, _wait_until

import pipeline.build
from pipeline import DataError
from pipeline.build import build_split
from pipeline.raw import open_source
from tools.build_lmdb import main as build

distributed = pytest.importorskip("distributed", reason="Dask is missing: pip install -e '.[cluster]'")
cluster_module = pytest.importorskip("pipeline.cluster")


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a scheduler with two workers, processes of their own; nannies start killed ones again."""
    folder = tmp_path_factory.mktemp("cluster")
    file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    where = ["--scheduler-file", str(file), "--no-dashboard"]
    commands = [
        [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", *where],
        [*dask, "worker", "--host", "127.0.0.1", "--nworkers", "2", "--nthreads", "1", *where],
    ]
    # the tests' own jobs are found by name on the workers
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    processes = [
        subprocess.Popen(
            command, cwd=folder, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for command in commands
    ]
    try:
        _wait_until(file.exists, 60)
        with distributed.Client(scheduler_file=str(file), set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            yield client.scheduler.address
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def slow_folder(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, each followed by 6 MB that decoders ignore: slow enough to be killed half-way."""
    folder = tmp_path_factory.mktemp("slow") / "train"
    shutil.copytree(class_folders / "train", folder)
    for path in folder.rglob("*.JPEG"):
        with path.open("ab") as file:
            file.write(bytes(6 << 20))
    return folder


@pytest.fixture(scope="module")
def local(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of a build on this machine."""
    out = tmp_path_factory.mktemp("local")
    build_split(open_source(class_folders / "train", "train"), out, OPTIONS, workers=2)
    return _tree(out / "train")


def _start(scheduler: str, source: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools/build_lmdb.py"), str(source), str(out), "--split", "train"]
    command += ["--size", "64", "--images-per-shard", "8", "--scheduler", scheduler, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]


def _pids(scheduler: str) -> list[int]:
    with distributed.Client(scheduler, set_as_default=False) as client:
        return list(client.run(os.getpid).values())


def test_a_worker_killed_in_mid_build_costs_nothing(
    scheduler: str, slow_folder: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    victim = _pids(scheduler)[0]
    process = _start(scheduler, slow_folder, tmp_path)
    work = tmp_path / "train.partial/work"
    _wait_until(lambda: any(work.glob("shard-*.npz")))
    os.kill(victim, signal.SIGKILL)
    left = len(list(work.glob("shard-*.npz")))
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert left < 12  # shards in all
    assert "96 images seen = 96 accepted + 0 rejected" in said
    assert "96/96" in errors and "Traceback" not in errors
    assert _tree(tmp_path / "train") == local
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_ctrl_c_stops_the_workers_and_resume_goes_on(
    scheduler: str, slow_folder: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    process = _start(scheduler, slow_folder, tmp_path)
    work = tmp_path / "train.partial/work"
    _wait_until(lambda: any(work.glob("shard-*.npz")))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and errors.splitlines()[-1] == "Interrupted: continue with --resume."
    assert not list(work.glob("*.at"))
    process = _start(scheduler, slow_folder, tmp_path, "--resume")
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "from before" in said
    assert _tree(tmp_path / "train") == local


real_write_shard = pipeline.build.write_shard


def _write_shard_or_die(job, report) -> None:  # type: ignore[no-untyped-def]
    """On a worker: as the real one, with a decoder that crashes on one file."""

    def decoder(data: bytes, size: int) -> np.ndarray:
        if data == CRASH:
            ctypes.string_at(0)  # a segmentation fault
        return real(data, size)

    real, pipeline.build.prepare_bgr = pipeline.build.prepare_bgr, decoder
    try:
        real_write_shard(job, report)
    finally:
        pipeline.build.prepare_bgr = real


def test_a_file_that_kills_workers_is_rejected(
    scheduler: str, class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "raw"
    shutil.copytree(class_folders / "val", folder)
    (folder / "coffee/evil.JPEG").write_bytes(CRASH)
    monkeypatch.setattr(pipeline.build, "write_shard", _write_shard_or_die)
    with cluster_module.Cluster(scheduler, folder, tmp_path) as cluster:
        source = open_source(folder, "val")
        summary = build_split(source, tmp_path, OPTIONS, workers=1, make_pool=cluster.pool)
        allowed = cluster.client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.allowed_failures)
    assert allowed == 0
    assert summary.accepted == 24
    assert summary.rejected == [{"source": "coffee/evil.JPEG", "reason": "crashed the decoder"}]
    with distributed.Client(scheduler, set_as_default=False) as client:  # the scheduler's own rule is back
        assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.allowed_failures) == 3


def test_few_jobs_are_under_way_at_once(scheduler: str, class_folders: Path, tmp_path: Path) -> None:
    """However many images there are, the scheduler holds the lists of a few shards."""
    with cluster_module.Cluster(scheduler, class_folders, tmp_path) as cluster:
        most = []

        def make_pool(*arguments: object) -> object:
            pool = cluster.pool(*arguments)  # type: ignore[arg-type]
            send = pool._send
            pool._send = lambda *job: (send(*job), most.append(len(pool._sent)))
            return pool

        source = open_source(class_folders / "train", "train")
        build_split(source, tmp_path, OPTIONS, workers=1, make_pool=make_pool)
    assert len(most) == 12 and max(most) <= 2 * len(_pids(scheduler))


def test_what_workers_cannot_see_is_said_before_any_work(scheduler: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"the worker tcp://.* cannot read .*nowhere: SOURCE has to be on"
    ) as error:
        cluster_module.Cluster(scheduler, tmp_path / "nowhere", tmp_path)
    assert "\n" not in error.value.message
    look = cluster_module._look_around
    assert "OUT has to be on a file system that all workers share" in look("/", str(tmp_path / "x"), "0")
    (tmp_path / "token").write_text("token")
    assert "has OpenCV" in look("/", str(tmp_path / "token"), "0")
    assert look("/", str(tmp_path / "token"), cluster_module.cv2.__version__) is None
    assert not list(tmp_path.glob(".*"))


def test_a_scheduler_that_is_not_there_is_one_line(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "SECONDS_TO_CONNECT", 2)
    arguments = [str(class_folders / "val"), str(tmp_path / "out"), "--scheduler", "tcp://127.0.0.1:9"]
    began = time.monotonic()
    result = CliRunner().invoke(build, arguments)
    assert result.exit_code == 1 and "no Dask scheduler answers at tcp://127.0.0.1:9" in result.output
    assert result.output.count("\n") == 1 and time.monotonic() - began < 30
    assert CliRunner().invoke(build, [*arguments, "--workers", "2"]).exit_code == 2
