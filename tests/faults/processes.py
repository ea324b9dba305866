"""The program's commands as processes that can be killed, and what they leave behind."""

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
FILLER = "filler"  # a file there that takes up the free space
LIMIT = 120.0  # seconds that a command may take before it counts as hanging


class Lost(Exception):
    """A promise that was not kept; the message says which."""


class Skipped(Exception):
    """A fault that cannot be injected here; the message says why."""


Progress = Callable[..., object]  # called as tick() or tick(n) after n faults were survived
COMMANDS: list[Command] = []  # started by the current scenario; they may still have processes


class Command:
    """One of the program's commands as a process in a session of its own."""

    def __init__(self, arguments: list[object], before: list[str] | None = None) -> None:
        """`before`: what is put in front of the interpreter. `inject` ends what is left of it."""
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object
        self.shared: set[str] = set()  # names in /dev/shm that its processes have used
        self.private: int | None = None  # descriptor of a /dev/shm of its own
        self._looked = 0.0
        call = [*(before or []), sys.executable, *map(str, arguments)]
        self.process = subprocess.Popen(
            call, stdout=self.output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        COMMANDS.append(self)

    def running(self) -> bool:
        if time.monotonic() - self._looked > 0.2:
            self._look()
        return self.process.poll() is None

    def _look(self) -> None:
        """Other programs use /dev/shm too: what is this one's has to be seen while it lives."""
        self._looked = time.monotonic()
        for pid in session_of(self.process.pid):
            self.shared |= shared_memory_of(pid)

    def text(self) -> str:
        """Standard output and error so far."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace")

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
        if self.private is None and not session_of(self.process.pid):
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
        while (pids := session_of(self.process.pid)) and time.monotonic() < deadline:
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
            processes = session_of(self.process.pid)
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


def session_of(leader: int) -> list[int]:
    """Process ids of a session, zombies left out."""
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


def dying(script: str, number: int, arguments: list[object]) -> list[object]:
    call = f"die_at_call({script!r}, {number}, {list(map(str, arguments))!r})"
    found = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})"
    return ["-c", f"{found}; from faults.processes import die_at_call; {call}"]


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


def remount(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-o", f"remount,{options}", folder], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"a small disk cannot be changed here ({done.stderr.strip()})")
