"""train.py as a user runs it: it learns, resumes bit for bit, and reports errors in one line."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.processes import shared_memory_of
from helpers import ROOT, newest, same_weights, train_command, train_error, wait_until
from helpers import run_train as run

from base.errors import UserError
from base.files import lock
from base.machine import STOP_SIGNALS
from model.training.checkpoint import load
from model.training.config import checkpoint_paths
from model.training.log import Log
from tools.demo import cut_tiles

# small and fast: crops of 67 pixels pass all three pools
SMALL = ["--gpus", "0", "--crop", "96", "--global-batch", "16", "--workers", "0", "--log-every", "2"]
SMALL += ["--no-progress", "--no-tensorboard", "--decode-threads", "1"]


def epoch_losses(out: Any) -> Any:
    """Each epoch's loss in metrics.csv, and the mean over its steps in log.jsonl."""
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    sums: dict[int, tuple[float, int]] = {}
    before = 0
    for entry in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        if entry["kind"] == "train":
            total, steps = sums.get(entry["epoch"], (0.0, 0))
            sums[entry["epoch"]] = total + entry["loss"] * (new := entry["step"] - before), steps + new
            before = entry["step"]
    return [float(row["loss"]) for row in rows], [total / steps for total, steps in sums.values()]


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run of two epochs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    output = run("--data", dataset, "--out", out, "--epochs", 2, *SMALL).stdout
    chosen, first, timing, second, *_ = output.splitlines()
    assert chosen.startswith("96 training images: torch's initial weights, batches of 16, rate 0.0035")
    assert re.fullmatch(r"at [\d,]+ images/s an epoch takes .+ checkpoints of \d+ MB take .+", timing)
    assert re.fullmatch(r"training on 1 x \d+ CPU threads, in (float32|bfloat16)", first)
    assert f"epoch 1: train loss {epoch_losses(out)[0][0]:.3f}, val loss" in second
    return out


def test_a_run_leaves_checkpoints_log_metrics_and_config(whole: Path, dataset: Path) -> None:
    steps = json.loads((dataset / "train" / "manifest.json").read_text())["count"] // 16
    val_count = json.loads((dataset / "val" / "manifest.json").read_text())["count"]
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if e["kind"] == "val"] == [steps, 2 * steps]
    assert all(e["count"] == val_count for e in log if e["kind"] == "val")
    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    assert [int(r["step"]) for r in rows] == [steps, 2 * steps]
    assert all(0 <= float(r["data_wait"]) <= 1 and float(r["images_per_s"]) > 0 for r in rows)
    found, wanted = epoch_losses(whole)
    assert found == pytest.approx(wanted, rel=1e-9) and len(found) == 2
    state = newest(whole)
    assert (state["epoch"], state["step"], state["seed"], state["variant"]) == (2, 2 * steps, 0, "paper")
    assert json.loads((whole / "config.json").read_text())["global_batch"] == 16


def test_a_first_run_with_nothing_but_the_defaults_learns(tmp_path: Path) -> None:
    """Two epochs on 1,920 tiles of twelve photographs; guessing is right 8.3 % of the time."""
    cut_tiles(tmp_path / "tiles")
    for script, *arguments in (
        ("tools/build_lmdb.py", "tiles", "data"),
        ("train.py", "--data", "data", "--out", "run", "--epochs", "2"),
    ):
        subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=tmp_path, check=True)
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    assert max(float(row["top1"]) for row in rows) > 1 / 3
    assert newest(tmp_path / "run")["watch"]["learnt"]


