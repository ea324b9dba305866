"""A small process pool that survives the death of its workers.

`concurrent.futures` stops when a worker is killed. Here a death is an event that names the item in work, so a file
that crashes the decoder, or a kill for lack of memory, does not cost hours of work.
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

from base.errors import DataError, UserError

# A last resort against a decoder that hangs: images that pass the checks take less than 5 s. This is processor
# time, so a busy machine or a slow disk does not count.
MAX_SECONDS_PER_ITEM = 20.0
_TICKS = os.sysconf("SC_CLK_TCK")

Report = Callable[[int], None]  # called by a job with the position of the item that it starts


@dataclass(frozen=True)
class Done:
    """A job's result."""

    result: Any


@dataclass(frozen=True)
class Crashed:
    """The process died at item `position` (-1: before the first item or after the last).

    `too_long`: the pool killed it because the item took more than MAX_SECONDS_PER_ITEM.
    """

    position: int
    too_long: bool = False


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    progress: Any  # shared memory: [position of the current item, number of items started]
    number: int | None = None  # of the current job
    item: tuple[int, float] = (-1, 0.0)  # items started, and the processor time when that was first seen
    too_long: bool = False


class JobQueue:
    """The waiting jobs of a pool, local or on a cluster. The caller chooses the number of each job."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Any]] = deque()

    def submit(self, number: int, job: Any, first: bool = False) -> None:
        """Add a job to the queue; at the front if `first` is true."""
        if first:
            self._pending.appendleft((number, job))
        else:
            self._pending.append((number, job))


class WorkerPool(JobQueue):
    """Runs `function(job, report)` in `count` processes; a context manager that leaves no process behind.

    `function` must be importable; `job` and its result must be picklable. An exception in it is raised by `events`:
    a UserError as DataError, anything else as RuntimeError with its traceback.
    """

    def __init__(self, function: Callable[[Any, Report], Any], count: int) -> None:
        super().__init__()
        # A fork server is a small process without threads: forking from it is faster than `spawn` and safer than
        # `fork`.
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

    def items_started(self) -> int:
        """Items that the running jobs have started, for a progress bar."""
        return sum(worker.progress[1] for worker in self._workers if worker.number is not None)

    def events(self, tick: Callable[[], None]) -> Iterator[tuple[int, Done | Crashed]]:
        """Yield (number, result or crash) of each job until none is left; call `tick` about ten times a second.

        The caller can submit jobs in the meantime, such as the one that crashed.
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
                if kind == "user error":
                    raise DataError(value)
                if kind == "exception":
                    raise RuntimeError(f"in a worker process:\n{value}")
                yield number, Done(value)
            if time.monotonic() - last_tick >= 0.1:
                last_tick = time.monotonic()
                self._kill_hanging_workers()
                tick()

    def _kill_hanging_workers(self) -> None:
        """Kill workers whose item takes too long; `events` then finds them dead."""
        for worker in self._workers:
            if worker.number is None or worker.progress[0] < 0:
                continue
            used, started = _processor_seconds(worker.process.pid), worker.progress[1]
            if worker.item[0] != started:
                worker.item = (started, used)
            elif used - worker.item[1] > MAX_SECONDS_PER_ITEM:
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
            except OSError:  # it died while idle; `events` handles that
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
    """Processor time of a process and its threads; 0 if it is gone or the system does not provide it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - called ten times a second
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _serve(function: Callable[[Any, Report], Any], pipe: connection.Connection, progress: Any) -> None:
    """Run jobs from the pipe until it closes. Runs in a worker."""
    # Decoders written in C print warnings to stderr; results and errors go through the pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    parent = os.getppid()

    def report(position: int) -> None:
        progress[0] = position
        progress[1] += position >= 0
        # The fork server ends with the main process; this process then gets another parent and is no longer needed.
        if os.getppid() != parent:
            os._exit(1)

    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("done", function(job, report))
        except UserError as error:
            answer = ("user error", error.message)
        except Exception:
            answer = ("exception", traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return
