"""Jobs: the runs of train.py in an ablation, several at a time, and their results."""

from __future__ import annotations

import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from base.errors import ModelError
from base.machine import STOP_SIGNALS, cpu_threads
from model.training.config import Config, checkpoint_paths
from model.training.log import epochs_of, read_log
from tools.lib.cli import write_text
from train import EXIT_INTERRUPTED
from train import main as train_command

ROOT = Path(__file__).parents[2]
# options of train.py that change how a job is computed, but not its result
RUNTIME_OPTIONS = {f.name for f in fields(Config) if f.metadata["group"] in ("Speed", "Run")}


@dataclass
class Race:
    """Runs that compete for the fewest epochs to `target`, a training error. One that cannot win any more stops."""

    target: float
    best: float  # epochs of the fastest run so far; before that, the most that a run may take


@dataclass
class Job:
    """One run of train.py: its folder, its options and when it may stop."""

    name: str
    seed: int
    out: Path
    arguments: list[str]
    race: Race | None = None
    train_split: Path | None = None  # the data set whose training split is evaluated at the end
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def reached(self) -> float | None:
        """Epochs until the target of the race; None without one, or if it has not been reached."""
        return reaches(epoch_errors(self.out), self.race.target) if self.race else None

    def is_over(self) -> bool:
        """Whether the run has reached its target, or is too slow to win its race."""
        if self.race is None:
            return False
        errors = epoch_errors(self.out)
        return reaches(errors, self.race.target) is not None or len(errors) >= self.race.best

    def finish(self, result: dict[str, Any]) -> None:
        """Keep the result, which other runs of the race compare themselves with."""
        self.result = result
        if self.race and (epochs := self.reached()) is not None:
            # not locked: a lost update only lets a slower run take longer
            self.race.best = min(self.race.best, epochs)


class Workers:
    """Runs `jobs` jobs at a time, each on its own GPU or its own share of the cores.

    Args:
        jobs: number of jobs at the same time.
        gpus: number of GPUs; 0 is the CPU.
        threads: CPU threads of each job; None divides the cores.
        lock: descriptor of the lock on the folder of the ablation. Jobs inherit it, so the folder stays locked
            until they end even if this process is killed.
    """

    def __init__(self, jobs: int, gpus: int, threads: int | None, lock: int) -> None:
        self.jobs, self.gpus, self.lock = jobs, gpus, lock
        self.threads = threads or max(1, cpu_threads() // jobs)
        # RUNTIME_OPTIONS only, so that a machine with other hardware can continue the ablation
        self.options = ["--no-progress", "--no-tensorboard", "--keep", "1"]
        if gpus:
            self.options += ["--decoder", "mixed"]  # every job sees the same pixels
        else:
            self.options += ["--workers", "0", "--decode-threads", str(self.threads)]
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(jobs):
            self.slots.put(slot)
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopping = threading.Event()

    def __enter__(self) -> Workers:
        """SIGINT, SIGTERM and SIGHUP stop the jobs inside the `with` block, unless ignored before (nohup)."""
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.handlers = {number: signal.signal(number, lambda *_: self.stop()) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def stop(self) -> None:
        """Ask every running job to save and exit."""
        self.stopping.set()
        for process in list(self.processes):
            process.terminate()

    def work(self, jobs: list[Job], title: str) -> None:
        """Fill in the result of each job, and run those without one. Raises Exit if a signal stopped them."""
        for job in jobs:
            job.finish(finished(job))
        waiting = [job for job in jobs if not job.result]
        with (
            ThreadPoolExecutor(self.jobs) as pool,
            tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc=title, unit="run") as bar,
        ):
            futures = [pool.submit(self._run, job) for job in waiting]
            while not all(future.done() for future in futures):
                time.sleep(0.2)  # Python handles signals in this, the main thread
                if done := sum(bool(job.result) for job in jobs) - bar.n:
                    bar.update(done)
        self.check_stopped()
        for future in futures:
            future.result()

    def check_stopped(self) -> None:
        """Raises Exit if a signal arrived."""
        if self.stopping.is_set():
            click.echo(
                "stopped by a signal; the runs have saved: run the same command again to continue", err=True
            )
            raise click.exceptions.Exit(EXIT_INTERRUPTED)

    def _run(self, job: Job) -> None:
        if self.stopping.is_set():
            return
        slot = self.slots.get()
        try:
            arguments = [*self.options, *job.arguments, "--out", str(job.out), "--seed", str(job.seed)]
            if checkpoint_paths(job.out):
                arguments.append("--resume")
            else:
                write_text(job.out / "arguments.json", json.dumps(job.arguments) + "\n")
            code, error = (0, "") if job.is_over() else self.call("train.py", arguments, slot, job)
            over = job.is_over()
            if self.stopping.is_set() and not over:
                return
            if code == 0 or over:
                job.finish({"arguments": job.arguments, **measured(job)})
                if job.train_split and not self._evaluate_train(job, slot):
                    return
                if job.race is None or job.reached() is not None:  # others may go on in a later call
                    write_text(job.out / "result.json", json.dumps(job.result, indent=1) + "\n")
            else:
                # not written, so that the next call tries again
                job.result = {"failed": error or f"exit code {code}"}
        finally:
            self.slots.put(slot)

    def _evaluate_train(self, job: Job, slot: int) -> bool:
        """Add the final network's training accuracy (centre crops) to the result; False on failure."""
        path = job.out / "train-split.json"
        newest = checkpoint_paths(job.out)[0]
        arguments = [str(newest), "--data", str(job.train_split), "--split", "train", "--json", str(path)]
        code, error = self.call("tools/evaluate.py", [*arguments, "--no-progress", "--workers", "0"], slot)
        if code == 0:
            job.result["train_top1"] = json.loads(path.read_text())["top1"]
        elif not self.stopping.is_set():
            job.result = {"failed": error}
        return code == 0

    def call(self, script: str, arguments: list[str], slot: int, job: Job | None = None) -> tuple[int, str]:
        """Run a command; returns its exit code and its last line on stderr. Stops a job whose race is over."""
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = visible_gpu(slot % self.gpus)
        else:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        command = [sys.executable, str(ROOT / script), *arguments, "--gpus", "1" if self.gpus else "0"]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process only, which forwards it once
            pass_fds=[self.lock],
        )
        self.processes.add(process)
        if self.stopping.is_set():
            process.terminate()
        try:
            stopped = False
            while True:
                try:
                    _, errors = process.communicate(timeout=1 if job and job.race else None)
                    break
                except subprocess.TimeoutExpired:
                    if job and not stopped and job.is_over():
                        process.terminate()
                        stopped = True
        finally:
            self.processes.discard(process)
        lines = [line for line in errors.splitlines() if line.strip()]
        return process.returncode, (lines or [""])[-1].removeprefix("Error: ")


