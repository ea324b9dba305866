"""Runs the program's commands as processes that can be killed, and finds what they leave behind."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers import ROOT

SHARED_MEMORY = Path("/dev/shm")
FILLER = "filler"  # a file in it that uses up the free space
LIMIT = 120.0  # seconds after which a command counts as hanging


class Lost(Exception):
    """A promise was not kept; the message says which."""


class Skipped(Exception):
    """A fault cannot be injected on this machine; the message says why."""


Progress = Callable[..., object]  # called as tick() or tick(n) after n faults passed
COMMANDS: list[Command] = []  # commands of the current scenario that may still have processes


class Command:
    """One of the program's commands, running as a process in its own session."""

    def __init__(self, arguments: list[object], before: list[str] | None = None) -> None:
        """Start the command. `before` is a command prefix. `inject` ends processes that are left."""
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object
        self.shared: set[str] = set()  # names in /dev/shm that its processes have used
        self.private: int | None = None  # descriptor of the command's own /dev/shm, if it has one
        self._last_scan = 0.0
        call = [*(before or []), sys.executable, *map(str, arguments)]
        self.process = subprocess.Popen(
            call, stdout=self.output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        COMMANDS.append(self)

    def running(self) -> bool:
        if time.monotonic() - self._last_scan > 0.2:
            self._scan()
        return self.process.poll() is None

    def _scan(self) -> None:
        """Record the shared memory that the running processes use; other programs use /dev/shm as well."""
        self._last_scan = time.monotonic()
        for pid in session_of(self.process.pid):
            self.shared |= shared_memory_of(pid)

    def text(self) -> str:
        """Standard output and error so far."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace")

    def kill(self) -> None:
        """Kill (-9) only the main process; the others must notice."""
        self._scan()
        self.process.kill()
        self.process.wait()

    def wait(self, seconds: float = LIMIT) -> int:
        """Wait for the exit code; raises Lost if the command hangs."""
        deadline = time.monotonic() + seconds
        while self.running():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1)
            if time.monotonic() > deadline:
                self.end()
                raise Lost(f"hung for {seconds:.0f} s: {self.text()[-200:]!r}")
        if self.private is None and not session_of(self.process.pid):
            self._release()
        return int(self.process.returncode)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until `condition` is true or the command has ended; raises Lost if neither happens."""
        deadline = time.monotonic() + LIMIT
        while self.running() and not condition():
            if time.monotonic() > deadline:
                self.end()
                raise Lost(f"nothing happened for {LIMIT:.0f} s: {self.text()[-200:]!r}")
            time.sleep(0.005)

    def hold_private(self) -> None:
        """Open the /dev/shm that the command mounted for itself, to examine it after the command has ended."""
        own = Path(f"/proc/{self.process.pid}/root{SHARED_MEMORY}")

        def mounted() -> bool:
            with contextlib.suppress(OSError):
                if own.stat().st_dev != SHARED_MEMORY.stat().st_dev:
                    self.private = os.open(own, os.O_RDONLY)
            return self.private is not None

        self.until(mounted)
        if self.private is None:
            raise Lost(f"ended before its /dev/shm was mounted: {self.text()[-300:]!r}")

    def end(self) -> None:
        """Kill all processes of the session, at the end of a failed try."""
        deadline = time.monotonic() + 10
        # repeat, because a process can start another one in the meantime
        while (pids := session_of(self.process.pid)) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.wait()
        self._release()

    def _release(self) -> None:
        """Forget the session: all its processes have ended, and its id can be reused."""
        if self in COMMANDS:
            COMMANDS.remove(self)
        if self.private is not None:
            os.close(self.private)
            self.private = None

    def check_nothing_left(self, patience: float = 10) -> None:
        """Raise Lost if processes of the session, or their shared memory, outlive the command."""
        deadline = time.monotonic() + patience
        while True:
            processes = session_of(self.process.pid)
            if self.private is not None:
                files = set(os.listdir(self.private)) - {FILLER}  # noqa: PTH208 - by descriptor
            else:
                files = {name for name in self.shared if (SHARED_MEMORY / name).exists()}
            if not processes and not files:
                self._release()
                return
            if time.monotonic() > deadline:
                self.end()
                raise Lost(f"left behind: {len(processes)} processes, shared memory {sorted(files)}")
            time.sleep(0.05)

    def check_one_line(self, *words: str) -> None:
        """Raise Lost unless the command printed exactly one error line, which contains `words`."""
        text = self.text()
        errors = [line for line in text.splitlines() if line.startswith("Error: ")]
        if len(errors) != 1 or "Traceback" in text or not all(word in errors[0] for word in words):
            raise Lost(f"not one line with {words}: {text[-300:]!r}")


def session_of(leader: int) -> list[int]:
    """Process ids of a session, without zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                if int(fields[3]) == leader and fields[0] != b"Z":
                    found.append(int(entry.name))
    return found


def shared_memory_of(pid: int) -> set[str]:
    """Names in /dev/shm that a process has mapped."""
    try:
        return set(re.findall(rf"{SHARED_MEMORY}/(\S+)", Path(f"/proc/{pid}/maps").read_text()))
    except OSError:
        return set()


def count_down(number: int) -> None:
    """Make this process kill itself (-9) at its `number`-th change of the file system from now on.

    Changes are syncs, renames, links, removals and new folders.
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
    """Run a script of this program in this process, which kills itself as in `count_down`."""
    count_down(number)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def dying(script: str, number: int, arguments: list[object]) -> list[object]:
    """Arguments for the interpreter that run `die_at_call` in a new process."""
    call = f"die_at_call({script!r}, {number}, {list(map(str, arguments))!r})"
    found = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})"
    return ["-c", f"{found}; from faults.processes import die_at_call; {call}"]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of `size` (in mount's syntax) in memory at `folder`; Skipped if that is not permitted."""
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


def remount(folder: Path, options: str) -> None:
    """Change the options of a small disk; Skipped if that is not permitted."""
    done = subprocess.run(["mount", "-o", f"remount,{options}", folder], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"a small disk cannot be changed here ({done.stderr.strip()})")
