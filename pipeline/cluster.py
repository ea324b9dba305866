"""The shard jobs of a build on a Dask cluster instead of this machine's processes.

Scheduler and workers are the user's (`dask scheduler`, `dask worker`); this program is installed beside each of
the workers, and all see SOURCE and OUT under the same path. A worker tells where it is in a small file beside its
shard: so much of it survives a kill.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
from distributed import Client, Future, KilledWorker

from pipeline import DataError
from pipeline.shards import shard_name
from pipeline.workers import Crashed, Done, Report

AHEAD = 2  # jobs sent for each thread of the cluster: the scheduler never holds the lists of all images
SECONDS_TO_CONNECT, SECONDS_FOR_WORKERS = 10, 30
MOST_UNBEGUN = 10  # workers that may die, one after the other, before they come to a job that waits there


class Cluster:
    """A connection to the scheduler at `address`; a context manager.

    Raises DataError if nothing answers there, if no worker joins, or if a worker does not see `source` and `out`,
    which is made, or has another OpenCV, which would store other bytes.
    """

    def __init__(self, address: str, source: Path, out: Path) -> None:
        for logger in ("distributed", "distributed.client"):  # what matters is said below
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        try:
            self.client = Client(address, timeout=SECONDS_TO_CONNECT, set_as_default=False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"no Dask scheduler answers at {address} ({str(error).splitlines()[0]}): start `dask scheduler`"
            ) from None
        try:
            self.client.wait_for_workers(1, timeout=SECONDS_FOR_WORKERS)
            self._check(source, out)
        except TimeoutError:
            self.client.close()
            raise DataError(
                f"no worker has joined {address} in {SECONDS_FOR_WORKERS} s: start `dask worker {address}`"
            ) from None
        except BaseException:
            self.client.close()
            raise
        # a lost worker is told at once, and the build decides: by default Dask lets a file kill four
        self._allowed = self.client.run_on_scheduler(_allow_failures, 0)

    def _check(self, source: Path, out: Path) -> None:
        token = out / f".{uuid.uuid4().hex}.tmp"
        try:
            out.mkdir(parents=True, exist_ok=True)
            token.write_text(token.name)
        except OSError as error:
            raise DataError(f"cannot write to {out}: {error.strerror}; name another OUT") from None
        try:
            answers = self.client.run(
                _look_around, str(source), str(token), cv2.__version__, on_error="return"
            )
        finally:
            token.unlink()
        for worker, answer in answers.items():
            if isinstance(answer, Exception):
                answer = f"cannot run this program ({answer}): start it in the environment of `make install`"
            if answer is not None:
                raise DataError(f"the worker {worker} {answer}")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # it may have gone: then nothing is left to be put right
            self.client.run_on_scheduler(_allow_failures, self._allowed)
        self.client.close()

    def pool(self, function: Callable[[Any, Report], Any], _count: int) -> ClusterPool:
        """For `build_split`, in place of WorkerPool."""
        return ClusterPool(self.client, function)


class ClusterPool:
    """Runs `function(job, report)` on the cluster, with the methods and rules of `workers.WorkerPool`.

    A job has a `number` and the folder `partial` that it works in.
    """

    def __init__(self, client: Client, function: Callable[[Any, Report], Any]) -> None:
        self._client, self._function = client, function
        self._pending: deque[tuple[int, Any]] = deque()
        self._sent: dict[int, tuple[Future, Any]] = {}  # number -> its result to be, the job
        self._unbegun: Counter[int] = Counter()  # how often a worker died before it came to the job
        self._finished: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._looked = -1.0
        self._begun: dict[int, int] = {}  # items that each job was seen to have begun
        self._capacity = 0

    def __enter__(self) -> ClusterPool:
        return self

    def __exit__(self, *_: object) -> None:
        for future, job in self._sent.values():
            _place(job).unlink(missing_ok=True)  # running jobs stop when they miss it
            future.release()
        self._sent.clear()

    def submit(self, number: int, job: Any, first: bool = False) -> None:
        """Queue a job under a number of the caller's choice; `first`: before all others."""
        if first:
            self._pending.appendleft((number, job))
        else:
            self._pending.append((number, job))

    def items_begun(self) -> int:
        """Items that the jobs now in work have begun, for a progress bar; looked up once a second."""
        return sum(self._begun.get(number, 0) for number in self._sent)

    def events(self, tick: Callable[[], None]) -> Iterator[tuple[int, Done | Crashed]]:
        """(number, what became of the job) until no job is left; `tick` is called about ten times a second.

        More jobs may be submitted meanwhile, for instance the one that crashed.
        """
        last_tick = 0.0
        while self._pending or self._sent:
            self._look()
            while self._pending and len(self._sent) < self._capacity:
                self._send(*self._pending.popleft())
            try:
                number = self._finished.get(timeout=0.1)
            except queue.Empty:
                pass
            else:
                outcome = self._outcome(number)
                if outcome is not None:
                    yield number, outcome
            if time.monotonic() - last_tick >= 0.1:
                last_tick = time.monotonic()
                tick()

    def _look(self) -> None:
        """Workers come and go; jobs move on."""
        if time.monotonic() - self._looked < 1:
            return
        if self._client.status != "running":
            raise _scheduler_gone()
        try:
            threads = sum(self._client.nthreads().values())
        except OSError:
            raise _scheduler_gone() from None
        self._capacity = AHEAD * max(1, threads)
        self._begun = {number: max(0, _position(job) or 0) for number, (_, job) in self._sent.items()}
        self._looked = time.monotonic()

    def _send(self, number: int, job: Any) -> None:
        _place(job).write_bytes(b"")
        future = self._client.submit(
            _serve, self._function, job, cv2.__version__,
            key=f"{shard_name(job.number)}-{uuid.uuid4().hex}", pure=False, priority=-number,
        )  # fmt: skip
        self._sent[number] = future, job
        future.add_done_callback(lambda _: self._finished.put(number))

    def _outcome(self, number: int) -> Done | Crashed | None:
        """What became of a job; None if it only waited at a worker that died, and is sent again."""
        future, job = self._sent[number]
        try:
            if future.cancelled() or future.status == "lost":
                raise _scheduler_gone()
            # if the worker dies before it has handed the result over, Dask runs the job again: that finds its note
            kind, value = future.result()
        except KilledWorker:
            position = _position(job)
            self._unbegun[number] += position is None
            if position is not None or self._unbegun[number] % MOST_UNBEGUN == 0:
                return Crashed(-1 if position is None else position)
            self.submit(number, job, first=True)
            return None
        finally:
            del self._sent[number]
            _place(job).unlink(missing_ok=True)
        if kind == "data error":
            raise DataError(value)
        if kind == "exception":
            raise RuntimeError(f"on a worker of the cluster:\n{value}")
        return Done(value)


