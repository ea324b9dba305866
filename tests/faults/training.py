"""Faults during training: kills, signals, dead readers, too little shared memory, a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

from faults.inputs import STEPS_PER_EPOCH, TRAIN, make_data
from faults.processes import (
    FILLER,
    LIMIT,
    SHARED_MEMORY,
    Command,
    Lost,
    Progress,
    Skipped,
    dying,
    remount,
    session_of,
    small_disk,
)


def train_kills(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """kill -9 during training: --resume continues and ends with the weights of an uninterrupted run."""
    data, whole = make_data(work), work / "whole"
    began = time.monotonic()
    _train_to_end(data, whole)
    life = time.monotonic() - began
    where: dict[str, int] = {}
    wanted, passed, round_number = _outcome(whole), 0, 0
    kinds = ["at any moment", "in a checkpoint's write", "in validation", "at a sync or rename"]
    done = 0
    while done < tries:
        out, kills, finished = work / f"killed-{round_number}", 0, False
        round_number += 1
        try:
            while not finished:
                # the last kill of a round can come after the run has ended
                kind = kinds[(done + kills) % len(kinds)] if done + kills < tries else ""
                finished = not _killed(data, out, kind, life, draw)
                if not finished:
                    kills += 1
                    where[kind] = where.get(kind, 0) + 1
            difference = _difference(_outcome(out), wanted)
            if difference:
                raise Lost(f"after {kills} kills the run differs in {difference}")
            passed += kills
            tick(kills)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        done += kills
    return passed, ", ".join(f"{count} {kind}" for kind, count in where.items())


def _killed(data: Path, out: Path, kind: str, life: float, draw: random.Random) -> bool:
    """Start or resume a run and kill it; False if it ended successfully before the kill."""
    arguments: list[object] = ["--data", data, "--out", out, *TRAIN]
    if list(out.glob("checkpoint-*.pt")):
        arguments.append("--resume")
    if kind == "at a sync or rename":
        command = Command(dying("train.py", draw.randrange(40), arguments))
        command.wait()
    else:
        command = Command(["train.py", *arguments])
        deadline = time.monotonic() + (draw.uniform(0, 1.2 * life) if kind == "at any moment" else LIMIT)
        delay = draw.uniform(0, 0.2 if kind == "in a checkpoint's write" else 0.05)
        skip = draw.randrange(3)  # checkpoint writes to let pass before the kill
        while kind and command.running() and time.monotonic() < deadline:
            if kind == "in a checkpoint's write" and list(out.glob("*.pt.*.tmp")):
                if skip == 0:
                    break
                skip -= 1
                while list(out.glob("*.pt.*.tmp")) and command.running() and time.monotonic() < deadline:
                    time.sleep(0.001)
            if kind == "in validation" and _validating(out):
                break
            time.sleep(0.002)
        if kind and kind != "at any moment":
            time.sleep(delay)
        if kind and command.running():
            command.kill()
        code = command.wait()
        if code not in (0, -signal.SIGKILL):
            raise Lost(f"exit code {code}: {command.text()[-300:]!r}")
    command.check_nothing_left()
    if command.process.returncode == 0:
        return False
    if command.process.returncode != -signal.SIGKILL:
        raise Lost(f"exit code {command.process.returncode}: {command.text()[-300:]!r}")
    return True


def _validating(out: Path) -> bool:
    """Whether the log ends with the last step of an epoch, which means that validation is running."""
    try:
        entry = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return False
    return entry["kind"] == "train" and entry["step"] % STEPS_PER_EPOCH == 0


def _train_to_end(data: Path, out: Path, *more: object) -> None:
    command = Command(["train.py", "--data", data, "--out", out, *TRAIN, *more])
    if command.wait():
        raise Lost(f"training failed: {command.text()[-300:]!r}")
    command.check_nothing_left()


def _outcome(run: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on interruptions."""
    from model.training.checkpoint import Checkpoints, load

    if left := [path for path in run.glob(".*") if path.name != ".lock"]:
        raise Lost(f"left behind: {left[0].name}")
    keep = ("kind", "step", "loss", "top1")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "newest": Checkpoints(run).newest(),
        "best": load(run / "best.pt"),
        "log": [[entry.get(key) for key in keep] for entry in log],
        "metrics": [line.split(",")[6:] for line in (run / "metrics.csv").read_text().splitlines()],
    }


def _difference(a: Any, b: Any, path: str = "") -> str:
    """Path of the first difference between two nested structures of tensors and numbers, bit for bit; or ""."""
    import torch

    if type(a) is not type(b):
        return path or "type"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return path or "keys"
        return next((d for key in a if (d := _difference(a[key], b[key], f"{path}/{key}"))), "")
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return path
        pairs = zip(a, b, strict=True)
        return next((d for i, (x, y) in enumerate(pairs) if (d := _difference(x, y, f"{path}/{i}"))), "")
    return "" if (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) else path


