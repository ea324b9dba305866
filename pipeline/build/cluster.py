"""The shard jobs of a build on a Dask cluster instead of this machine's processes.

Scheduler and workers are the user's (`dask scheduler`, `dask worker`); this program is installed beside each of
the workers, and all see SOURCE and OUT under the same path. A worker tells where it is in a small file beside its
shard: so much of it survives a kill.
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

from base.errors import DataError
from pipeline.build.workers import SECONDS_AN_ITEM, Crashed, Done, JobQueue, Report
from pipeline.shards import FORMAT_VERSION, shard_name

AHEAD = 2  # jobs sent for each thread of the cluster: the scheduler never holds the lists of all images
SECONDS_TO_CONNECT, SECONDS_FOR_WORKERS = 10, 30
SECONDS_WITHOUT_WORKERS = 10  # then a message says so; a worker that is started again takes a few
MOST_UNBEGUN = 10  # workers that may die, one after the other, before they come to a job that waits there


class Cluster:
    """A connection to the scheduler at `address`; a context manager.

    Raises DataError if nothing answers there, if no worker joins, or if a worker has several threads, does not see
    `source` and `out`, which is made, or locks there, or has another version of what decides the bytes.
    """

    def __init__(self, address: str, source: Path, out: Path) -> None:
        self._address = address
        if is_exposed(address):
            print(
                f"warning: {address} is neither this machine nor tls://: whoever reaches that port can run code on "
                "the scheduler, the workers and here; see docs/security.md",
                file=sys.stderr,
            )
        for logger in ("distributed", "distributed.client"):  # what matters is printed below
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        try:
            # the client waits for ever where a port is open and silent, and complains where there is none
            asyncio.run(asyncio.wait_for(_ask(address), SECONDS_TO_CONNECT))
            self.client = Client(address, timeout=SECONDS_TO_CONNECT, set_as_default=False)
        except Exception as error:
            why = f"not in {SECONDS_TO_CONNECT} s" if isinstance(error, TimeoutError) else _first_line(error)
            raise DataError(
                f"no Dask scheduler answers at {address} ({why}): start `dask scheduler`"
            ) from None
        try:
            self.client.wait_for_workers(1, timeout=SECONDS_FOR_WORKERS)
            self._check(source, out)
            # a lost worker is reported at once, and the build decides: by default Dask lets a file kill four
            self.client.run_on_scheduler(_allow_failures, 0)
        except TimeoutError:
            self.client.close()
            raise DataError(
                f"no worker has joined {address} in {SECONDS_FOR_WORKERS} s: "
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
            raise DataError(f"cannot write to {out}: {error.strerror}; name another OUT") from None
        try:
            with token.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise DataError(_NO_LOCKS.format("this machine", out, error.strerror)) from None
                answers = self.client.run(
                    _look_around, str(source), str(token), _versions(), on_error="return"
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
        with contextlib.suppress(Exception):  # it may have gone: then nothing is left to be put right
            self.client.run_on_scheduler(_allow_failures, None)
        self.client.close()

    def pool(self, function: Callable[[Any, Report], Any], _count: int) -> ClusterPool:
        """For `build_split`, in place of WorkerPool."""
        return ClusterPool(self.client, function, self._address)


@dataclass(frozen=True)
class _Sent:
    """A job that is with the scheduler. `place`: the file in which a worker tells where it is in it."""

    future: Future
    job: Any
    place: Path


class ClusterPool(JobQueue):
    """Runs `function(job, report)` on the cluster, with the methods and rules of `workers.WorkerPool`.

    A job has a `number` and the folder `partial` that it works in.
    """

    def __init__(self, client: Client, function: Callable[[Any, Report], Any], address: str) -> None:
        super().__init__()
        self._client, self._function, self._address = client, function, address
        self._sent: dict[int, _Sent] = {}
        self._unbegun: Counter[int] = Counter()  # how often a worker died before it came to the job
        self._finished: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._looked = -1.0
        self._last_worker: float | None = (
            time.monotonic()
        )  # when one was seen; None: a message has said that none is left
        self._begun: dict[int, int] = {}  # items that each job was seen to have begun
        self._capacity = 0

    def __enter__(self) -> ClusterPool:
        return self

    def __exit__(self, *_: object) -> None:
        for sent in self._sent.values():
            sent.place.unlink(missing_ok=True)  # running jobs stop when they miss it
            sent.future.release()
        self._sent.clear()

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
            threads = self._client.nthreads()
        except OSError:
            raise _scheduler_gone() from None
        _refuse_threads(threads)
        self._capacity = AHEAD * max(1, len(threads))
        self._begun = {number: max(0, (_read(sent.place) or (0,))[0]) for number, sent in self._sent.items()}
        self._looked = time.monotonic()
        if threads:
            self._last_worker = self._looked
        elif self._last_worker and self._looked - self._last_worker > SECONDS_WITHOUT_WORKERS:
            self._last_worker = None
            start = f"start `dask worker {self._address} --nthreads 1`"
            print(f"\nno worker is left, the build waits for one: {start}", file=sys.stderr, flush=True)

    def _send(self, number: int, job: Any) -> None:
        # a new name each time: a job that still runs after it was given up must not take the next one's for its own
        name = f"{shard_name(job.number)}.{uuid.uuid4().hex}"
        place = Path(job.partial / "work" / f"{name}.at")
        place.write_bytes(b"")
        future = self._client.submit(
            _serve, self._function, job, place, _versions(), key=name, pure=False, priority=-number
        )
        self._sent[number] = _Sent(future, job, place)
        future.add_done_callback(lambda _: self._finished.put(number))

    def _outcome(self, number: int) -> Done | Crashed | None:
        """What became of a job; None if it only waited at a worker that died, and is sent again."""
        sent = self._sent[number]
        try:
            if sent.future.cancelled() or sent.future.status == "lost":
                raise _scheduler_gone()
            # if the worker dies before it has handed the result over, Dask runs the job again: that finds its note
            kind, value = sent.future.result()
        except KilledWorker:
            at = _read(sent.place)
            self._unbegun[number] += at is None
            if at is not None or self._unbegun[number] % MOST_UNBEGUN == 0:
                return Crashed(*(at or (-1, False)))
            self.submit(number, sent.job, first=True)
            return None
        except DataError:
            raise
        except (
            Exception,
            asyncio.CancelledError,
        ) as error:  # it could not be sent, or its result not be read
            raise DataError(
                f"the cluster failed at {shard_name(sent.job.number)} ({_first_line(error)}): "
                "look at the workers' messages, then continue with --resume"
            ) from None
        finally:
            del self._sent[number]
            sent.place.unlink(missing_ok=True)
        if kind == "data error":
            raise DataError(value)
        if kind == "exception":
            raise RuntimeError(f"on a worker of the cluster:\n{value}")
        return Done(value)


def is_exposed(address: str) -> bool:
    """Whether other machines may reach the scheduler without a certificate: Dask asks for no password."""
    scheme, _, location = address.rpartition("://")
    if scheme in ("tls", "wss", "inproc"):
        return False
    try:
        host, _ = parse_host_port(location, 0)
        return not (host == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return True


def _scheduler_gone() -> DataError:
    return DataError("the Dask scheduler has gone: start it again, then continue with --resume")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


async def _ask(address: str) -> None:
    """Raises unless a scheduler answers at `address`."""
    security = Security().get_connection_args("client")
    comm = await connect(address, timeout=SECONDS_TO_CONNECT, **security)
    try:
        await comm.write({"op": "identity", "n_workers": 0, "reply": True})
        answer = await comm.read()
    finally:
        comm.abort()
    if not isinstance(answer, dict) or answer.get("type") != "Scheduler":
        raise ValueError("something else does")


def _refuse_threads(threads: Mapping[str, int]) -> None:
    """DataError if a worker has several: a file that kills the process would be taken for that of each thread."""
    for worker, count in threads.items():
        if count > 1:
            raise DataError(f"the worker {worker} {_SEVERAL_THREADS.format(count)}")


_SEVERAL_THREADS = "has {} threads: start it with `--nthreads 1`, and one worker a core with `--nworkers`"
_NO_LOCKS = "{} cannot lock files in {} ({}): a cluster needs a file system with locks between machines"


def _read(place: Path) -> tuple[int, bool] | None:
    """The position of the item in work, -1 before the first and after the last, and whether that took too long.

    None if the job has not begun.
    """
    try:
        position, *too_long = place.read_bytes().split()
        return int(position), bool(too_long)
    except (OSError, ValueError):
        return None


def _allow_failures(count: int | None, dask_scheduler: Any) -> None:
    """On the scheduler: how many workers a job may take down before that is an error; None: as configured there.

    Not as it was found: a build that was killed leaves its own number behind.
    """
    configured = dask.config.get("distributed.scheduler.allowed-failures")
    dask_scheduler.allowed_failures = configured if count is None else count


def _versions() -> dict[str, str]:
    """Of all that decides the bytes of a data set."""
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


def _look_around(source: str, token: str, versions: Mapping[str, str]) -> str | None:
    """On a worker: what is wrong here, if anything. The caller holds the lock of the file `token`."""
    if not os.access(source, os.R_OK):
        return f"cannot read {source}: SOURCE has to be on a file system that all workers share, at the same path"
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
                no_locks = "the lock of another machine is not seen"
    except OSError:
        seen = False
    if not seen:
        return f"cannot write to {folder}: OUT has to be on a file system that all workers share, at the same path"
    if no_locks:
        return _NO_LOCKS.format("there", folder, no_locks).removeprefix("there ")
    return _other_version(versions)


def _other_version(wanted: Mapping[str, str]) -> str | None:
    for name, version in _versions().items():
        if version != wanted.get(name):
            return (
                f"has {name} {version}, not {wanted.get(name)}, and would store other bytes: "
                "install the same versions"
            )
    return None


class _Place:
    """On a worker: tells in the file `path` where the job is, and ends the process at an item that takes too long.

    The same rule as `workers.WorkerPool._kill_what_hangs`; the time is what the thread that made it has computed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY)
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._item = (-1, 0.0)  # in work, and the time when it began
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._watch_thread = threading.Thread(target=self._watch, daemon=True)
        self._watch_thread.start()

    def report(self, position: int) -> None:
        """For the job: DataError when the file is gone, that is, when nobody waits for the result any more."""
        with self._lock:
            self._item = position, time.clock_gettime(self._clock)
            os.pwrite(self._descriptor, b"%-8d" % position, 0)
        try:
            os.close(os.open(self._path, os.O_RDONLY))  # network file systems look anew at what is opened
        except FileNotFoundError:
            raise DataError("stopped: nobody waits for this shard any more") from None

    def close(self) -> None:
        self._over.set()
        self._watch_thread.join()  # the clock goes with the thread
        os.close(self._descriptor)

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            with self._lock:
                position, began = self._item
                if position >= 0 and time.clock_gettime(self._clock) - began > SECONDS_AN_ITEM:
                    os.pwrite(self._descriptor, b"%-8d too long" % position, 0)
                    os._exit(1)


def _serve(
    function: Callable[[Any, Report], Any], job: Any, path: Path, versions: Mapping[str, str]
) -> tuple[str, Any]:
    """On a worker: one job. Errors travel as text."""
    wrong = _other_version(versions)  # workers may join at any time
    threads = get_worker().state.nthreads
    if threads > 1:
        wrong = _SEVERAL_THREADS.format(threads)
    if wrong:
        return "data error", f"a worker that joined later {wrong}"
    try:
        place = _Place(path)
    except OSError as error:
        return (
            "data error",
            f"a worker cannot write to {path.parent}: {error.strerror}; continue with --resume",
        )
    try:
        place.report(-1)
        return "done", function(job, place.report)
    except DataError as error:
        return "data error", error.message
    except Exception:
        return "exception", traceback.format_exc()
    finally:
        place.close()