def _scheduler_gone() -> DataError:
    return DataError("the Dask scheduler has gone: start it again, then continue with --resume")


def _place(job: Any) -> Path:
    """The file in which a worker tells where it is in the job: empty until it begins."""
    return Path(job.partial / "work" / f"{shard_name(job.number)}.at")


def _position(job: Any) -> int | None:
    """The position of the item in work, -1 before the first and after the last, None if the job has not begun."""
    try:
        return int(_place(job).read_bytes())
    except (OSError, ValueError):
        return None


def _allow_failures(count: int, dask_scheduler: Any) -> int:
    """On the scheduler: how many workers a job may take down before that is an error; returns what it was."""
    before, dask_scheduler.allowed_failures = dask_scheduler.allowed_failures, count
    return int(before)


def _look_around(source: str, token: str, opencv: str) -> str | None:
    """On a worker: what is wrong here, if anything."""
    if not os.access(source, os.R_OK):
        return f"cannot read {source}: SOURCE has to be on a file system that all workers share, at the same path"
    try:
        if Path(token).read_text() == Path(token).name and os.access(Path(token).parent, os.W_OK):
            return _other_opencv(opencv)
    except OSError:
        pass
    folder = Path(token).parent
    return (
        f"cannot write to {folder}: OUT has to be on a file system that all workers share, at the same path"
    )


def _other_opencv(wanted: str) -> str | None:
    if cv2.__version__ == wanted:
        return None
    return (
        f"has OpenCV {cv2.__version__}, not {wanted}, and would store other bytes: install the same version"
    )


def _serve(function: Callable[[Any, Report], Any], job: Any, opencv: str) -> tuple[str, Any]:
    """On a worker: one job. Errors travel as text."""
    if wrong := _other_opencv(opencv):  # workers may join at any time
        return "data error", f"a worker that joined later {wrong}"
    place, looked = _place(job), time.monotonic()
    try:
        descriptor = os.open(place, os.O_WRONLY)
    except OSError as error:
        return (
            "data error",
            f"a worker cannot write to {place.parent}: {error.strerror}; continue with --resume",
        )

    def report(position: int) -> None:
        nonlocal looked
        os.pwrite(descriptor, b"%-8d" % position, 0)
        if time.monotonic() - looked > 1:
            looked = time.monotonic()
            if not place.exists():
                raise DataError("stopped: nobody waits for this shard any more")

    try:
        report(-1)
        return "done", function(job, report)
    except DataError as error:
        return "data error", error.message
    except Exception:
        return "exception", traceback.format_exc()
    finally:
        os.close(descriptor)
