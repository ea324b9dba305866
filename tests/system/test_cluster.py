"""Builds on a Dask cluster: the same bytes as on one machine, even if workers die."""

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import CRASH, OPTIONS, ROOT, held_up, tree, wait_until, webdataset, write_parquet

import pipeline.build.split
from base.errors import DataError
from pipeline.build.sources import find_splits, open_source
from pipeline.build.split import build_split
from pipeline.build.workers import Done
from pipeline.shards import ShardWriter
from tools.build_lmdb import main as build

distributed = pytest.importorskip("distributed", reason="Dask is missing: pip install -e '.[cluster]'")
import pipeline.build.cluster as cluster_module  # noqa: E402 - needs Dask

HANG = b"this file keeps the decoder busy for ever"


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
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/system'}"}
    processes = [
        subprocess.Popen(
            command, cwd=folder, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for command in commands
    ]
    try:
        wait_until(file.exists)
        with distributed.Client(scheduler_file=str(file), set_as_default=False) as client:
            client.wait_for_workers(2, timeout=200)
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
    return tree(out / "train")


def _start(scheduler: str, source: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools/build_lmdb.py"), str(source), str(out), "--split", "train"]
    command += ["--size", "64", "--images-per-shard", "8", "--scheduler", scheduler, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("address", "exposed"),
    [
        ("tcp://127.0.0.1:8786", False),
        ("127.0.0.2:8786", False),
        ("tcp://localhost:8786", False),
        ("tcp://[::1]:8786", False),
        ("tls://10.0.0.1:8786", False),
        ("tcp://10.0.0.1:8786", True),
        ("node7:8786", True),
        ("tcp://0.0.0.0:8786", True),
        ("ws://scheduler:80", True),
        ("tcp://localhost.example.com:8786", True),
    ],
)
def test_a_scheduler_that_others_can_reach_is_warned_of(
    address: str,
    exposed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster_module, "SECONDS_TO_CONNECT", 0)
    with pytest.raises(DataError, match="no Dask scheduler answers"):
        cluster_module.Cluster(address, tmp_path, tmp_path / "out")
    assert ("docs/security.md" in capsys.readouterr().err) == exposed


def _pids(scheduler: str) -> list[int]:
    with distributed.Client(scheduler, set_as_default=False) as client:
        return list(client.run(os.getpid).values())


def test_a_worker_killed_in_mid_build_costs_nothing(
    scheduler: str, slow_folder: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    victim = _pids(scheduler)[0]
    with held_up(tmp_path, 11) as work:
        process = _start(scheduler, slow_folder, tmp_path, "--resume")
        wait_until(lambda: any(work.glob("shard-*.npz")))
        os.kill(victim, signal.SIGKILL)
        assert len(list(work.glob("shard-*.npz"))) < 12  # shards in all
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "96 images seen = 96 accepted + 0 rejected" in output
    assert "96/96" in errors and "Traceback" not in errors
    assert tree(tmp_path / "train") == local
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_ctrl_c_stops_the_workers_and_resume_goes_on(
    scheduler: str, slow_folder: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    with held_up(tmp_path, 11) as work:
        process = _start(scheduler, slow_folder, tmp_path, "--resume")
        wait_until(lambda: any(work.glob("shard-*.npz")))
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 130
        assert "Traceback" not in errors and errors.splitlines()[-1] == "Interrupted: continue with --resume."
        assert not list(work.glob("*.at"))
    process = _start(scheduler, slow_folder, tmp_path, "--resume")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "from before" in output
    assert tree(tmp_path / "train") == local


def test_ctrl_c_before_a_question_to_the_scheduler_is_sent_logs_no_error(
    scheduler: str, slow_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(logging.Logger, "callHandlers", lambda _, record: logged.append(record.getMessage()))
    with cluster_module.Cluster(scheduler, slow_folder, tmp_path / "out") as cluster:
        # The thread that sends is busy until the signal has arrived.
        assert cluster.client.loop
        cluster.client.loop.add_callback(time.sleep, 1)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup may have changed it
        try:
            with pytest.raises(KeyboardInterrupt):
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
                cluster.client.run_on_scheduler(os.getpid)
        finally:
            signal.signal(signal.SIGINT, before)
    assert not [message for message in logged if "exception" in message.lower()]


WNIDS = ("n01440764", "n01443537", "n02100735", "n02119789")
Pictures = dict[str, list[bytes]]  # wnid -> JPEGs


def _kaggle(root: Path, train: Pictures, val: Pictures) -> None:
    base, rows, number = root / "ILSVRC/Data/CLS-LOC", ["ImageId,PredictionString"], 0
    (base / "val").mkdir(parents=True)
    for wnid in WNIDS:
        (base / "train" / wnid).mkdir(parents=True)
        for i, content in enumerate(train[wnid]):
            (base / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(content)
        for content in val[wnid]:
            number += 1
            (base / f"val/ILSVRC2012_val_{number:08d}.JPEG").write_bytes(content)
            rows.append(f"ILSVRC2012_val_{number:08d},{wnid} 1 2 3 4")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows))


def _tiny_imagenet(root: Path, train: Pictures, val: Pictures) -> None:
    (root / "val/images").mkdir(parents=True)
    lines: list[str] = []
    for wnid in WNIDS:
        (root / f"train/{wnid}/images").mkdir(parents=True)
        for i, content in enumerate(train[wnid]):
            (root / f"train/{wnid}/images/{wnid}_{i}.JPEG").write_bytes(content)
        for content in val[wnid]:
            name = f"val_{len(lines)}.JPEG"
            (root / "val/images" / name).write_bytes(content)
            lines.append(f"{name}\t{wnid}\t0\t0\t9\t9\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))


def _class_in_name(root: Path, train: Pictures, val: Pictures) -> None:
    for split, pictures in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        for number, (wnid, content) in enumerate((w, c) for w in WNIDS for c in pictures[w]):
            name = f"{wnid}_{number}.JPEG" if split == "train" else f"ILSVRC2012_val_{number:08d}_{wnid}.JPEG"
            (root / split / name).write_bytes(content)


def _webdataset(root: Path, train: Pictures, val: Pictures) -> None:
    root.mkdir()
    for split, pictures in (("train", train), ("validation", val)):
        images = {f"{w}_{i}": content for w in WNIDS for i, content in enumerate(pictures[w])}
        labels = {key: WNIDS.index(key[:9]) for key in images}
        for part in range(2):
            keys = list(images)[part::2]
            tar = webdataset({key: images[key] for key in keys}, labels)
            (root / f"in-{split}-{part:04d}.tar").write_bytes(tar)


def _parquet(root: Path, train: Pictures, val: Pictures) -> None:
    for split, pictures in (("train", train), ("validation", val)):
        rows = [(content, None, label) for label, wnid in enumerate(WNIDS) for content in pictures[wnid]]
        for part in range(2):
            path = root / f"data/{split}-{part:05d}-of-00002.parquet"
            write_parquet(path, rows[part::2], [f"the {wnid}" for wnid in WNIDS])


@pytest.mark.parametrize("make", [_kaggle, _tiny_imagenet, _class_in_name, _webdataset, _parquet])
def test_each_form_of_source_gives_the_same_bytes_as_here(
    scheduler: str, class_folders: Path, tmp_path: Path, make: Callable[[Path, Pictures, Pictures], None]
) -> None:
    folders = sorted((class_folders / "val").iterdir())
    pictures = {w: [p.read_bytes() for p in sorted(f.iterdir())] for w, f in zip(WNIDS, folders, strict=True)}
    root = tmp_path / "source"
    wnids: list[str] | None = None
    make(root, {w: p[:4] for w, p in pictures.items()}, {w: p[4:] for w, p in pictures.items()})
    counts = {}
    with cluster_module.Cluster(scheduler, root, tmp_path) as cluster:
        for split, path in find_splits(root).items():
            source = open_source(path, split, train_wnids=wnids)
            wnids = source.wnids
            build_split(source, tmp_path / "local", OPTIONS, workers=1)
            summary = build_split(source, tmp_path / "out", OPTIONS, workers=1, make_pool=cluster.pool)
            assert not summary.rejected
            counts[split] = summary.accepted
    assert counts == {"train": 16, "val": 8}
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


real_write_shard = pipeline.build.split.write_shard


def _write_shard_or_die(job: Any, report: Any) -> None:
    """On a worker: as the real one, with a decoder that crashes on one file and hangs at another."""

    def decoder(data: bytes, size: int) -> np.ndarray:
        if data == CRASH:
            ctypes.string_at(0)  # a segmentation fault
        while data == HANG:
            pass
        return real(data, size)

    real = pipeline.build.split.prepare_bgr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.build.split, "prepare_bgr", decoder)
        patch.setattr(cluster_module, "MAX_SECONDS_PER_ITEM", 1.0)  # for a quick test
        real_write_shard(job, report)


def _set_failures(count: int, dask_scheduler: Any) -> None:
    dask_scheduler.allowed_failures = count


def test_files_that_kill_workers_are_rejected_as_on_one_machine(
    scheduler: str, class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "raw"
    shutil.copytree(class_folders / "val", folder)
    (folder / "coffee/evil.JPEG").write_bytes(CRASH)
    (folder / "rocket/slow.JPEG").write_bytes(HANG)
    source = open_source(folder, "val")
    monkeypatch.setattr(pipeline.build.split, "write_shard", _write_shard_or_die)
    monkeypatch.setattr(pipeline.build.workers, "MAX_SECONDS_PER_ITEM", 1.0)
    build_split(source, tmp_path / "local", OPTIONS, workers=2)
    with distributed.Client(scheduler, set_as_default=False) as client:  # as a killed build leaves it
        client.run_on_scheduler(_set_failures, 0)
    with cluster_module.Cluster(scheduler, folder, tmp_path) as cluster:
        summary = build_split(source, tmp_path, OPTIONS, workers=1, make_pool=cluster.pool)
        allowed = cluster.client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.allowed_failures)
    assert allowed == 0
    assert summary.accepted == 24
    assert summary.rejected == [
        {"source": "coffee/evil.JPEG", "reason": "crashed the decoder"},
        {
            "source": "rocket/slow.JPEG",
            "reason": f"takes more than {pipeline.build.split.MAX_SECONDS_PER_ITEM:.0f} s to decode",
        },
    ]
    assert tree(tmp_path / "val") == tree(tmp_path / "local/val")
    with distributed.Client(scheduler, set_as_default=False) as client:  # the scheduler's own rule is back
        assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.allowed_failures) == 3


# --- jobs that go on after their build ----------------------------------------------------------------------


class _Zombie(threading.Thread):
    """A job at a worker that is stopped just before or just after the rename of its shard, until `go`."""

    def __init__(self, job: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(daemon=True)
        self.job, self.error = job, ""
        self.path = job.partial / "work" / "shard-00000.some.at"
        self.path.write_bytes(b"")
        self.held, self.go = threading.Event(), threading.Event()
        owner, name = (
            (ShardWriter, "close") if where == "before" else (pipeline.build.split, "fsync_directory")
        )
        real = getattr(owner, name)

        def wait(*arguments: Any) -> Any:
            result = real(*arguments)
            if threading.current_thread() is self:
                self.held.set()
                assert self.go.wait(60)
            return result

        monkeypatch.setattr(owner, name, wait)
        self.start()
        assert self.held.wait(60)

    def run(self) -> None:
        position_file = cluster_module._PositionFile(self.path)
        try:
            pipeline.build.split.write_shard(self.job, position_file.report)
        except DataError as error:
            self.error = error.message
        finally:
            position_file.close()

    def finish(self) -> None:
        self.go.set()
        self.join(60)
        assert not self.is_alive()


class _Pool(cluster_module.ClusterPool):
    """Its jobs are done by what is given, here."""

    def __init__(self, do: Callable[[list[Any]], None]) -> None:
        super().__init__(None, lambda *_: None, "")  # type: ignore[arg-type]
        self._do = do

    def events(self, tick: Callable[[], None]) -> Iterator[tuple[int, Done]]:
        self._do([job for _, job in self._pending])
        for number, _ in self._pending:
            yield number, Done(None)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_job_of_a_killed_build_leaves_the_next_one_alone(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    source, other = open_source(class_folders / "val", "val"), replace(OPTIONS, quality=50)
    build_split(source, tmp_path / "want", other, workers=1)
    zombies: list[_Zombie] = []

    def killed(jobs: list[Any]) -> None:
        zombies.append(_Zombie(jobs[0], where, monkeypatch))
        raise _Killed

    def write(jobs: list[Any]) -> None:
        for job in jobs:
            # in the middle of the first shard
            pipeline.build.split.write_shard(
                job, lambda position: zombies[0].finish() if position == 4 else None
            )

    with pytest.raises(_Killed):
        build_split(source, tmp_path, OPTIONS, workers=1, make_pool=lambda *_: _Pool(killed))
    assert zombies[0].path.exists()
    build_split(source, tmp_path, other, workers=1, overwrite=True, make_pool=lambda *_: _Pool(write))
    assert "the build that needed this shard has ended" in zombies[0].error
    assert tree(tmp_path / "val") == tree(tmp_path / "want/val")


@pytest.mark.parametrize("where", ["before", "after"])
def test_ctrl_c_takes_nothing_from_a_job_that_is_about_to_stop(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    source = open_source(class_folders / "val", "val")
    build_split(source, tmp_path / "want", OPTIONS, workers=1)
    zombies: list[_Zombie] = []

    def interrupted(jobs: list[Any]) -> None:
        zombie = _Zombie(jobs[0], where, monkeypatch)
        zombies.append(zombie)
        future: Any = SimpleNamespace(release=lambda: None)
        pool._sent[0] = cluster_module._Sent(future, jobs[0], zombie.path)
        raise KeyboardInterrupt

    pool = _Pool(interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_split(source, tmp_path, OPTIONS, workers=1, make_pool=lambda *_: pool)
    partial = tmp_path / "val.partial"
    left = [path.name.split(".")[0] + path.suffix for path in partial.glob("shard-*")]
    assert left == (["shard-00000.tmp"] if where == "before" else ["shard-00000"])
    zombies[0].finish()
    assert "the build that needed this shard has ended" in zombies[0].error
    assert not list(partial.glob("*.tmp")) and not list(partial.glob("work/*.npz"))
    build_split(source, tmp_path, OPTIONS, workers=1, resume=True)
    assert tree(tmp_path / "val") == tree(tmp_path / "want/val")


def test_a_note_without_its_shard_is_not_believed(class_folders: Path, tmp_path: Path) -> None:
    source = open_source(class_folders / "val", "val")
    build_split(source, tmp_path / "want", OPTIONS, workers=1)

    def write(jobs: list[Any]) -> None:
        for job in jobs:
            pipeline.build.split.write_shard(job, lambda _: None)
        os.truncate(tmp_path / "val.partial/shard-00001/data.mdb", 4096)

    with pytest.raises(DataError, match="shard-00001 is incomplete: continue with --resume"):
        build_split(source, tmp_path, OPTIONS, workers=1, make_pool=lambda *_: _Pool(write))
    summary = build_split(source, tmp_path, OPTIONS, workers=1, resume=True)
    assert summary.resumed == 16
    assert tree(tmp_path / "val") == tree(tmp_path / "want/val")


# --- what is refused ----------------------------------------------------------------------------------------


def test_few_jobs_are_under_way_at_once(scheduler: str, class_folders: Path, tmp_path: Path) -> None:
    """However many images there are, the scheduler holds the lists of a few shards."""
    with cluster_module.Cluster(scheduler, class_folders, tmp_path) as cluster:
        most: list[int] = []

        def make_pool(*arguments: Any) -> Any:
            pool: Any = cluster.pool(*arguments)
            send = pool._send

            def counted(*job: Any) -> None:
                send(*job)
                most.append(len(pool._sent))

            pool._send = counted
            return pool

        source = open_source(class_folders / "train", "train")
        build_split(source, tmp_path, OPTIONS, workers=1, make_pool=make_pool)
    assert len(most) == 12 and max(most) <= 2 * len(_pids(scheduler))


def test_what_workers_cannot_see_is_reported_before_any_work(scheduler: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"the worker tcp://.* cannot read .*nowhere: SOURCE must be on"
    ) as error:
        cluster_module.Cluster(scheduler, tmp_path / "nowhere", tmp_path)
    assert "\n" not in error.value.message
    assert not list(tmp_path.glob(".*"))


def test_what_else_is_wrong_with_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = cluster_module._versions()
    token = tmp_path / "token"

    def look(wanted: dict[str, str] = versions) -> str | None:
        answer: str | None = cluster_module._check_worker("/", str(token), wanted)
        return answer

    assert "OUT must be on a file system that all workers share" in str(look())
    token.write_text("token")
    assert "it does not see the lock of another machine" in str(look())
    with token.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert look() is None
        for name in versions:
            assert f"has {name} {versions[name]} instead of 0 and would store" in str(
                look({**versions, name: "0"})
            )

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert str(look()).startswith(f"cannot lock files in {tmp_path} (No locks available)")


def test_a_file_system_without_locks_is_refused(
    scheduler: str, class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DataError, match="this machine cannot lock files in") as error:
        cluster_module.Cluster(scheduler, class_folders, tmp_path)
    assert "\n" not in error.value.message and not list(tmp_path.iterdir())


def test_workers_with_several_threads_are_refused(class_folders: Path, tmp_path: Path) -> None:
    where = {"protocol": "tcp", "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    wanted = r"has 2 threads: start it with `--nthreads 1`"
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, **where) as local:
        with pytest.raises(DataError, match=r"the worker tcp://\S+ " + wanted):
            cluster_module.Cluster(local.scheduler_address, class_folders, tmp_path)
        with distributed.Client(local.scheduler_address, set_as_default=False) as client:  # joined later
            pool = cluster_module.ClusterPool(client, print, local.scheduler_address)
            with pytest.raises(DataError, match=wanted):
                pool._update()
            serve = client.submit(cluster_module._serve, print, None, tmp_path, cluster_module._versions())
            assert serve.result(timeout=200) == (
                "user error",
                f"a worker that joined later {wanted}, and one worker per core with `--nworkers`",
            )


def test_a_build_without_workers_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster_module, "SECONDS_WITHOUT_WORKERS", 0)
    client: Any = SimpleNamespace(status="running", nthreads=dict)
    pool = cluster_module.ClusterPool(client, print, "tcp://host:1")
    for _ in range(3):
        pool._last_update = -1.0
        pool._update()
    message = "no worker is left, and the build waits for one: start `dask worker tcp://host:1 --nthreads 1`"
    assert capsys.readouterr().err.split("\n") == ["", message, ""]


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


def test_a_silent_port_is_no_scheduler(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "SECONDS_TO_CONNECT", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(DataError, match=f"no Dask scheduler answers at {address}"):
            cluster_module.Cluster(address, class_folders, tmp_path)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "address",
    ["foo://x:1", "tcp://host:http", "tcp://host", "tcp://:8786", "tcp://[::1:2", "tcp://h:1/x", ""],
)
def test_what_is_no_address_is_bad_usage(class_folders: Path, tmp_path: Path, address: str) -> None:
    arguments = [str(class_folders / "val"), str(tmp_path / "out"), "--scheduler", address]
    result = CliRunner().invoke(build, arguments)
    assert result.exit_code == 2 and "give tcp://HOST:PORT" in result.output
    assert not (tmp_path / "out").exists()
