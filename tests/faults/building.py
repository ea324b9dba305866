"""Faults in a build: kills and a full disk."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from helpers import tree

from faults.inputs import BUILD, make_images
from faults.processes import (
    Command,
    Lost,
    Progress,
    dying,
    remount,
    small_disk,
)


def build_kills(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """kill -9 during a build, half of them with --overwrite: --resume gives the same bytes and no other files."""
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
                command = Command(dying("tools/build_lmdb.py", draw.randrange(45), arguments))
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
            # killed before it started: there is nothing to resume, and --overwrite must be given again
            existed = (out / "train.partial").exists() or not over
            more = ["--resume"] if existed or tree(out / "train") == wanted else ["--overwrite"]
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
    """The disk fills up during a build: one line, no data set; --resume with more space gives the same bytes."""
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
            remount(disk, "size=64m")
            _build(source, disk, "--resume")
            if tree(disk / "train") != wanted:
                raise Lost("the resumed data set differs")
            remount(disk, "ro")
            command = Command(["tools/build_lmdb.py", source, disk, *BUILD, "--overwrite"])
            if command.wait() != 1 or tree(disk / "train") != wanted:
                raise Lost("a read-only disk was not reported, or its data set changed")
            command.check_one_line("Read-only file system")
        passed += 1
        tick()
    return passed, ""