def test_a_stopped_run_resumes_in_mid_epoch_bit_for_bit(whole: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    arguments = ["--data", dataset, "--out", out, "--epochs", 2, *SMALL]
    process = subprocess.Popen(train_command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for_log(out)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "--resume" in output
    stopped = newest(out)
    assert 0 < stopped["step"] < newest(whole)["step"]
    resumed = run(*arguments, "--resume")
    assert f", resuming after step {stopped['step']} of {newest(whole)['step']}\n" in resumed.stdout
    assert newest(out)["step"] == newest(whole)["step"]
    assert same_weights(newest(out), newest(whole))
    strip = re.compile(r'"(images_per_s|data_wait)": [^,}]+')
    vals = [
        [strip.sub("", x) for x in (o / "log.jsonl").read_text().splitlines() if "val" in x]
        for o in (out, whole)
    ]
    assert vals[0] == vals[1]
    # a log line was cut in two by the stop; the epoch's mean is still the same
    found, wanted = epoch_losses(out)
    assert found == pytest.approx(wanted, rel=1e-9)
    assert found == pytest.approx(epoch_losses(whole)[0], rel=1e-6)


def test_an_epochs_loss_from_a_damaged_log(tmp_path: Path) -> None:
    """The remaining lines of the epoch count; lines that are out of order do not."""

    def line(kind: Any, epoch: Any, step: Any, loss: Any) -> Any:
        more = {"top1": 0.5, "top5": 0.9} if kind == "val" else {}
        return json.dumps({"kind": kind, "epoch": epoch, "step": step, "loss": loss, **more}) + "\n"

    lines = [line("train", 0, 10, 5.0), line("train", 0, 20, 4.0)]
    for broken, at, wanted in (
        ('{"kind": "tr\n', 30, [(5 + 4 + 1) / 3]),
        (line("train", 0, 10, 9.0), 20, [(5 + 4 + 1) / 3]),
    ):
        (tmp_path / "log.jsonl").write_text("".join(lines) + broken)
        log = Log(tmp_path, step=at)
        log.write(
            "train", epoch=0, step=at + 10, steps=10, loss=1.0, images_per_s=1.0, lr=0.01, data_wait=0.0
        )
        log.write("val", epoch=0, step=at + 10, loss=2.0, top1=0.5, top5=0.9)
        # the training lines of this epoch are missing
        log.write("val", epoch=1, step=at + 20, loss=2.0, top1=0.5, top5=0.9)
        log.close()
        rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
        assert [float(row["loss"]) for row in rows if row["loss"]] == pytest.approx(wanted)
        assert [row["epoch"] for row in rows] == ["1", "2"] and rows[1]["val_loss"] == "2.0"


def test_two_ranks_stop_together_and_one_goes_on(whole: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "ranks"
    arguments = ["--data", dataset, "--out", out, "--epochs", 2, *SMALL]
    process = subprocess.Popen(
        train_command(*arguments, "--cpu-ranks", 2),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_log(out)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75 and "--resume" in output, errors
    assert "Traceback" not in errors
    assert 0 < newest(out)["step"] < newest(whole)["step"]
    run(*arguments, "--resume")
    assert newest(out)["step"] == newest(whole)["step"]


def test_ranks_save_and_hold_the_folder_after_their_launcher_is_killed(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "orphans"
    arguments = ["--data", dataset, "--out", out, "--epochs", 50, *SMALL]
    process = subprocess.Popen(
        train_command(*arguments, "--cpu-ranks", 2),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for_log(out)
        os.killpg(process.pid, signal.SIGSTOP)  # the ranks cannot end before the lock is tried
        process.kill()
        process.wait()
        with pytest.raises(UserError, match="the ranks write"), lock(out / ".lock", "the ranks write"):
            pass
    finally:
        os.killpg(process.pid, signal.SIGCONT)
    with lock(out / ".lock", "", wait=True):
        assert 0 < newest(out)["step"] < 300


@pytest.fixture(scope="module")
def two_ranks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run of two epochs on two ranks, in float32."""
    out = tmp_path_factory.mktemp("runs") / "two"
    run("--data", dataset, "--out", out, "--epochs", 2, "--cpu-ranks", 2, "--amp", "off", *SMALL)
    return out


def test_two_ranks_follow_the_same_curve_as_one(two_ranks: Path, dataset: Path, tmp_path: Path) -> None:
    run("--data", dataset, "--out", tmp_path / "one", "--epochs", 2, "--amp", "off", *SMALL)
    one, two = newest(tmp_path / "one"), newest(two_ranks)
    for key in one["model"]:
        torch.testing.assert_close(one["model"][key], two["model"][key], atol=5e-5, rtol=1e-3)


def test_a_run_changes_its_layout_and_keeps_its_curve(two_ranks: Path, dataset: Path, tmp_path: Path) -> None:
    """One epoch in layout hybrid and one in towers equal two epochs of data parallelism."""
    arguments = ["--data", dataset, "--out", tmp_path / "l", "--cpu-ranks", 2, "--amp", "off", *SMALL]
    run(*arguments, "--epochs", 1, "--layout", "hybrid")
    run(*arguments, "--epochs", 2, "--layout", "towers", "--resume")
    ours, theirs = newest(tmp_path / "l"), newest(two_ranks)
    for key in theirs["model"]:
        torch.testing.assert_close(ours["model"][key], theirs["model"][key], atol=5e-5, rtol=1e-3)
    logs = [
        [json.loads(x) for x in (o / "log.jsonl").read_text().splitlines() if "guessing" not in x]
        for o in (tmp_path / "l", two_ranks)
    ]
    for key in ("step", "loss", "top1", "count"):
        values = [[entry.get(key, 0) for entry in log] for log in logs]
        assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_torchrun_restarts_a_run_from_its_last_checkpoint(
    two_ranks: Path, dataset: Path, tmp_path: Path
) -> None:
    """One rank is killed; the launcher restarts all ranks with the same command line."""
    out = tmp_path / "elastic"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", "--max-restarts", "1"]
    options = ["--data", dataset, "--out", out, "--epochs", 2, "--amp", "off", "--save-every", 2, *SMALL]
    process = subprocess.Popen(
        [*launcher, *train_command(*options, "--auto-resume")[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(checkpoint_paths(out)) < 2:
        time.sleep(0.01)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert json.loads((out / "config.json").read_text())["resume"] is True  # from the second start
    assert same_weights(newest(out), newest(two_ranks))
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == newest(out)["step"] == 12


def test_accumulating_gives_the_same_step(dataset: Path, tmp_path: Path) -> None:
    run("--data", dataset, "--out", tmp_path / "a", "--epochs", 1, "--amp", "off", *SMALL)
    run("--data", dataset, "--out", tmp_path / "b", "--epochs", 1, "--amp", "off", "--accumulate", 4, *SMALL)
    two_ranks = ["--cpu-ranks", 2, "--accumulate", 2]
    run("--data", dataset, "--out", tmp_path / "c", "--epochs", 1, "--amp", "off", *two_ranks, *SMALL)
    one = newest(tmp_path / "a")
    for other in (newest(tmp_path / "b"), newest(tmp_path / "c")):
        for key in one["model"]:
            torch.testing.assert_close(one["model"][key], other["model"][key], atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("variant", ["owt", "bn"])
def test_the_other_variants_train(dataset: Path, tmp_path: Path, variant: str) -> None:
    run("--data", dataset, "--out", tmp_path / variant, "--epochs", 1, "--variant", variant, *SMALL)
    assert newest(tmp_path / variant)["variant"] == variant


def test_a_config_repeats_its_run(whole: Path, dataset: Path, tmp_path: Path) -> None:
    run("--config", whole / "config.json", "--out", tmp_path / "again", "--epochs", 1)
    config = [json.loads((o / "config.json").read_text()) for o in (whole, tmp_path / "again")]
    assert {k for k in config[0] if config[0][k] != config[1][k]} == {"out", "epochs"}
    first = [
        json.loads((o / "log.jsonl").read_text().splitlines()[0])["loss"] for o in (whole, tmp_path / "again")
    ]
    assert first[0] == first[1]
    (tmp_path / "bad.json").write_text('{"learning_rate": 1}')
    assert "learning_rate" in train_error("--config", tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("lr: 1")
    assert "not a config.json" in train_error("--config", tmp_path / "bad.json")


def test_weights_and_biases_get_every_curve(dataset: Path, tmp_path: Path) -> None:
    """With a substitute for the package, which needs an account."""
    (tmp_path / "wandb.py").write_text(
        "import json\n"
        "def init(**options):\n    note(['init', options['name'], options['config']['lr']])\n"
        "    import wandb\n    return wandb\n"
        "def log(curves, step):\n    note(['log', sorted(curves), step])\n"
        "def finish():\n    note(['finish'])\n"
        f"def note(what):\n    open({str(tmp_path / 'calls')!r}, 'a').write(json.dumps(what) + '\\n')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    arguments = train_command("--data", dataset, "--out", tmp_path / "w", "--epochs", 1, "--wandb", *SMALL)
    subprocess.run(arguments, env=environment, check=True, cwd=ROOT, timeout=200)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls[0] == ["init", "w", 0.0035] and calls[-1] == ["finish"]
    assert ["log", ["val/loss", "val/top1", "val/top5"], 6] in calls
    assert [
        "log",
        ["train/data_wait", "train/guess", "train/images_per_s", "train/loss", "train/lr"],
        2,
    ] in calls


def wait_for_log(out: Any) -> None:
    """Wait until the log has its first line."""
    wait_until(lambda: (out / "log.jsonl").exists() and bool((out / "log.jsonl").read_text()))


def one_line_error(done: Any) -> Any:
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_errors_are_one_line(whole: Path, dataset: Path, tmp_path: Path) -> None:
    data = ["--data", dataset]
    error = train_error("--data", tmp_path / "none", *SMALL)
    assert "no data set" in error and "build_lmdb.py" in error
    (tmp_path / "photographs" / "daisy").mkdir(parents=True)
    error = train_error("--data", tmp_path / "photographs", *SMALL)
    assert f"build_lmdb.py {tmp_path}/photographs OUT --val-fraction 0.2" in error and "daisy/" in error
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "tiles").symlink_to(dataset)
    error = train_error("--data", tmp_path / "sets", *SMALL)
    assert f"there is a data set in {tmp_path}/sets/tiles" in error
    error = train_error(*data, "--out", whole, *SMALL)
    assert "--resume" in error and str(whole) in error
    error = train_error(*data, "--out", whole, "--resume", "--variant", "bn", *SMALL)
    assert "variant paper, not bn" in error
    error = train_error(*data, "--out", whole, "--resume", "--weight-decay", "0.1", *SMALL)
    assert "weight_decay 0.0005, not 0.1" in error
    error = train_error(*data, "--out", whole, "--auto-resume", "--recipe", "owt", *SMALL)
    assert "the run in" in error and "leave that option out" in error
    error = train_error(*data, "--out", tmp_path / "c", "--fall-back", *SMALL, code=2)
    assert "--resume" in error
    (tmp_path / "file").touch()
    error = train_error(*data, "--out", tmp_path / "file", *SMALL)
    assert "cannot write" in error
    error = train_error(*data, "--out", tmp_path / "new", "--resume", *SMALL)
    assert "no checkpoint" in error
    error = train_error(*data, "--out", tmp_path / "b", *SMALL, "--global-batch", 4096)
    assert "fewer than one global batch" in error
    error = train_error(*data, "--out", tmp_path / "c", *SMALL, "--cpu-ranks", 3, code=2)
    assert "is not divisible" in error
    towers = ["--cpu-ranks", 2, "--layout", "towers"]
    error = train_error(*data, "--out", tmp_path / "c", *SMALL, *towers, "--compress", code=2)
    assert "averages no gradients" in error
    error = train_error(*data, "--out", tmp_path / "c", *SMALL, "--compress", code=2)
    assert "several ranks" in error
    error = train_error(*data, "--out", tmp_path / "d", *SMALL, "--gpus", 99)
    assert "99" in error
    error = train_error(*data, "--out", tmp_path / "e", *SMALL, "--crop", 20)
    assert "20" in error


def test_a_damaged_checkpoint_is_refused_by_name(whole: Path, dataset: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "run"
    damaged.mkdir()
    newest_path = checkpoint_paths(whole)[0]
    content = bytearray(newest_path.read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / newest_path.name).write_bytes(content)
    (damaged / "config.json").write_bytes((whole / "config.json").read_bytes())
    error = train_error("--data", dataset, "--out", damaged, "--resume", *SMALL)
    assert newest_path.name in error and "damaged" in error


def test_falling_back_on_the_checkpoint_before_changes_nothing(
    whole: Path, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    paths = checkpoint_paths(whole)
    for path in [*paths, whole / "config.json", whole / "log.jsonl"]:
        os.link(path, out / path.name)
    content = bytearray(paths[0].read_bytes())
    content[len(content) // 3] ^= 1
    (out / paths[0].name).unlink()
    (out / paths[0].name).write_bytes(content)
    assert "--fall-back" in train_error("--data", dataset, "--out", out, "--resume")
    done = run("--data", dataset, "--out", out, "--resume", "--fall-back")
    assert "skipped: " in done.stdout and paths[0].name in done.stdout
    assert same_weights(newest(out), newest(whole))


def test_a_damaged_config_is_not_taken_for_the_defaults(whole: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    os.link(checkpoint_paths(whole)[0], out / "checkpoint-000000012.pt")
    (out / "config.json").write_text((whole / "config.json").read_text()[:99])
    assert "is not a config.json of a run" in train_error("--data", dataset, "--out", out, "--resume")


def test_a_diverged_run_stops_with_its_last_good_checkpoint(dataset: Path, tmp_path: Path) -> None:
    done = run("--data", dataset, "--out", tmp_path / "r", "--epochs", 9, *SMALL, "--lr", "1e30", code=1)
    assert "diverged" in one_line_error(done)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--amp", "fp16"],
        ["--amp", "off"],
        ["--deterministic"],
        ["--variant", "bn", "--optimizer", "lars"],
    ],
)
def test_a_gpu_trains_and_resumes(dataset: Path, tmp_path: Path, extra: Any) -> None:
    arguments = ["--data", dataset, "--out", tmp_path / "g", "--global-batch", "16", "--no-progress", *extra]
    run(*arguments, "--epochs", "1")
    run(*arguments, "--epochs", "2", "--resume")
    assert newest(tmp_path / "g")["step"] == 12
    assert load(tmp_path / "g" / "best.pt")["best"] >= 0


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_all_processes_saves_and_shows_how_to_continue(
    dataset: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Terminals, `timeout`, systemd and Slurm send signals to all processes of a command, also the readers."""
    out = tmp_path / "c"
    arguments = ["--data", dataset, "--out", out, "--epochs", 50, *SMALL, "--workers", "1"]
    process = subprocess.Popen(
        train_command(*arguments),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_log(out)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75 and "--resume" in output, errors
    assert "Traceback" not in errors and "resource_tracker" not in errors
    assert newest(out)["step"] > 0


def test_no_process_outlives_a_run(dataset: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        train_command(
            "--data", dataset, "--out", tmp_path / "k", "--epochs", 50, *SMALL[:-2], "--workers", "1"
        ),
        cwd=ROOT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "k" / "log.jsonl").exists():
        time.sleep(0.05)
    group = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
    shared = set.union(*(shared_memory_of(int(pid)) for pid in group))
    assert len(group) > 1 and shared
    process.kill()  # the trainer cannot clean up: its readers must notice
    process.wait()
    for _ in range(100):
        left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout
        if not left:
            break
        time.sleep(0.1)
    assert not left
    assert not shared & {path.name for path in Path("/dev/shm").iterdir()}
