"""Runs the shard jobs of a build on a Dask cluster instead of in local processes.

The user starts the scheduler and the workers (`dask scheduler`, `dask worker`) in environments that have this
program installed. All machines see SOURCE and OUT under the same paths. Each worker writes its position to a small
file next to its shard, so that the position is known after the worker was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import logging
import os
import queue
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import dask
import google.protobuf
import lmdb
import numpy as np
import PIL
from distributed import Client, Future, KilledWorker, Security, get_worker
from distributed.comm.addressing import parse_host_port
from distributed.core import connect

from base.errors import DataError, UserError
from pipeline.build.workers import MAX_SECONDS_PER_ITEM, Crashed, Done, JobQueue, Report
from pipeline.shards import FORMAT_VERSION, shard_name

JOBS_PER_THREAD = 2  # sent ahead of time; few, so that the scheduler does not hold the lists of all images
SECONDS_TO_CONNECT, SECONDS_FOR_WORKERS = 10, 30
SECONDS_WITHOUT_WORKERS = 10  # before a message; a restarted worker needs a few
MAX_DEATHS_BEFORE_START = 10  # workers that may die while they hold a job which they have not started


class Cluster:
    """A connection to the scheduler at `address`; a context manager.

    Creates `out`. Raises DataError if no scheduler answers, if no worker joins, or if a worker has several threads,
    cannot see `source` or `out` or the locks there, or has other versions of the packages that determine the bytes.
    """

    def __init__(self, address: str, source: Path, out: Path) -> None:
        self._address = address
        if is_exposed(address):
            print(
                f"warning: {address} is neither this machine nor tls://: anyone who can reach that port can run "
                "code on the scheduler, on the workers and here; see docs/security.md",
                file=sys.stderr,
            )
        # Errors are reported below; tornado's log has one of Ctrl-C before a question to the scheduler is sent.
        for logger in ("distributed", "distributed.client", "tornado.application"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        try:
            # Client hangs if the port is open but silent, and logs a long error if it is closed: ask first.
            asyncio.run(asyncio.wait_for(_ask(address), SECONDS_TO_CONNECT))
            self.client = Client(address, timeout=SECONDS_TO_CONNECT, set_as_default=False)
        except Exception as error:
            why = (
                f"not within {SECONDS_TO_CONNECT} s"
                if isinstance(error, TimeoutError)
                else _first_line(error)
            )
            raise DataError(
                f"no Dask scheduler answers at {address} ({why}): start `dask scheduler`"
            ) from None
        try:
            self.client.wait_for_workers(1, timeout=SECONDS_FOR_WORKERS)
            self._check(source, out)
            # Report a dead worker at once, and let the build decide. By default Dask retries a job on three more.
            self.client.run_on_scheduler(_allow_failures, 0)
        except TimeoutError:
            self.client.close()
            raise DataError(
                f"no worker joined {address} within {SECONDS_FOR_WORKERS} s: "
                f"start `dask worker {address} --nthreads 1`"
            ) from None
        except OSError:
            self.client.close()
            raise _scheduler_gone() from None
        except BaseException:
            self.client.close()
            raise

    def _check(self, source: Path, out: Path) -> None:
        _refuse_threads(self.client.nthreads())
        token = out / f".{uuid.uuid4().hex}.tmp"
        try:
            out.mkdir(parents=True, exist_ok=True)
            token.write_text(token.name)
        except OSError as error:
            raise DataError(f"cannot write to {out}: {error.strerror}; give another OUT") from None
        try:
            with token.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise DataError(_NO_LOCKS.format("this machine", out, error.strerror)) from None
                answers = self.client.run(
                    _check_worker, str(source), str(token), _versions(), on_error="return"
                )
        finally:
            token.unlink()
        for worker, answer in answers.items():
            if isinstance(answer, Exception):
                why = _first_line(answer)
                answer = f"cannot run this program ({why}): start it in the environment of `make install`"
            if answer is not None:
                raise DataError(f"the worker {worker} {answer}")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # the scheduler may be gone; then there is nothing to restore
            self.client.run_on_scheduler(_allow_failures, None)
        self.client.close()

    def pool(self, function: Callable[[Any, Report], Any], _count: int) -> ClusterPool:
        """A pool for `build_split`, in place of WorkerPool."""
        return ClusterPool(self.client, function, self._address)


@dataclass(frozen=True)
class _Sent:
    """A job that was sent to the scheduler. The worker writes its position in the job to `position_file`."""

    future: Future
    job: Any
    position_file: Path


class ClusterPool(JobQueue):
    """Runs `function(job, report)` on the cluster; has the interface and the rules of `workers.WorkerPool`.

    Jobs have the attributes `number` and `partial`, the folder that they work in.
    """

    def __init__(self, client: Client, function: Callable[[Any, Report], Any], address: str) -> None:
        super().__init__()
        self._client, self._function, self._address = client, function, address
        self._sent: dict[int, _Sent] = {}
        # for each job, the number of workers that died before starting it
        self._deaths_before_start: Counter[int] = Counter()
        self._finished: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._last_update = -1.0
        # when a worker was last seen; None after the message that none is left
        self._last_worker: float | None = time.monotonic()
        self._started: dict[int, int] = {}  # items that each job had started at the last update
        self._capacity = 0

    def __enter__(self) -> ClusterPool:
        return self

    def __exit__(self, *_: object) -> None:
        for sent in self._sent.values():
            sent.position_file.unlink(missing_ok=True)  # running jobs stop when this file is gone
            sent.future.release()
        self._sent.clear()

    def items_started(self) -> int:
        """Items that the running jobs have started, for a progress bar; updated once a second."""
        return sum(self._started.get(number, 0) for number in self._sent)

    def events(self, tick: Callable[[], None]) -> Iterator[tuple[int, Done | Crashed]]:
        """Yield (number, result or crash) of each job until none is left; call `tick` about ten times a second.

        The caller can submit jobs in the meantime, such as the one that crashed.
        """
        last_tick = 0.0
        while self._pending or self._sent:
            self._update()
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

    def _update(self) -> None:
        """Once a second: count the workers and read the positions of the jobs."""
        if time.monotonic() - self._last_update < 1:
            return
        if self._client.status != "running":
            raise _scheduler_gone()
        try:
            threads = self._client.nthreads()
        except OSError:
            raise _scheduler_gone() from None
        _refuse_threads(threads)
        self._capacity = JOBS_PER_THREAD * max(1, len(threads))
        self._started = {
            number: max(0, (_read_position(sent.position_file) or (0,))[0])
            for number, sent in self._sent.items()
        }
        self._last_update = time.monotonic()
        if threads:
            self._last_worker = self._last_update
        elif self._last_worker and self._last_update - self._last_worker > SECONDS_WITHOUT_WORKERS:
            self._last_worker = None
            start = f"start `dask worker {self._address} --nthreads 1`"
            print(f"\nno worker is left, and the build waits for one: {start}", file=sys.stderr, flush=True)

    def _send(self, number: int, job: Any) -> None:
        # A unique name, so that an abandoned job that still runs does not mistake the next job's file for its own.
        name = f"{shard_name(job.number)}.{uuid.uuid4().hex}"
        position_file = Path(job.partial / "work" / f"{name}.at")
        position_file.write_bytes(b"")
        future = self._client.submit(
            _serve, self._function, job, position_file, _versions(), key=name, pure=False, priority=-number
        )
        self._sent[number] = _Sent(future, job, position_file)
        future.add_done_callback(lambda _: self._finished.put(number))

    def _outcome(self, number: int) -> Done | Crashed | None:
        """The result of a job, or the crash; None if its worker died before starting it, and it is sent again."""
        sent = self._sent[number]
        try:
            if sent.future.cancelled() or sent.future.status == "lost":
                raise _scheduler_gone()
            # If the worker dies before it returns the result, Dask runs the job again; that run finds the note.
            kind, value = sent.future.result()
        except KilledWorker:
            position = _read_position(sent.position_file)
            self._deaths_before_start[number] += position is None
            if position is not None or self._deaths_before_start[number] % MAX_DEATHS_BEFORE_START == 0:
                return Crashed(*(position or (-1, False)))
            self.submit(number, sent.job, first=True)
            return None
        except DataError:
            raise
        except (Exception, asyncio.CancelledError) as error:  # the job or its result could not be transferred
            raise DataError(
                f"the cluster failed at {shard_name(sent.job.number)} ({_first_line(error)}): "
                "check the workers' messages, then continue with --resume"
            ) from None
        finally:
            del self._sent[number]
            sent.position_file.unlink(missing_ok=True)
        if kind == "user error":
            raise DataError(value)
        if kind == "exception":
            raise RuntimeError(f"on a cluster worker:\n{value}")
        return Done(value)


def is_exposed(address: str) -> bool:
    """Whether other machines can connect to the scheduler without a certificate. Dask has no passwords."""
    scheme, _, location = address.rpartition("://")
    if scheme in ("tls", "wss", "inproc"):
        return False
    try:
        host, _ = parse_host_port(location, 0)
        return not (host == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return True


def _scheduler_gone() -> DataError:
    return DataError("the Dask scheduler is gone: start it again, then continue with --resume")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


async def _ask(address: str) -> None:
    """Raise an error unless a scheduler answers at `address`."""
    security = Security().get_connection_args("client")
    comm = await connect(address, timeout=SECONDS_TO_CONNECT, **security)
    try:
        await comm.write({"op": "identity", "n_workers": 0, "reply": True})
        answer = await comm.read()
    finally:
        comm.abort()
    if not isinstance(answer, dict) or answer.get("type") != "Scheduler":
        raise ValueError("another program does")


def _refuse_threads(threads: Mapping[str, int]) -> None:
    """Raise DataError if a worker has several threads: when it dies, only one of its files is the cause."""
    for worker, count in threads.items():
        if count > 1:
            raise DataError(f"the worker {worker} {_SEVERAL_THREADS.format(count)}")


_SEVERAL_THREADS = "has {} threads: start it with `--nthreads 1`, and one worker per core with `--nworkers`"
_NO_LOCKS = "{} cannot lock files in {} ({}): use a file system that has locks between machines"


def _read_position(path: Path) -> tuple[int, bool] | None:
    """Return (position of the current item, whether it took too long); None if the job has not started.

    The position is -1 before the first item and after the last.
    """
    try:
        position, *too_long = path.read_bytes().split()
        return int(position), bool(too_long)
    except (OSError, ValueError):
        return None


def _allow_failures(count: int | None, dask_scheduler: Any) -> None:
    """Set how many workers a job may kill before Dask reports it; None: the configured value.

    Runs on the scheduler. The previous value is not restored, because a killed build may have left its own there.
    """
    configured = dask.config.get("distributed.scheduler.allowed-failures")
    dask_scheduler.allowed_failures = configured if count is None else count


def _versions() -> dict[str, str]:
    """Versions of all packages that determine the bytes of a data set."""
    try:
        program = metadata.version("alexnet-dali")
    except metadata.PackageNotFoundError:
        program = "unknown"
    return {
        "alexnet-dali": f"{program}, format {FORMAT_VERSION}",
        "OpenCV": cv2.__version__,
        "LMDB": f"{lmdb.__version__}, library {'.'.join(map(str, lmdb.version()))}",
        "NumPy": np.__version__,
        "Pillow": PIL.__version__,
        "protobuf": google.protobuf.__version__,
    }


def _check_worker(source: str, token: str, versions: Mapping[str, str]) -> str | None:
    """What makes this worker unusable, or None. Runs on a worker, while the caller locks the file `token`."""
    if not os.access(source, os.R_OK):
        return (
            f"cannot read {source}: SOURCE must be on a file system that all workers share, at the same path"
        )
    folder = Path(token).parent
    try:
        with Path(token).open("r+b") as file:
            seen = file.read().decode() == Path(token).name and os.access(folder, os.W_OK)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                no_locks = None
            except OSError as error:
                no_locks = str(error.strerror)
            else:
                no_locks = "it does not see the lock of another machine"
    except OSError:
        seen = False
    if not seen:
        return (
            f"cannot write to {folder}: OUT must be on a file system that all workers share, at the same path"
        )
    if no_locks:
        return _NO_LOCKS.format("there", folder, no_locks).removeprefix("there ")
    return _other_version(versions)


def _other_version(wanted: Mapping[str, str]) -> str | None:
    for name, version in _versions().items():
        if version != wanted.get(name):
            return (
                f"has {name} {version} instead of {wanted.get(name)} and would store other bytes: "
                "install the same versions"
            )
    return None


class _PositionFile:
    """On a worker: writes the job's position to a file, and ends the process if an item takes too long.

    The limit is that of `workers.WorkerPool`, on the processor time of the thread that creates this object.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY)
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._item = (-1, 0.0)  # position of the current item, and the time when it started
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._watch_thread = threading.Thread(target=self._watch, daemon=True)
        self._watch_thread.start()

    def report(self, position: int) -> None:
        """Called by the job. Raises DataError if the file is gone, which means that the job was abandoned."""
        with self._lock:
            self._item = position, time.clock_gettime(self._clock)
            os.pwrite(self._descriptor, b"%-8d" % position, 0)
        try:
            os.close(os.open(self._path, os.O_RDONLY))  # opening bypasses the cache of a network file system
        except FileNotFoundError:
            raise DataError("stopped: the build that needed this shard has ended") from None

    def close(self) -> None:
        self._over.set()
        self._watch_thread.join()  # it reads the clock of this thread, which may end now
        os.close(self._descriptor)

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            with self._lock:
                position, started = self._item
                if position >= 0 and time.clock_gettime(self._clock) - started > MAX_SECONDS_PER_ITEM:
                    os.pwrite(self._descriptor, b"%-8d too long" % position, 0)
                    os._exit(1)


def _serve(
    function: Callable[[Any, Report], Any], job: Any, path: Path, versions: Mapping[str, str]
) -> tuple[str, Any]:
    """Run one job on a worker. Errors are returned as text."""
    wrong = _other_version(versions)  # workers can join at any time
    threads = get_worker().state.nthreads
    if threads > 1:
        wrong = _SEVERAL_THREADS.format(threads)
    if wrong:
        return "user error", f"a worker that joined later {wrong}"
    try:
        position_file = _PositionFile(path)
    except OSError as error:
        return (
            "user error",
            f"a worker cannot write to {path.parent}: {error.strerror}; continue with --resume",
        )
    try:
        position_file.report(-1)
        return "done", function(job, position_file.report)
    except UserError as error:
        return "user error", error.message
    except Exception:
        return "exception", traceback.format_exc()
    finally:
        position_file.close()