def signals(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """SIGTERM or SIGINT during training: the run saves and exits with code 75, and the resumed run is identical."""
    data, whole = make_data(work), work / "whole-signals"
    _train_to_end(data, whole)
    wanted, passed = _outcome(whole), 0
    for number in range(tries):
        out, which = work / f"signal-{number}", (signal.SIGTERM, signal.SIGINT)[number % 2]
        for _ in range(10):
            if _stopped(data, out, which, 1 + draw.randrange(2 * STEPS_PER_EPOCH)):
                break
            shutil.rmtree(out)
        else:
            raise Lost("ten runs ended before a signal stopped one")
        _train_to_end(data, out, "--resume")
        if difference := _difference(_outcome(out), wanted):
            raise Lost(f"the resumed run differs in {difference}")
        shutil.rmtree(out)
        passed += 1
        tick()
    return passed, "exit code 75"


def _stopped(data: Path, out: Path, which: signal.Signals, lines: int) -> bool:
    """Send a run a signal when its log has `lines` lines; False if the run ended before it stopped."""
    command = Command(["train.py", "--data", data, "--out", out, *TRAIN])
    command.until(partial(_logged, out, lines))
    if command.running():
        os.kill(command.process.pid, which)
    code = command.wait()
    command.check_nothing_left()
    if code not in (0, 75):
        raise Lost(f"exit code {code}: {command.text()[-300:]!r}")
    return code == 75


def _logged(out: Path, lines: int) -> bool:
    """Whether a run's log has at least `lines` lines."""
    log = out / "log.jsonl"
    return log.exists() and log.read_bytes().count(b"\n") >= lines


def readers(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """A reader process is killed in mid-epoch: one line, no hang, nothing left behind."""
    data, passed = make_data(work), 0
    longest = 0.0
    for number in range(tries):
        out = work / f"readers-{number}"
        kind = [("--workers", 1), ("--cpu-ranks", 2), ("--workers", 2)][number % 3]
        command = Command(["train.py", "--data", data, "--out", out, *TRAIN, "--epochs", 50, *kind])
        command.until(partial(_logged, out, 2))
        time.sleep(draw.uniform(0, 1))
        killed = time.monotonic()
        os.kill(draw.choice(_readers(command)), signal.SIGKILL)
        code = command.wait(60)
        longest = max(longest, time.monotonic() - killed)
        if code != 1:
            raise Lost(f"exit code {code}: {command.text()[-300:]!r}")
        command.check_one_line("a process that reads shards", "--resume")
        command.check_nothing_left()
        shutil.rmtree(out)
        passed += 1
        tick()
    return passed, f"ended within {longest:.1f} s"


def _readers(command: Command) -> list[int]:
    """Process ids of the reader processes: spawned processes that do not load torch, unlike ranks."""
    found = []
    for pid in session_of(command.process.pid):
        with contextlib.suppress(OSError):
            spawned = b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
            if spawned and "libtorch" not in Path(f"/proc/{pid}/maps").read_text():
                found.append(pid)
    if not found:
        raise Lost(f"no reader processes: {command.text()[-300:]!r}")
    return found


def shared_memory(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """/dev/shm is too small, or fills up in mid-epoch: one line, no hang."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"]).returncode:
        raise Skipped("a private /dev/shm needs `unshare -m`, which is not permitted here")
    data, passed = make_data(work), 0
    for number in range(tries):
        fill = number % 2 == 1
        size, out = ("64m" if fill else f"{draw.randrange(4, 41, 4)}k"), work / f"shm-{number}"
        mount = [
            "unshare",
            "-m",
            "sh",
            "-c",
            f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"',
            "sh",
        ]
        command = Command(
            ["train.py", "--data", data, "--out", out, *TRAIN, "--epochs", 50, "--workers", 1], mount
        )
        command.hold_private()
        if fill:
            command.until(partial(_logged, out, 2))
            # in the command's namespace; then the next growth of DALI's memory fails
            _fill(Path(f"/proc/{command.process.pid}/root{SHARED_MEMORY}/{FILLER}"))
            deadline = time.monotonic() + 20
            while command.running() and time.monotonic() < deadline:
                time.sleep(0.05)
            if command.running():  # it did not need more memory
                os.kill(command.process.pid, signal.SIGTERM)
                if command.wait() != 75:
                    raise Lost(f"exit code {command.process.returncode}: {command.text()[-300:]!r}")
        elif command.wait(60) != 1:
            raise Lost(f"exit code {command.process.returncode}: {command.text()[-300:]!r}")
        if command.process.returncode == 1:
            command.check_one_line("--shm-size", "--workers 0")
        command.check_nothing_left()
        shutil.rmtree(out, ignore_errors=True)
        passed += 1
        tick()
    return passed, ""


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def full_disk(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """No space for the next checkpoint, and a read-only folder: one line, and the existing checkpoints resume."""
    data, whole = make_data(work), work / "whole-disk"
    _train_to_end(data, whole)
    wanted, passed = _outcome(whole), 0
    for number in range(tries):
        with small_disk(work / f"disk-{number}", f"{draw.randrange(170, 450)}m") as disk:
            command = Command(["train.py", "--data", data, "--out", disk / "run", *TRAIN])
            if command.wait() != 1:
                raise Lost(f"exit code {command.process.returncode}: {command.text()[-300:]!r}")
            command.check_one_line("No space left")
            if list((disk / "run").glob("*.pt.*.tmp")):
                raise Lost("a partial checkpoint is left behind")
            remount(disk, "size=2g")
            _train_to_end(data, disk / "run", "--resume")
            if difference := _difference(_outcome(disk / "run"), wanted):
                raise Lost(f"the resumed run differs in {difference}")
            remount(disk, "ro")
            command = Command(["train.py", "--data", data, "--out", disk / "other", *TRAIN])
            if command.wait() != 1:
                raise Lost(f"exit code {command.process.returncode}: {command.text()[-300:]!r}")
            command.check_one_line("cannot write")
        passed += 1
        tick()
    return passed, ""
