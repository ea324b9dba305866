"""Watches over the loader's reader processes: when one dies, the trainer ends in one line instead of hanging.

DALI's queues lie in shared memory under locks. A reader that is killed may take a lock with it, and then
whoever asks the queue next waits for ever: the process itself has to be looked at.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.util import Finalize
from typing import Any

from base.errors import DataError

PATIENCE = 5.0  # seconds that a call may stay in DALI after a reader's death
SHARED_MEMORY = "/dev/shm"
ROOM = 1 << 20  # bytes free in it: with less it is full, and kills whoever writes to it


class ReaderWatch:
    """Knows when a reader has died. All calls into DALI go through `inside`.

    `processes`: the readers of `pipe`, a built DALI pipeline. On the first death the others are killed too: the
    batch is lost anyway. A call that does not come back then, because it waits for the dead, is ended with the
    process (exit code 1).
    """

    def __init__(self, processes: list[Any], pipe: Any) -> None:
        self._processes = processes
        self._pool = getattr(getattr(pipe, "_py_pool", None), "pool", None)
        # a rank that ends with an error would wait for readers that nobody stops
        self._at_exit = Finalize(None, _end, (processes, self._pool), exitpriority=100)
        self._died = threading.Event()
        self._closing = False
        self._entered = 0.0  # when DALI was called, 0 outside
        self.reason = ""
        self._thread = threading.Thread(target=self._watch, daemon=True, name="reader watch")
        self._thread.start()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Around a call into DALI: raises DataError if a reader is dead before it or died meanwhile."""
        self._check()
        self._entered = time.monotonic()
        try:
            yield
        except StopIteration:
            raise
        except Exception:
            # DALI may have noticed the death first
            if any(not process.is_alive() for process in self._processes):
                self._died.wait(3)
            self._check()
            raise
        finally:
            self._entered = 0.0

    def close(self) -> None:
        """Stop watching, before the readers are stopped."""
        self._closing = True
        self._at_exit.cancel()
        self._processes, self._pool = [], None  # they hold the queues' shared memory

    def _check(self) -> None:
        if self._died.is_set():
            raise DataError(self.reason)

    def _watch(self) -> None:
        sentinels = [process.sentinel for process in self._processes]
        if not sentinels or not connection.wait(sentinels) or self._closing:
            return
        # it closes its files first and has an exit code a little later
        deadline = time.monotonic() + 2
        while not (codes := [p.exitcode for p in self._processes if p.exitcode is not None]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        self.reason = death(codes[0] if codes else None)
        self._died.set()
        self._at_exit()  # once, now
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if not self._entered:
                return
            time.sleep(0.05)
        print(f"Error: {self.reason}", file=sys.stderr, flush=True)
        os._exit(1)


def _end(processes: list[Any], pool: Any) -> None:
    """Kill readers; DALI's close() then tells nobody to end: it could wait for a lock that died with them."""
    if pool is not None:
        pool._observer = None
    for process in processes:
        process.kill()


def death(exitcode: int | None) -> str:
    """One line: what killed a reader, and what to do."""
    if exitcode == -signal.SIGBUS:
        full = f"{SHARED_MEMORY} is too small (docker run --shm-size 1g, or --workers 0)"
        lost = "a shard was cut, or its disk has gone (check with `python tools/verify_lmdb.py`)"
        likely, other = (full, lost) if _free_shared_memory() < ROOM else (lost, full)
        return f"a process that reads shards died of SIGBUS: {likely}; or else {other}"
    if exitcode == -signal.SIGKILL:
        return (
            "a process that reads shards was killed (out of memory?): continue with --resume, or --workers 0"
        )
    if exitcode is None:
        name = "of unknown cause"
    else:
        name = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    return (
        f"a process that reads shards died ({name}), perhaps of a damaged shard: check with "
        "`python tools/verify_lmdb.py`, then continue with --resume"
    )


def check_shared_memory(bytes_a_batch: int, batches: int) -> None:
    """DataError unless /dev/shm has room for that many batches: full, it kills whoever writes to it."""
    free, needed = _free_shared_memory(), bytes_a_batch * batches
    if free < needed:
        raise DataError(
            f"{SHARED_MEMORY} has {int(free) >> 20} MiB free, the batches between the reading processes and the "
            f"trainer need {-(-needed >> 20)} MiB: docker run --shm-size 1g, or --workers 0"
        )


def _free_shared_memory() -> float:
    """In bytes; infinite on a system that keeps shared memory elsewhere."""
    try:
        room = os.statvfs(SHARED_MEMORY)
    except OSError:
        return math.inf
    return room.f_bavail * room.f_frsize


@contextmanager
def light_readers() -> Iterator[None]:
    """Reader processes started in here do not import the main script (torch!) and are deaf to Ctrl-C.

    The terminal sends SIGINT to them too, but it is the trainer that decides: it saves first. They go with it.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {
        name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)
    }
    main.__spec__ = None
    in_main_thread = threading.current_thread() is threading.main_thread()  # only there can signals be set
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    try:
        yield
    finally:
        vars(main).update(hidden)
        if in_main_thread:
            signal.signal(signal.SIGINT, before)