def visible_gpu(index: int) -> str:
    """The value of CUDA_VISIBLE_DEVICES for the index-th GPU that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def finished(job: Job) -> dict[str, Any]:
    """The result of a finished job, else {}; raises ModelError if its folder holds a run with other options."""
    result = read_json(job.out / "result.json") or {}
    original = result.get("arguments")
    if not result and checkpoint_paths(job.out):  # --resume would continue with its original options
        original = read_json(job.out / "arguments.json")
    # races may go on for more epochs
    ignored = RUNTIME_OPTIONS | ({"epochs"} if job.race else set())
    if original not in (None, job.arguments) and training_options(original, ignored) != training_options(
        job.arguments, ignored
    ):
        raise ModelError(
            f"{job.out} holds a run with other options ({shlex.join(original)}): give another --out"
        )
    if job.train_split and "train_top1" not in result:
        return {}  # the claim of an earlier call did not need it: only the evaluation is left
    return result


def training_options(arguments: list[str], ignored: Collection[str]) -> dict[str, Any]:
    """The parsed options of train.py except those `ignored`; raises UsageError as train.py does."""
    with train_command.make_context("train.py", list(arguments)) as context:
        options = {name: value for name, value in context.params.items() if name not in ignored}
    return {**options, "data": options["data"].resolve()}


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it is missing or incomplete."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def measured(job: Job) -> dict[str, Any]:
    """A job's validation curves and training errors, one entry per epoch, and the steps until it began to learn."""
    log = read_log(job.out, strict=False)
    validations = [entry for entry in log if entry["kind"] == "val"]
    return {
        "epochs": len(validations),
        "steps": max(entry["step"] for entry in log),
        **{key: [entry[key] for entry in validations] for key in ("top1", "top5", "loss")},
        "train_errors": epoch_errors(job.out),
        "steps_to_learn": steps_to_learn(log),
    }


def epoch_errors(out: Path) -> list[float]:
    """The running training error (train.py --train-error) of each complete epoch."""
    return [row["error"] for row in epochs_of(read_log(out, strict=False)) if row["error"] is not None]


def steps_to_learn(log: list[dict[str, Any]]) -> int | None:
    """Steps until the loss of every later log line is below 0.95 of the entropy of the labels; None if never.

    The entropy is that of the first epoch's labels. A log line has the mean loss over --log-every steps.
    """
    from model.training.watch import SHARE

    windows = [entry for entry in log if entry["kind"] == "train" and "guess" in entry]
    first = [entry for entry in windows if entry["epoch"] == windows[0]["epoch"]]
    learnt = None
    for entry in reversed(windows):
        if entry["loss"] >= SHARE * first[-1]["guess"]:
            break
        learnt = entry["step"]
    return learnt


def reaches(errors: list[float], target: float) -> float | None:
    """Epochs until the running training error falls to `target`, interpolated linearly; None if it never does."""
    for epoch, error in enumerate(errors, 1):
        if error <= target:
            if epoch == 1:
                return 1.0
            before = errors[epoch - 2]
            return epoch - 1 + (before - target) / (before - error)
    return None
