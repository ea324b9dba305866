"""Break the program on purpose and count what it loses: `make faults`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from helpers import tree
from tqdm import tqdm

from base.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
FILLER = "filler"  # a file there that takes what is free
LIMIT = 120.0  # seconds that a command may take before it counts as hanging
TRAIN_IMAGES, VAL_IMAGES, BATCH, EPOCHS = 24, 8, 8, 2  # images a class, two classes: 6 steps an epoch
STEPS_PER_EPOCH = 2 * TRAIN_IMAGES // BATCH
# the smallest crop that passes all pools; a checkpoint is 160 MB all the same, long enough to be killed in
TRAIN = [
    "--gpus",
    "0",
    "--crop",
    "67",
    "--global-batch",
    str(BATCH),
    "--epochs",
    str(EPOCHS),
    "--lr",
    "0.001",
]
TRAIN += ["--init", "torch", "--save-every", "4", "--log-every", "1", "--decode-threads", "1"]
TRAIN += ["--no-progress", "--no-tensorboard"]
BUILD = ["--split", "train", "--size", "64", "--images-per-shard", "8", "--workers", "2"]


class Lost(Exception):
    """A promise that was not kept; the message says which."""


class Skipped(Exception):
    """A fault that cannot be injected here; the message says why."""


@dataclass
class Result:
    """One row of the table."""

    name: str
    tries: int
    passed: int
    seconds: float
    note: str


Progress = Callable[
    ..., object
]  # told after each try, or how many tries, once they have been found to be well
COMMANDS: list[Command] = []  # of the scenario at work, all that may still have processes


# --- commands, and what they leave behind ------------------------------------------------------------------


class Command:
    """One of the program's commands as a process in a session of its own."""

    def __init__(self, arguments: list[object], before: list[str] | None = None) -> None:
        """`before`: what is put in front of the interpreter. `inject` ends what is left of it."""
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object
        self.shared: set[str] = set()  # names in /dev/shm that its processes have used
        self.private: int | None = None  # descriptor of a /dev/shm of its own
        self._looked = 0.0
        call = [*(before or []), sys.executable, *map(str, arguments)]
        self.process = subprocess.Popen(
            call, stdout=self.said, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        COMMANDS.append(self)

    def running(self) -> bool:
        if time.monotonic() - self._looked > 0.2:
            self._look()
        return self.process.poll() is None

    def _look(self) -> None:
        """Other programs use /dev/shm too: what is this one's has to be seen while it lives."""
        self._looked = time.monotonic()
        for pid in _session(self.process.pid):
            self.shared |= _shared_memory(pid)

    def text(self) -> str:
        """Standard output and error so far."""
        self.said.seek(0)
        return self.said.read().decode(errors="replace")

    def kill(self) -> None:
        """kill -9 of the main process alone; the others have to notice."""
        self._look()
        self.process.kill()
        self.process.wait()

    def wait(self, seconds: float = LIMIT) -> int:
        """The exit code; Lost when it hangs."""
        deadline = time.monotonic() + seconds
        while self.running():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1)
            if time.monotonic() > deadline:
                self.end()
                raise Lost(f"hung for {seconds:.0f} s: {self.text()[-200:]!r}")
        if self.private is None and not _session(self.process.pid):
            self._over()
        return int(self.process.returncode)

    def until(self, condition: Callable[[], object]) -> None:
        """Return when it is true or the command is over; Lost when neither happens."""
        deadline = time.monotonic() + LIMIT
        while self.running() and not condition():
            if time.monotonic() > deadline:
                self.end()
                raise Lost(f"nothing happened for {LIMIT:.0f} s: {self.text()[-200:]!r}")
            time.sleep(0.005)

    def hold_private(self) -> None:
        """Keep hold of the /dev/shm that it has mounted for itself, to look into when it is over."""
        own = Path(f"/proc/{self.process.pid}/root{SHARED_MEMORY}")

        def mounted() -> bool:
            with contextlib.suppress(OSError):
                if own.stat().st_dev != SHARED_MEMORY.stat().st_dev:
                    self.private = os.open(own, os.O_RDONLY)
            return self.private is not None

        self.until(mounted)
        if self.private is None:
            raise Lost(f"over before its /dev/shm was mounted: {self.text()[-300:]!r}")

    def end(self) -> None:
        """No process of the session is left; only for the end of a failed try."""
        deadline = time.monotonic() + 10
        # one may start another meanwhile
        while (pids := _session(self.process.pid)) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.wait()
        self._over()

    def _over(self) -> None:
        """Its processes are gone; the number of its session may become another's."""
        if self in COMMANDS:
            COMMANDS.remove(self)
        if self.private is not None:
            os.close(self.private)
            self.private = None

    def check_nothing_left(self, patience: float = 10) -> None:
        """Lost if processes of the session or its shared memory outlive the command."""
        deadline = time.monotonic() + patience
        while True:
            processes = _session(self.process.pid)
            if self.private is not None:
                files = set(os.listdir(self.private)) - {FILLER}  # noqa: PTH208 - by descriptor
            else:
                files = {name for name in self.shared if (SHARED_MEMORY / name).exists()}
            if not processes and not files:
                self._over()
                return
            if time.monotonic() > deadline:
                self.end()
                raise Lost(f"left behind: {len(processes)} processes, shared memory {sorted(files)}")
            time.sleep(0.05)

    def check_one_line(self, *words: str) -> None:
        """Lost unless the command ended in one line of error that has the words."""
        text = self.text()
        errors = [line for line in text.splitlines() if line.startswith("Error: ")]
        if len(errors) != 1 or "Traceback" in text or not all(word in errors[0] for word in words):
            raise Lost(f"not one line with {words}: {text[-300:]!r}")


