"""The short form of `make faults`, and what injecting faults has found."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faults.processes
import pytest
import torch
from click.testing import CliRunner
from faults.__main__ import main as faults_command
from faults.processes import COMMANDS, Command, Lost, session_of
from faults.scenarios import SCENARIOS, inject
from helpers import ROOT, tree

import pipeline.build.split
import pipeline.load.readers
from base.errors import DataError, ModelError
from model.training.checkpoint import Checkpoints, load
from model.training.config import checkpoint_paths
from model.training.precision import check_scale
from pipeline.build.sources import open_source
from pipeline.build.split import Options, build_split
from pipeline.build.workers import Crashed, WorkerPool
from pipeline.load.loader import train_loader
from pipeline.load.plan import Plan
from pipeline.load.readers import check_shared_memory, describe_death
from pipeline.preprocess import Preprocess
from pipeline.shards import Manifest, ShardReader


@pytest.mark.parametrize(
    ("name", "tries"),
    [
        ("train-kills", 3),
        ("readers", 2),
        ("shared-memory", 2),
        ("full-disk", 1),
        ("checkpoints", 100),
        ("build-kills", 6),
        ("full-disk-build", 1),
        ("hostile-images", 60),
        ("hostile-tars", 200),
        ("flips", 20),
    ],
)
def test_nothing_is_lost(name: str, tries: int) -> None:
    result = inject(name, tries, seed=1)
    if result.note.startswith("skipped: "):
        pytest.skip(result.note)
    assert result.passed == tries, result.note


def test_a_lost_promise_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(work, tries, draw, tick):  # type: ignore[no-untyped-def]
        tick()
        raise Lost("one image")

    monkeypatch.setitem(SCENARIOS, "checkpoints", (lose, 5))
    result = CliRunner().invoke(faults_command, ["--only", "checkpoints"])
    assert result.exit_code == 1 and "FAILED: one image" in result.output


@pytest.mark.parametrize("error", [Lost, KeyboardInterrupt])
def test_no_process_outlives_its_scenario(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def fail(work, tries, draw, tick):  # type: ignore[no-untyped-def]
        # the second process is a child of the first, which ends before it
        code = f"import subprocess as s; s.Popen(['sleep', '300']); open({str(tmp_path / 'begun')!r}, 'w')"
        for more in ("; input()", "; import time; time.sleep(300)"):
            started.append(Command(["-c", code + more]))
            started[-1].until((tmp_path / "begun").exists)
            (tmp_path / "begun").unlink()
        assert started[0].wait() and len(session_of(started[0].process.pid)) == 1
        tick(2)
        raise error("one")

    monkeypatch.setitem(SCENARIOS, "checkpoints", (fail, 5))
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            inject("checkpoints")
    else:
        assert inject("checkpoints").passed == 2
    assert len(started) == 2 and not COMMANDS
    assert not [pid for command in started for pid in session_of(command.process.pid)]


def test_a_command_that_does_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults.processes, "LIMIT", 0.5)
    command = Command(["-c", "import time; time.sleep(300)"])
    with pytest.raises(Lost, match="nothing happened"):
        command.until(lambda: False)
    assert command.process.returncode == -signal.SIGKILL and not COMMANDS


# --- readers -----------------------------------------------------------------------------------------------


def test_a_call_that_waits_for_a_dead_reader_ends_with_the_process(dataset: Path) -> None:
    """Called again at once, DALI would wait forever for a lock that the killed reader held."""
    code = (
        "import os, signal, sys\n"
        "from multiprocessing import active_children\n"
        "from pipeline import preprocess, shards; from pipeline.load import loader, plan, readers\n"
        "if __name__ == '__main__':\n"
        "    readers.PATIENCE = 1\n"
        "    readers.ReaderWatch._check = lambda self: None\n"
        "    reader, mean = shards.ShardReader(sys.argv[1]), preprocess.Preprocess.load(sys.argv[1])\n"
        "    batches = loader.train_loader(reader, plan.Plan(len(reader), 8), mean, end_step=10**6, workers=1)\n"
        "    next(batches), next(batches)\n"
        "    os.kill(active_children()[0].pid, signal.SIGKILL)\n"
        "    while True:\n"
        "        next(batches)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(dataset / "train")], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert "a process that reads shards was killed" in done.stderr


def test_a_dead_reader_is_an_error_at_the_next_batch(dataset: Path) -> None:
    reader = ShardReader(dataset / "train")
    others = set(multiprocessing.active_children())
    loader = train_loader(
        reader, Plan(len(reader), 8), Preprocess.load(dataset / "train"), end_step=99, workers=2
    )
    next(loader)
    mine = set(multiprocessing.active_children()) - others
    assert len(mine) == 2
    os.kill(next(iter(mine)).pid or 0, signal.SIGBUS)
    assert loader._watch._died.wait(60)
    with pytest.raises(DataError, match="died of SIGBUS: "):
        next(loader)
    loader.close()
    # join and is_alive are wrong for a moment while another thread, here the watch's, takes the exit code
    deadline = time.monotonic() + 30
    while any(process.is_alive() for process in mine):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("free", "first"), [(4096, "/dev/shm is too small"), (1 << 30, "a shard was truncated")]
)
def test_the_likelier_reason_of_a_bus_error_comes_first(
    free: int, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.load.readers, "_free_shared_memory", lambda: free)
    message = describe_death(-signal.SIGBUS)
    assert f"died of SIGBUS: {first}" in message and "--shm-size" in message and "verify_lmdb" in message


def test_the_error_names_what_killed_a_reader() -> None:
    assert "out of memory" in describe_death(-signal.SIGKILL)
    assert "SIGSEGV" in describe_death(-signal.SIGSEGV) and "verify_lmdb" in describe_death(-signal.SIGSEGV)
    assert "exit code 3" in describe_death(3)
    with pytest.raises(DataError, match="--shm-size 1g, or --workers 0"):
        check_shared_memory(1 << 50, 3)
    check_shared_memory(1, 3)


def test_a_shard_with_another_number_of_records_is_refused_at_the_start(
    dataset: Path, tmp_path: Path
) -> None:
    split = Path(shutil.copytree(dataset / "train", tmp_path / "train"))
    manifest = Manifest.load(split)
    manifest.shards[1]["count"] += 1
    manifest.shards[2]["count"] -= 1
    manifest.save(split)
    with pytest.raises(DataError, match="shard-00001 holds 32 records instead of 33"):
        ShardReader(split).check_counts()


# --- checkpoints -------------------------------------------------------------------------------------------


def a_checkpoint(step: int) -> dict[str, Any]:
    """The least that is one."""
    return {"step": step, "model": {"weight": torch.ones(1)}}


def test_a_kill_between_best_and_numbered_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Checkpoints(tmp_path)
    run.save(a_checkpoint(1), best=True)
    replace, calls = Path.replace, []

    def killed_at_the_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed_at_the_second)
        run.save(a_checkpoint(2), best=True)
    # step 2 is to be repeated, and its best is there already, not missing for ever
    assert run.newest()["step"] == 1 and load(tmp_path / "best.pt")["step"] == 2
    run.save(a_checkpoint(2), best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("best.pt", "checkpoint-000000001.pt", "checkpoint-000000002.pt")
    ]


def test_falling_back_names_what_it_passes_over(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    messages: list[str] = []
    for step in (1, 2):
        run.save(a_checkpoint(step))
    checkpoint_paths(run.out)[0].write_bytes(b"cut")
    assert run.newest(fall_back=True, say=messages.append)["step"] == 1
    assert len(messages) == 1 and "checkpoint-000000002.pt is damaged" in messages[0]
    checkpoint_paths(run.out)[1].write_bytes(b"cut")
    with pytest.raises(ModelError, match=r"all 2 checkpoints .* are damaged"):
        run.newest(fall_back=True)


def test_float16_skips_a_bounded_number_of_steps() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    skipped = 0
    with pytest.raises(ModelError, match=r"overflow at any loss scale.*last checkpoint in runs/x"):
        while True:
            weight.grad = torch.full((3,), torch.inf)
            scaler.scale(torch.ones(()))  # makes the scale
            scaler.step(optimizer)
            scaler.update()
            skipped += 1
            check_scale(scaler, Path("runs/x"))
    assert skipped == 17 and torch.equal(weight, torch.ones(3))
    check_scale(torch.amp.GradScaler("cpu", enabled=False), Path())


# --- builds ------------------------------------------------------------------------------------------------


def _spin(job, report) -> None:  # type: ignore[no-untyped-def]
    """In a worker: an item that never ends, after one that does."""
    report(0)
    report(1)
    while job == "hang":
        pass


def test_a_worker_that_hangs_in_an_item_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.build.workers.MAX_SECONDS_PER_ITEM", 0.3)
    with WorkerPool(_spin, 1) as pool:
        pool.submit(7, "hang")
        assert list(pool.events(lambda: None)) == [(7, Crashed(1, too_long=True))]


def test_images_that_change_during_a_build_are_noticed(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(class_folders / "val", tmp_path / "raw"))
    options = Options(size=32, images_per_shard=8)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.build.split, "_write_manifest", killed)
        build_split(open_source(folder, "val"), tmp_path / "out", options, workers=2)
    path = next((folder / "coffee").iterdir())
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"images have changed since .*--overwrite"):
        build_split(open_source(folder, "val"), tmp_path / "out", options, workers=2, resume=True)
    build_split(open_source(folder, "val"), tmp_path / "out", options, workers=2, overwrite=True)
    assert Manifest.load(tmp_path / "out/val").count == 24
    with monkeypatch.context() as patch, pytest.raises(DataError, match="already exists"):
        patch.setattr(
            pipeline.build.split, "_stamp", lambda _: pytest.fail("a million images were looked at")
        )
        build_split(open_source(folder, "val"), tmp_path / "out", options, workers=2)


def test_overwriting_survives_a_kill_at_each_of_its_steps(class_folders: Path, tmp_path: Path) -> None:
    """The old or the new data set is there after every one of them, and --resume ends with the new one."""
    source, old, new = open_source(class_folders / "val", "val"), tmp_path / "old", tmp_path / "new"
    options = Options(size=32, images_per_shard=100)
    build_split(source, old, Options(size=16), workers=2)
    build_split(source, new, options, workers=2)
    wanted = tree(new / "val")
    unfinished = tmp_path / "unfinished"
    build_split(source, unfinished, Options(size=16), workers=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.build.split, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        build_split(source, unfinished, options, workers=2, overwrite=True)
    steps = 0
    for step in range(100):
        out = Path(shutil.copytree(unfinished, tmp_path / f"try-{step}"))
        code = (
            "import sys; sys.path.insert(0, 'tests')\nfrom pathlib import Path\n"
            "from faults.processes import count_down\nfrom pipeline.build.split import _publish\n"
            f"count_down({step}); _publish(Path({str(out / 'val.partial')!r}), Path({str(out / 'val')!r}))"
        )
        killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=200).returncode
        build_split(source, out, options, workers=2, resume=True)
        assert tree(out / "val") == wanted
        assert [path.name for path in out.iterdir()] == ["val"]
        if not killed:
            break
        assert killed == -signal.SIGKILL
        steps += 1
    assert steps >= 6  # two renames, a sync, and the removals in between
