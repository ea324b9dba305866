"""Watches the loader's reader processes: if one dies, the trainer ends with a one-line error instead of hanging.

DALI's queues are in shared memory and protected by locks. A reader that is killed may hold a lock, and then the
next access to the queue never returns. Therefore a thread watches the processes themselves.
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
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from base.errors import DataError
from base.machine import STOP_SIGNALS

PATIENCE = 5.0  # seconds that a call into DALI may still take after a reader's death
SHARED_MEMORY = "/dev/shm"
MIN_FREE_BYTES = 1 << 20  # with less, shared memory counts as full; writing to it then kills the process


class ReaderWatch:
    """Detects the death of a reader process. All calls into DALI must be made in `inside`.

    `processes` are the readers of `pipe`, a built DALI pipeline. When one dies, the others are killed too, because
    the batch is lost. If a call into DALI then does not return within PATIENCE, the trainer's process exits with
    code 1.
    """

    def __init__(self, processes: list[Any], pipe: Any) -> None:
        self._processes = processes
        for process in processes:
            process.terminate = process.kill  # DALI calls it for a reader that does not end, and waits
        self._pool = getattr(getattr(pipe, "_py_pool", None), "pool", None)
        # without this, a rank that ends with an error would wait for its readers forever
        self._at_exit = Finalize(None, _end, (processes, self._pool), exitpriority=100)
        self._died = threading.Event()
        self._closing = False
        self._entered = 0.0  # time of the current call into DALI, or 0
        self.reason = ""
        self._thread = threading.Thread(target=self._watch, daemon=True, name="reader watch")
        self._thread.start()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Context for a call into DALI. Raises DataError if a reader died before or during the call."""
        self._check()
        self._entered = time.monotonic()
        try:
            yield
        except StopIteration:
            raise
        except Exception:
            # DALI may notice the death before this thread does
            if any(not process.is_alive() for process in self._processes):
                self._died.wait(3)
            self._check()
            raise
        finally:
            self._entered = 0.0

    def close(self) -> None:
        """Stop watching. Call this before the readers are stopped."""
        self._closing = True
        self._at_exit.cancel()
        self._processes, self._pool = [], None  # release the queues' shared memory

    def _check(self) -> None:
        if self._died.is_set():
            raise DataError(self.reason)

    def _watch(self) -> None:
        sentinels = [process.sentinel for process in self._processes]
        if not sentinels or not connection.wait(sentinels) or self._closing:
            return
        # the exit code is available shortly after the sentinel
        deadline = time.monotonic() + 2
        while not (codes := [p.exitcode for p in self._processes if p.exitcode is not None]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        self.reason = describe_death(codes[0] if codes else None)
        self._died.set()
        self._at_exit()  # kill the other readers now
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if not self._entered:
                return
            time.sleep(0.05)
        print(f"Error: {self.reason}", file=sys.stderr, flush=True)
        os._exit(1)


def _end(processes: list[Any], pool: Any) -> None:
    """Kill readers, and keep DALI's close() from signalling them: it could wait for a lock that they held."""
    if pool is not None:
        pool._observer = None
    for process in processes:
        process.kill()


def describe_death(exitcode: int | None) -> str:
    """The one-line error for a reader's exit code: the probable cause and what to do."""
    if exitcode == -signal.SIGBUS:
        full = f"{SHARED_MEMORY} is too small (docker run --shm-size 1g, or --workers 0)"
        lost = "a shard was truncated, or its disk is gone (check with `python tools/verify_lmdb.py`)"
        likely, other = (full, lost) if _free_shared_memory() < MIN_FREE_BYTES else (lost, full)
        return f"a process that reads shards died of SIGBUS: {likely}; or {other}"
    if exitcode == -signal.SIGKILL:
        return (
            "a process that reads shards was killed (out of memory?): continue with --resume, or --workers 0"
        )
    if exitcode is None:
        name = "unknown cause"
    else:
        name = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    return (
        f"a process that reads shards died ({name}), perhaps because of a damaged shard: check with "
        "`python tools/verify_lmdb.py`, then continue with --resume"
    )


def check_shared_memory(bytes_a_batch: int, batches: int) -> None:
    """Raise DataError unless /dev/shm has room for the batches: when it is full, writing kills the process."""
    free, needed = _free_shared_memory(), bytes_a_batch * batches
    if free < needed:
        raise DataError(
            f"{SHARED_MEMORY} has {int(free) >> 20} MiB free, but the batches between reader processes and trainer "
            f"need {-(-needed >> 20)} MiB: use docker run --shm-size 1g, or --workers 0"
        )


def _free_shared_memory() -> float:
    """Free bytes of shared memory; infinite if the system keeps it elsewhere."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return math.inf
    return status.f_bavail * status.f_frsize


@contextmanager
def light_readers() -> Iterator[None]:
    """Start reader processes that do not import the main script, and with it torch, and that ignore STOP_SIGNALS.

    A terminal, `timeout`, systemd and Slurm send these signals to the readers as well, but the trainer decides what
    happens: it saves, then ends them. DALI would end readers with SIGTERM if one of them fails to start; they get
    SIGKILL instead.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {
        name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)
    }
    main.__spec__ = None
    in_main_thread = threading.current_thread() is threading.main_thread()  # signals can be set only there
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS if in_main_thread}
    terminate = BaseProcess.terminate
    BaseProcess.terminate = BaseProcess.kill  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseProcess.terminate = terminate  # type: ignore[method-assign]
        vars(main).update(hidden)
        for number, handler in before.items():
            signal.signal(number, handler)