def _session(leader: int) -> list[int]:
    """Process ids of a session, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                if int(fields[3]) == leader and fields[0] != b"Z":
                    found.append(int(entry.name))
    return found


def _shared_memory(pid: int) -> set[str]:
    """Names in /dev/shm that a process has mapped."""
    try:
        return set(re.findall(rf"{SHARED_MEMORY}/(\S+)", Path(f"/proc/{pid}/maps").read_text()))
    except OSError:
        return set()


def count_down(number: int) -> None:
    """Have this process kill itself (9) at its `number`-th change of the file system from here on.

    Counted are syncs, renames, links, removals and new folders.
    """
    left = number

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "link", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def die_at_call(script: str, number: int, arguments: list[str]) -> None:
    """Run a script of this program that kills itself as `count_down` has it; in a process of its own."""
    count_down(number)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _dying(script: str, number: int, arguments: list[object]) -> list[object]:
    call = f"die_at_call({script!r}, {number}, {list(map(str, arguments))!r})"
    return ["-c", f"from faults.injection import die_at_call; {call}"]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system in memory of `size` (as mount takes it) at `folder`; Skipped where that is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if done.returncode:
        raise Skipped("mounting a small disk is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _remount(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-o", f"remount,{options}", folder], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"a small disk cannot be changed here ({done.stderr.strip()})")


# --- images ------------------------------------------------------------------------------------------------


def make_images(out: Path, seed: int = 0) -> Path:
    """OUT/{train,val}/{a,b}/*.jpg: blobs of colour, about 700 pixels wide."""
    import cv2

    draw = np.random.default_rng(seed)
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for name in ("a", "b"):
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                blobs = draw.integers(0, 256, (9, 9, 3), np.uint8)
                size = tuple(int(side) for side in draw.integers(500, 900, 2))
                cv2.imwrite(str(folder / f"{name}{i}.jpg"), cv2.resize(blobs, size))
    return out


def make_data(work: Path) -> Path:
    """The data set that the training is tried on."""
    from pipeline.build.sources import open_source
    from pipeline.build.split import Options, build_split

    data, images = work / "data", make_images(work / "images")
    for split in ("train", "val"):
        if not (data / split).exists():
            source = open_source(images / split, split)
            build_split(source, data, Options(size=72, images_per_shard=16), workers=2)
    return data


# --- training ----------------------------------------------------------------------------------------------


def train_kills(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """kill -9 in a training: it goes on with --resume and ends with the weights of an uninterrupted one."""
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
                # the last kills of a round may come so late that nothing is left to kill
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
    """One process of a run, begun or resumed, and its death; False when it ended by itself and well."""
    arguments: list[object] = ["--data", data, "--out", out, *TRAIN]
    if list(out.glob("checkpoint-*.pt")):
        arguments.append("--resume")
    if kind == "at a sync or rename":
        command = Command(_dying("train.py", draw.randrange(40), arguments))
        command.wait()
    else:
        command = Command(["train.py", *arguments])
        deadline = time.monotonic() + (draw.uniform(0, 1.2 * life) if kind == "at any moment" else LIMIT)
        delay = draw.uniform(0, 0.2 if kind == "in a checkpoint's write" else 0.05)
        skip = draw.randrange(3)  # of the moments to choose from
        while kind and command.running() and time.monotonic() < deadline:
            if kind == "in a checkpoint's write" and list(out.glob(".*.pt.tmp")):
                if skip == 0:
                    break
                skip -= 1
                while list(out.glob(".*.pt.tmp")) and command.running() and time.monotonic() < deadline:
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
    """Whether the log ends with the last step of an epoch, whose validation is not there yet."""
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
    """Everything of a finished run that must not depend on what happened to it."""
    from model.training.checkpoint import Checkpoints, load

    if left := list(run.glob(".*")):
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
    """Where two nests of dictionaries, lists, tensors and numbers differ first, bit for bit; "" nowhere."""
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
    """SIGTERM or SIGINT to a training: the step is finished and saved, exit code 75, and nothing changes."""
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
            raise Lost("ten runs came to their end before a signal stopped one")
        _train_to_end(data, out, "--resume")
        if difference := _difference(_outcome(out), wanted):
            raise Lost(f"the resumed run differs in {difference}")
        shutil.rmtree(out)
        passed += 1
        tick()
    return passed, "exit code 75"


def _stopped(data: Path, out: Path, which: signal.Signals, lines: int) -> bool:
    """Send a run a signal when its log has so many lines; False when it came to its end all the same."""
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
    """Whether a run's log has so many lines."""
    log = out / "log.jsonl"
    return log.exists() and log.read_bytes().count(b"\n") >= lines


def readers(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """A process that reads shards is killed in mid-epoch: one line, no hang, nothing left."""
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
    return passed, f"over within {longest:.1f} s"


def _readers(command: Command) -> list[int]:
    """The reader processes of a training: spawned, but no ranks."""
    found = []
    for pid in _session(command.process.pid):
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
        raise Skipped("a file system of its own needs `unshare -m`, which is not permitted here")
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
            # as the namespace sees it; whatever DALI's memory grows into next is not there any more
            _fill(Path(f"/proc/{command.process.pid}/root{SHARED_MEMORY}/{FILLER}"))
            deadline = time.monotonic() + 20
            while command.running() and time.monotonic() < deadline:
                time.sleep(0.05)
            if command.running():  # it needed no more than it had
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
    """No room for the next checkpoint, and a read-only folder: one line; what is there is whole, and resumes."""
    data, whole = make_data(work), work / "whole-disk"
    _train_to_end(data, whole)
    wanted, passed = _outcome(whole), 0
    for number in range(tries):
        with small_disk(work / f"disk-{number}", f"{draw.randrange(170, 450)}m") as disk:
            command = Command(["train.py", "--data", data, "--out", disk / "run", *TRAIN])
            if command.wait() != 1:
                raise Lost(f"exit code {command.process.returncode}: {command.text()[-300:]!r}")
            command.check_one_line("No space left")
            if list((disk / "run").glob(".*.pt.tmp")):
                raise Lost("half a checkpoint is left")
            _remount(disk, "size=2g")
            _train_to_end(data, disk / "run", "--resume")
            if difference := _difference(_outcome(disk / "run"), wanted):
                raise Lost(f"the resumed run differs in {difference}")
            _remount(disk, "ro")
            command = Command(["train.py", "--data", data, "--out", disk / "other", *TRAIN])
            if command.wait() != 1:
                raise Lost(f"exit code {command.process.returncode}: {command.text()[-300:]!r}")
            command.check_one_line("cannot write")
        passed += 1
        tick()
    return passed, ""


def checkpoints(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """A checkpoint cut short or with one bit changed is refused by name; the one before is used when asked."""
    import torch

    from base.errors import ModelError
    from model.training.checkpoint import Checkpoints

    run = Checkpoints(work / "checkpoints")
    run.out.mkdir()
    for step in (1, 2):
        run.save({"model": {"w": torch.arange(4096.0)}, "step": step})
    newest, passed = run.paths()[0], 0
    content = newest.read_bytes()
    for number in range(tries):
        damaged = bytearray(content)
        if number % 2:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        newest.write_bytes(damaged)
        try:
            run.newest()
            raise Lost("a damaged checkpoint was loaded")
        except ModelError as error:
            if newest.name not in error.message:
                raise Lost(f"not named: {error.message}") from None
        if run.newest(fall_back=True)["step"] != 1:
            raise Lost("the one before was not used")
        passed += 1
        tick()
    return passed, ""


# --- builds ------------------------------------------------------------------------------------------------


def build_kills(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """kill -9 in a build, half of them over an older data set: --resume gives the same bytes, nothing else."""
    source = make_images(work / "images") / "train"
    began = time.monotonic()
    _build(source, work / "whole-build")
    life = time.monotonic() - began
    wanted, passed, done, at_calls = tree(work / "whole-build/train"), 0, 0, 0
    older = work / "older"
    _build(source, older, "--size", 32)
    while done < tries:
        out, kills, over = work / f"build-{done}", 0, draw.random() < 0.5
        if over:
            shutil.copytree(older, out)
        more: list[object] = ["--overwrite"] if over else []
        while True:
            arguments = [source, out, *BUILD, *more]
            systematic = (done + kills) % 2 == 1 and done + kills < tries
            if systematic:
                command = Command(_dying("tools/build_lmdb.py", draw.randrange(45), arguments))
            else:
                command = Command(["tools/build_lmdb.py", *arguments])
                if done + kills < tries:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        command.process.wait(draw.uniform(0, 1.1 * life))
                    if command.running():
                        command.kill()
            code = command.wait()
            command.check_nothing_left()
            if code == 0:
                break
            if code != -signal.SIGKILL:
                raise Lost(f"exit code {code}: {command.text()[-300:]!r}")
            kills += 1
            at_calls += systematic
            # killed before it had begun, an --overwrite has nothing to resume and has to be said again
            begun = (out / "train.partial").exists() or not over
            more = ["--resume"] if begun or tree(out / "train") == wanted else ["--overwrite"]
        if tree(out / "train") != wanted:
            raise Lost(f"after {kills} kills the data set differs")
        if [path.name for path in out.iterdir()] != ["train"]:
            raise Lost(f"left behind: {sorted(path.name for path in out.iterdir())}")
        shutil.rmtree(out)
        done += kills
        passed += kills
        tick(kills)
    return passed, f"{at_calls} at a sync, rename or removal"


def _build(source: Path, out: Path, *more: object) -> str:
    command = Command(["tools/build_lmdb.py", source, out, *BUILD, *more])
    if command.wait(600):
        raise Lost(f"the build failed: {command.text()[-300:]!r}")
    command.check_nothing_left()
    return command.text()


def full_disk_build(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """No room for the shards: one line, no data set, and --resume with more room gives the same bytes."""
    source, passed = make_images(work / "images") / "train", 0
    _build(source, work / "whole-full")
    wanted = tree(work / "whole-full/train")
    for number in range(tries):
        with small_disk(work / f"build-disk-{number}", f"{draw.randrange(100, 300)}k") as disk:
            command = Command(["tools/build_lmdb.py", source, disk, *BUILD])
            if command.wait() != 1:
                raise Lost(f"exit code {command.process.returncode}: {command.text()[-300:]!r}")
            command.check_one_line("is full", "--resume")
            command.check_nothing_left()
            if (disk / "train").exists() or list(disk.rglob("*.tmp")):
                raise Lost(f"left behind: {sorted(tree(disk))}")
            _remount(disk, "size=64m")
            _build(source, disk, "--resume")
            if tree(disk / "train") != wanted:
                raise Lost("the resumed data set differs")
            _remount(disk, "ro")
            command = Command(["tools/build_lmdb.py", source, disk, *BUILD, "--overwrite"])
            if command.wait() != 1 or tree(disk / "train") != wanted:
                raise Lost("a read-only disk")
            command.check_one_line("Read-only file system")
        passed += 1
        tick()
    return passed, ""


# --- hostile input -----------------------------------------------------------------------------------------


def hostile_images(
    work: Path, tries: int, draw: random.Random, tick: Progress, corpora: tuple[Path, ...] = ()
) -> tuple[int, str]:
    """Damaged and malicious files given to a build: each is accepted or rejected, and the data set is sound."""
    from pipeline.build.workers import SECONDS_AN_ITEM

    seeds = [path for corpus in corpora for path in sorted(corpus.rglob("*")) if path.is_file()]
    inputs = work / "hostile/train/x"
    inputs.mkdir(parents=True)
    for number, content in enumerate(_hostile(seeds, draw, tries)):
        (inputs / f"{number:06d}").write_bytes(content)
    out = work / "hostile-out"
    command = Command(["tools/build_lmdb.py", inputs.parent, out, *BUILD[:4], "--workers", 2])
    peak, deadline = 0, time.monotonic() + 300 + tries
    while command.running() and time.monotonic() < deadline:
        peak = max(peak, *(_peak_memory(pid) for pid in _session(command.process.pid)), 0)
        time.sleep(0.05)
    if command.wait(5):
        raise Lost(f"the build failed: {command.text()[-300:]!r}")
    command.check_nothing_left()
    found = re.search(r"([\d,]+) images seen.* = ([\d,]+) accepted \+ ([\d,]+) rejected", command.text())
    seen, accepted, rejected = (int(n.replace(",", "")) for n in (found.groups() if found else "000"))
    if seen != tries or accepted + rejected != seen:
        raise Lost(f"{tries} files, {seen} seen = {accepted} accepted + {rejected} rejected")
    check = Command(["tools/verify_lmdb.py", out])
    if check.wait(600):
        raise Lost(f"the data set is damaged: {check.text()[-300:]!r}")
    tick(tries)
    manifest = json.loads((out / "train/manifest.json").read_text())
    reasons = [entry["reason"] for entry in manifest["rejected"]]
    crashed = sum(reason == "crashed the decoder" for reason in reasons)
    slow = sum(reason.startswith("takes more") for reason in reasons)
    return seen, (
        f"{accepted:,} accepted, {rejected:,} rejected ({slow} over {SECONDS_AN_ITEM:.0f} s, "
        f"{crashed} crashed a worker); at most {peak >> 20:,} MiB a process"
    )


def _peak_memory(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) << 10
    return 0


def _hostile(paths: list[Path], draw: random.Random, count: int) -> Iterator[bytes]:
    """`count` inputs: crafted ones, the seeds as they are, then seeds cut, flipped, overwritten and spliced."""
    crafted = _crafted(draw)
    own = _photographs(draw)
    for number in range(count):
        if number < len(crafted):
            yield crafted[number]
        elif number < len(crafted) + len(paths) and 2 * count > 3 * len(paths):
            yield paths[number - len(crafted)].read_bytes()
        else:
            both = [
                draw.choice(own) if not paths or draw.random() < 0.2 else draw.choice(paths).read_bytes()
                for _ in range(2)
            ]
            yield _mutated(bytearray(both[0][: 1 << 20]), both[1], draw)


def _mutated(data: bytearray, other: bytes, draw: random.Random) -> bytes:
    for _ in range(1 + draw.randrange(3)):
        where = draw.randrange(len(data)) if data else 0
        kind = draw.randrange(5)
        if kind == 0:
            del data[where:]
        elif kind == 1 and data:
            for _ in range(1 + draw.randrange(16)):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 2 and data:  # headers are short, and what they claim is what decoders trust
            where = draw.randrange(min(len(data), 64))
            data[where : where + 4] = draw.choice(
                [b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"\x00\x01"]
            )
        elif kind == 3:
            start = draw.randrange(len(other)) if other else 0
            data[where:where] = other[start : start + draw.randrange(1, 2000)]
        elif kind == 4:
            del data[where : where + draw.randrange(1, 64)]
    return bytes(data)


def _photographs(draw: random.Random) -> list[bytes]:
    """Small sound files of every kind that the builder reads and OpenCV writes."""
    import cv2

    blobs = np.random.default_rng(draw.randrange(1 << 30)).integers(0, 256, (12, 12, 3), np.uint8)
    color = cv2.resize(blobs, (90, 70), interpolation=cv2.INTER_CUBIC)
    kinds: list[tuple[str, np.ndarray, list[int]]] = [
        (".jpg", color, []),
        (".jpg", color, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
        (".jpg", color[:, :, 0], [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
        (".png", color, []),
        (".png", color.astype(np.uint16) * 257, []),
        (".bmp", color, []),
        (".webp", color, []),
        (".gif", color, []),
    ]
    return [cv2.imencode(kind, image, options)[1].tobytes() for kind, image, options in kinds]


def _crafted(draw: random.Random) -> list[bytes]:
    """Files that are small and claim or become something huge."""

    def png(width: int, height: int, rows: bytes, *extra: bytes) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")

    zeros = zlib.compress(bytes(64 << 20), 9)
    text = b"zTXt" + b"x\0\0" + zeros
    text_chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    jpeg = next(data for data in _photographs(draw)[1:2])
    frame = jpeg.index(b"\xff\xc2")
    scan = jpeg.index(b"\xff\xda")
    claims = [
        jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]
        for height, width in ((65500, 65500), (9400, 9500), (1, 65500), (0, 0))
    ]
    # the same scans again and again over as many pixels as are let through: minutes of work in 600 kB
    scans = jpeg[scan:-2]
    bomb = claims[1][:scan] + scans * (600_000 // len(scans)) + b"\xff\xd9"
    return [
        b"",
        png(0xFFFF_FFFF, 0xFFFF_FFFF, zeros),
        png(60_000, 60_000, zeros),
        png(9_400, 9_400, zlib.compress(bytes(9_400 * (3 * 9_400 + 1)), 9)),
        png(10, 10, zeros),
        png(10, 10, zlib.compress(bytes(310)), text_chunk),
        *claims,
        bomb,
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + bytes(99),
    ]


def hostile_tars(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """Damaged and malicious tars: members refused or skipped with a reason, nothing written anywhere."""
    from pipeline.build.listing import RawReader
    from pipeline.build.sources import open_source

    def tar_of(members: dict[str, bytes], kinds: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.type = kinds.get(name, tarfile.REGTYPE)
                member.linkname, member.size = "../../x", len(content) if name not in kinds else 0
                tar.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    names = ["a.jpg", "../up.jpg", "/abs.jpg", "soft.jpg", "hard.jpg", "device.jpg", "fifo.jpg", "z.jpg"]
    kinds = {"soft.jpg": tarfile.SYMTYPE, "hard.jpg": tarfile.LNKTYPE}
    kinds |= {"device.jpg": tarfile.CHRTYPE, "fifo.jpg": tarfile.FIFOTYPE}
    inner = tar_of(dict.fromkeys(names, b"x" * 700), kinds)
    whole = tar_of({"n1.tar": inner, "n2.tar": inner, "../n3.tar": inner}, {})
    folder, passed, refused = work / "tars", 0, 0
    folder.mkdir()
    path = folder / "train.tar"
    before = set(work.rglob("*")) | {path}
    for number in range(tries):
        damaged = bytearray(whole)
        if number % 2:
            damaged = bytearray(_mutated(damaged, inner, draw))
        elif number:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            source = open_source(path, "train")
            reader = RawReader(path)
            for image in source.images:
                if ".." in image.name.split("/") or image.name.startswith("/"):
                    raise Lost(f"{image.name} is let through")
                with contextlib.suppress(ValueError):
                    reader.read(image)
            reader.close()
        except DataError as error:
            refused += 1
            if "\n" in error.message:
                raise Lost(f"more than one line: {error.message!r}") from None
        if set(work.rglob("*")) != before:
            raise Lost("something was written")
        passed += 1
        tick()
    return passed, f"{refused:,} refused as a whole"


def flips(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """One bit of a finished data set is changed: verification says which file, and which record if it is one."""
    from pipeline.build.verify import verify_split
    from pipeline.shards import ShardReader

    split = make_data(work) / "train"
    reader = ShardReader(split)
    records = []  # (file, start, end, key)
    for index in range(len(reader)):
        shard, key = reader.locate(index)
        file = split / shard / "data.mdb"
        data = reader.read(index)[0].tobytes()
        start = file.read_bytes().find(data)
        records.append((file, start, start + len(data), key.decode()))
    reader.close()
    files = sorted(path for path in split.rglob("*") if path.is_file())
    sizes, passed, named = [path.stat().st_size for path in files], 0, 0
    for number in range(tries):
        # most flips in the shards, a quarter in every file alike
        path = draw.choices(files, sizes)[0] if number % 4 else draw.choice(files)
        content = path.read_bytes()
        position = draw.randrange(len(content))
        damaged = bytearray(content)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            problems = _problems(split, verify_split)
        finally:
            path.write_bytes(content)
        hit = next((k for f, start, end, k in records if f == path and start <= position < end), None)
        where = path.parent.name if path.parent != split else path.name
        if where not in problems or (hit and f"key {hit}" not in problems):
            raise Lost(f"{path.relative_to(split)} byte {position}, key {hit}: {problems[:200]!r}")
        named += hit is not None
        passed += 1
        tick()
    return passed, f"{named} in a record, by its key"


def _problems(split: Path, verify_split: Callable[..., Any]) -> str:
    """Everything that verification says about a split."""
    try:
        _, reports, problems = verify_split(split, 1)
    except DataError as error:
        return error.message
    return "\n".join(problems + [f"{r.name}: {problem}" for r in reports for problem in r.problems])


# --- the command -------------------------------------------------------------------------------------------

SCENARIOS: dict[str, tuple[Callable[..., tuple[int, str]], int]] = {
    "train-kills": (train_kills, 50),
    "signals": (signals, 6),
    "readers": (readers, 10),
    "shared-memory": (shared_memory, 6),
    "full-disk": (full_disk, 3),
    "checkpoints": (checkpoints, 1000),
    "build-kills": (build_kills, 50),
    "full-disk-build": (full_disk_build, 5),
    "hostile-images": (hostile_images, 10_000),
    "hostile-tars": (hostile_tars, 1000),
    "flips": (flips, 1000),
}


def inject(name: str, tries: int | None = None, seed: int = 0, corpora: tuple[Path, ...] = ()) -> Result:
    """Run one scenario, in a folder of its own that goes with it."""
    function, usual = SCENARIOS[name]
    tries = tries or usual
    began = time.monotonic()
    more = {"corpora": corpora} if function is hostile_images else {}
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as work,
        tqdm(desc=name, total=tries, leave=False) as bar,
    ):
        try:
            passed, note = function(Path(work), tries, random.Random(seed), bar.update, **more)
        except Lost as lost:
            passed, note = int(bar.n), f"FAILED: {lost}"
        except Skipped as skipped:
            passed, tries, note = 0, 0, f"skipped: {skipped}"
        finally:
            for command in list(COMMANDS):
                command.end()
    return Result(name, tries, min(passed, tries - note.startswith("FAILED")), time.monotonic() - began, note)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--only", multiple=True, type=click.Choice(list(SCENARIOS)), help="This scenario (repeat for more)."
)
@click.option("--tries", type=click.IntRange(1), help="Faults a scenario.  [default: each one's own]")
@click.option(
    "--corpus", "corpora", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of images to begin from (hostile-images).",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the faults.")
def main(only: tuple[str, ...], tries: int | None, corpora: tuple[Path, ...], seed: int) -> None:
    """Inject faults into builds and trainings and print what was kept: exit code 1 if anything was lost.

    Kills, signals, full disks, damaged files, hostile images. Everything happens in temporary folders. Small
    disks are mounted and /dev/shm is replaced where that is permitted (root), else those scenarios are skipped.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the processes and the disks
    click.echo(f"{'scenario':16} {'tries':>7} {'passed':>7} {'seconds':>8}  ")
    failed = False
    for name in only or SCENARIOS:
        result = inject(name, tries, seed, corpora)
        failed |= result.passed < result.tries
        click.echo(f"{name:16} {result.tries:7,} {result.passed:7,} {result.seconds:8.1f}  {result.note}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
