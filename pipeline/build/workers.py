"""A small pool of processes that outlives the death of any of them.

`concurrent.futures` gives up when one worker is killed. Here that is an event, with the place where it
happened: one file that crashes a decoder, or a kernel out of memory, must not cost hours of work.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import Any

from base.errors import DataError

# The last resort, for a decoder that hangs: what prepare.py lets through takes less than five. Processor time, so
# that a busy machine or a slow disk is not taken for one.
SECONDS_AN_ITEM = 20.0
_TICKS = os.sysconf("SC_CLK_TCK")

Report = Callable[[int], None]  # a job calls it with the position of the item that it starts


@dataclass(frozen=True)
class Done:
    """A job's result."""

    result: Any


@dataclass(frozen=True)
class Crashed:
    """The process died at item `position` (-1: before the first or after the last).

    `too_long`: it was killed, because one item took more than SECONDS_AN_ITEM.
    """

    position: int
    too_long: bool = False


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    progress: Any  # shared [position of the item in work, items begun]
    number: int | None = None  # of the job in work
    item: tuple[int, float] = (-1, 0.0)  # items begun, and the processor time used when that was first seen
    too_long: bool = False


class JobQueue:
    """The jobs that wait in a pool, on this machine or a cluster, under numbers of the caller's choice."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Any]] = deque()

    def submit(self, number: int, job: Any, first: bool = False) -> None:
        """Queue a job; `first`: before all others."""
        if first:
            self._pending.appendleft((number, job))
        else:
            self._pending.append((number, job))


class WorkerPool(JobQueue):
    """Runs `function(job, report)` in `count` processes; a context manager that leaves no process behind.

    `function` must be importable and `job` and its result picklable. An exception in it ends the pool's work:
    DataError as it is, anything else with its traceback.
    """

    def __init__(self, function: Callable[[Any, Report], Any], count: int) -> None:
        super().__init__()
        # A fork server forks from a small process without threads, faster than `spawn` and safer than `fork`.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([function.__module__])
        self._function = function
        self._count = count
        self._workers: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def items_begun(self) -> int:
        """Items that the jobs now in work have begun, for a progress bar."""
        return sum(worker.progress[1] for worker in self._workers if worker.number is not None)

    def events(self, tick: Callable[[], None]) -> Iterator[tuple[int, Done | Crashed]]:
        """(number, what became of the job) until no job is left; `tick` is called about ten times a second.

        More jobs may be submitted meanwhile, for instance the one that crashed.
        """
        last_tick = 0.0
        while self._pending or any(worker.number is not None for worker in self._workers):
            self._hand_out()
            busy = {worker.pipe: worker for worker in self._workers if worker.number is not None}
            for pipe in connection.wait(list(busy), timeout=0.1):
                worker = busy[pipe]  # type: ignore[index]
                number = worker.number
                assert number is not None
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    worker.pipe.close()
                    self._workers.remove(worker)
                    yield number, Crashed(worker.progress[0], worker.too_long)
                    continue
                worker.number = None
                if kind == "data error":
                    raise DataError(value)
                if kind == "exception":
                    raise RuntimeError(f"in a worker process:\n{value}")
                yield number, Done(value)
            if time.monotonic() - last_tick >= 0.1:
                last_tick = time.monotonic()
                self._kill_what_hangs()
                tick()

    def _kill_what_hangs(self) -> None:
        """`events` then finds them dead."""
        for worker in self._workers:
            if worker.number is None or worker.progress[0] < 0:
                continue
            used, begun = _processor_seconds(worker.process.pid), worker.progress[1]
            if worker.item[0] != begun:
                worker.item = (begun, used)
            elif used - worker.item[1] > SECONDS_AN_ITEM:
                worker.too_long = True
                worker.process.kill()

    def _hand_out(self) -> None:
        idle = [worker for worker in self._workers if worker.number is None]
        while self._pending and (idle or len(self._workers) < self._count):
            worker = idle.pop() if idle else self._start()
            number, job = self._pending.popleft()
            worker.progress[0], worker.progress[1], worker.item = -1, 0, (-1, 0.0)
            worker.number = number
            try:
                worker.pipe.send(job)
            except OSError:  # it died while idle: `events` finds out
                continue

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        progress = self._context.RawArray("q", 2)
        process = self._context.Process(target=_serve, args=(self._function, theirs, progress), daemon=True)
        worker = _Worker(process, ours, progress)
        with _interrupts_held_back():
            process.start()
            self._workers.append(worker)
        theirs.close()
        return worker


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Deliver Ctrl-C after the block; processes started in it never see it, not even while they start.

    The terminal sends SIGINT to the whole process group, but only the main process decides what to do.
    """
    resource_tracker.ensure_running()  # it would unblock SIGINT when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _processor_seconds(pid: int) -> float:
    """Time that a process and its threads have computed; 0 when it is gone or the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - ten times a second
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _serve(function: Callable[[Any, Report], Any], pipe: connection.Connection, progress: Any) -> None:
    """The life of a worker: jobs from the pipe until it closes."""
    # Decoders in C print warnings about files; what matters goes through the pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    parent = os.getppid()

    def report(position: int) -> None:
        progress[0] = position
        progress[1] += position >= 0
        # The fork server dies with the main process and this one is adopted: nobody wants the result.
        if os.getppid() != parent:
            os._exit(1)

    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("done", function(job, report))
        except DataError as error:
            answer = ("data error", error.message)
        except Exception:
            answer = ("exception", traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return
