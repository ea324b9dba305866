"""The paper's claims, one switch each: python tools/ablate.py DATA --claims lrn,pool -- options of train.py.

Each run is an ordinary `train.py` run in OUT/NAME/seed-S. What is finished is not run again, what was stopped goes
on with --resume, so the same command picks up where it was.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import click
from matplotlib.figure import Figure
from tqdm import tqdm

from base.errors import ModelError
from base.machine import cpu_threads
from model.alexnet import ACTIVATIONS
from model.parallel.ranks import count_gpus
from model.training.checkpoint import Checkpoints
from pipeline.shards import MANIFEST, ShardReader
from tools.common import CONTEXT, option, write_text
from tools.pictures import COLORS, new_figure, save
from train import EXIT_INTERRUPTED
from train import main as train_command

ROOT = Path(__file__).parent.parent
BASELINE = "baseline"
TARGET = 0.25  # figure 1: the training error that both networks have to reach
# options of train.py that say how a run is computed, not what
HOW = {
    "gpus",
    "workers",
    "decode_threads",
    "keep",
    "save_every",
    "log_every",
    "tensorboard",
    "wandb",
    "progress",
}


@dataclass(frozen=True)
class Claim:
    """One claim: the runs that are set beside the baseline, and what the paper says (error rates in points).

    runs: name -> options of train.py. train: the paper's point is what happens on the training set.
    """

    says: str
    runs: dict[str, list[str]]
    paper: str
    train: bool = False


CLAIMS = {
    "activation": Claim(
        "ReLU (3.1)",
        {"tanh": ["--activation", "tanh"], "sigmoid": ["--activation", "sigmoid"]},
        "several times slower (figure 1)",
    ),
    "groups": Claim(
        "two towers (3.2)", {"groups-1": ["--groups", "1"]}, "+1.7 / +1.2, but of half as many kernels"
    ),
    "lrn": Claim("response normalisation (3.3)", {"no-lrn": ["--no-lrn"]}, "+1.4 / +1.2"),
    "pool": Claim("overlapping pooling (3.4)", {"pool-2-2": ["--pool", "2,2"]}, "+0.4 / +0.3"),
    "augment": Claim(
        "crops and flips (4.1)",
        {f"augment-{how}": ["--augment", how] for how in ("none", "flip", "crop")},
        "substantial overfitting",
        train=True,
    ),
    "color": Claim("PCA colour (4.1)", {"color-0": ["--color-std", "0"]}, "more than +1 (top-1)"),
    "dropout": Claim(
        "dropout (4.2)",
        {"dropout-0": ["--dropout", "0"]},
        "substantial overfitting, half the steps",
        train=True,
    ),
    "depth": Claim(
        "depth (1, 7)",
        {f"without-conv{n}": ["--drop-layer", f"conv{n}"] for n in (3, 4)},
        "about +2 (top-1)",
    ),
    "weight-decay": Claim(
        "weight decay lowers the training error (5)",
        {"weight-decay-0": ["--weight-decay", "0"]},
        "higher training error",
        train=True,
    ),
    "mean": Claim(
        "mean image (2)", {f"mean-{mode}": ["--mean", mode] for mode in ("channel", "none")}, "no figure"
    ),
    "recipes": Claim(
        "recipes/*.json",
        {f"recipe-{name}": ["--recipe", name] for name in ("owt", "bn-large-batch", "modern")},
        "not in the paper",
    ),
}
EVALUATED = ("crops", "ensemble")  # claims about the baseline's own networks: no run of their own


@dataclass
class Run:
    """One run of train.py: where, with which options, and when it may stop."""

    name: str
    seed: int
    out: Path
    arguments: list[str]
    target: float | None = None  # stop as soon as an epoch's training error is no higher
    train_split: Path | None = None  # evaluate on it at the end
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"


class Workers:
    """Runs train.py's runs, `jobs` at a time, each on its own GPU or its own share of the cores."""

    def __init__(self, jobs: int, gpus: int, threads: int | None, lock: IO[str]) -> None:
        self.jobs, self.gpus, self.lock = jobs, gpus, lock
        self.threads = threads or max(1, cpu_threads() // jobs)
        # how a run is computed, not what: another machine may go on with it
        self.options = ["--no-progress", "--no-tensorboard", "--keep", "1"]
        if not gpus:
            self.options += ["--workers", "0", "--decode-threads", str(self.threads)]
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(jobs):
            self.slots.put(slot)
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopping = threading.Event()

    def __enter__(self) -> Workers:
        """From here on SIGINT and SIGTERM stop the runs."""
        signals = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {number: signal.signal(number, lambda *_: self.stop()) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def stop(self) -> None:
        """Every run saves and ends."""
        self.stopping.set()
        for process in list(self.processes):
            process.terminate()

    def work(self, runs: list[Run], said: str) -> None:
        """All runs' results; those that are there already are only read. Raises Exit when stopped by a signal."""
        for run in runs:
            run.result = finished(run)
        waiting = [run for run in runs if not run.result]
        with (
            ThreadPoolExecutor(self.jobs) as pool,
            tqdm(total=len(runs), initial=len(runs) - len(waiting), desc=said, unit="run") as bar,
        ):
            futures = [pool.submit(self._run, run) for run in waiting]
            while not all(future.done() for future in futures):
                time.sleep(0.2)  # signals are handled in this thread
                if done := sum(bool(run.result) for run in runs) - bar.n:
                    bar.update(done)
        self.check_stopped()
        for future in futures:
            future.result()

    def check_stopped(self) -> None:
        """Raises Exit if a signal has come."""
        if self.stopping.is_set():
            click.echo("stopped by a signal, the runs have saved: the same command goes on", err=True)
            raise click.exceptions.Exit(EXIT_INTERRUPTED)

    def _run(self, run: Run) -> None:
        if self.stopping.is_set():
            return
        slot = self.slots.get()
        try:
            arguments = [*self.options, *run.arguments, "--out", str(run.out), "--seed", str(run.seed)]
            if Checkpoints(run.out).paths():
                arguments.append("--resume")
            else:
                write_text(run.out / "arguments.json", json.dumps(run.arguments) + "\n")
            code, error = self.call("train.py", arguments, slot, run)
            reached = reaches(epoch_errors(run.out), run.target)
            if self.stopping.is_set() and not reached:
                return
            if code == 0 or reached:
                run.result = {"arguments": run.arguments, **measured(run)}
                if run.train_split and not self._evaluate_train(run, slot):
                    return
                write_text(run.out / "result.json", json.dumps(run.result, indent=1) + "\n")
            else:
                run.result = {"failed": error or f"exit code {code}"}  # not written: tried again next time
        finally:
            self.slots.put(slot)

    def _evaluate_train(self, run: Run, slot: int) -> bool:
        """Adds the last weights' accuracy on the training set, centre crops; False when stopped."""
        path = run.out / "train-split.json"
        newest = Checkpoints(run.out).paths()[0]
        arguments = [str(newest), "--data", str(run.train_split), "--split", "train", "--json", str(path)]
        code, error = self.call("tools/evaluate.py", [*arguments, "--no-progress", "--workers", "0"], slot)
        if code == 0:
            run.result["train_top1"] = json.loads(path.read_text())["top1"]
        elif not self.stopping.is_set():
            run.result = {"failed": error}
        return code == 0

    def call(self, script: str, arguments: list[str], slot: int, run: Run | None = None) -> tuple[int, str]:
        """Exit code and last line of complaint. A run with a target is told to save and end once it is there."""
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
            start_new_session=True,  # Ctrl-C comes to this process, which passes it on once
            pass_fds=[self.lock.fileno()],  # whoever trains holds the folder, also if this process is killed
        )
        self.processes.add(process)
        if self.stopping.is_set():
            process.terminate()
        try:
            told = False
            while True:
                try:
                    _, errors = process.communicate(timeout=1 if run and run.target else None)
                    break
                except subprocess.TimeoutExpired:
                    if run and not told and reaches(epoch_errors(run.out), run.target):
                        process.terminate()
                        told = True
        finally:
            self.processes.discard(process)
        lines = [line for line in errors.splitlines() if line.strip()]
        return process.returncode, (lines or [""])[-1].removeprefix("Error: ")


def visible_gpu(index: int) -> str:
    """The name of the index-th GPU that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def finished(run: Run) -> dict[str, Any]:
    """The result of a run that is complete, else {}; raises ModelError if it was, or is, another run."""
    result = read_json(run.out / "result.json") or {}
    began = result.get("arguments")
    if not result and Checkpoints(run.out).paths():  # --resume would go on with the options it began with
        began = read_json(run.out / "arguments.json")
    if began not in (None, run.arguments) and what(began) != what(run.arguments):
        raise ModelError(f"{run.out} was run with other options ({shlex.join(began)}): give another --out")
    if run.train_split and "train_top1" not in result:
        return {}  # finished for a claim that did not need it: nothing is left to train, only to evaluate
    return result


def what(arguments: list[str]) -> dict[str, Any]:
    """All that train.py's arguments say but HOW, however they are spelled; raises UsageError as train.py does."""
    with train_command.make_context("train.py", list(arguments)) as context:
        options = {name: value for name, value in context.params.items() if name not in HOW}
    return {**options, "data": options["data"].resolve()}


def read_json(path: Path) -> Any:
    """What a file holds; None if it is missing or was being written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def log_of(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, without one that is being written."""
    try:
        lines = (out / "log.jsonl").read_text().splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def measured(run: Run) -> dict[str, Any]:
    """Validation curves and training errors of a run, an entry an epoch."""
    log = log_of(run.out)
    validations = [entry for entry in log if entry["kind"] == "val"]
    return {
        "epochs": len(validations),
        "steps": max(entry["step"] for entry in log),
        **{key: [entry[key] for entry in validations] for key in ("top1", "top5", "loss")},
        "train_errors": epoch_errors(run.out),
    }


def epoch_errors(out: Path) -> list[float]:
    """The running training error of every complete epoch (train.py --train-error), each batch before its update."""
    entries = log_of(out)
    errors: list[float] = []
    wrong, first, last = 0.0, 0, 0
    for entry in entries:
        if entry["kind"] == "train" and "error" in entry:
            wrong += entry["error"] * (entry["step"] - last)
            last = entry["step"]
        elif entry["kind"] == "val" and last > first:
            errors.append(wrong / (last - first))
            wrong, first = 0.0, last
    return errors


def reaches(errors: list[float], target: float | None) -> float | None:
    """Epochs until the running training error is down at `target`, between two epochs by a straight line."""
    if target is None:
        return None
    for epoch, error in enumerate(errors, 1):
        if error <= target:
            if epoch == 1:
                return 1.0
            before = errors[epoch - 2]
            return epoch - 1 + (before - target) / (before - error)
    return None


# --- the claims ----------------------------------------------------------------------------------------------


@click.command(context_settings=CONTEXT)
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- TRAIN.PY'S OPTIONS]")
@option("--out", type=click.Path(path_type=Path), default=Path("runs/ablate"), help="All runs and the table.")
@option("--claims", default="all", help=f"Of {', '.join([*CLAIMS, *EVALUATED])}, with commas between.")
@option("--only", default="", help="Of the claims' runs, only these (names as in the table, commas between).")
@option("--seeds", type=click.IntRange(1), default=3)
@option("--epochs", type=click.IntRange(1), default=90)
@option("--jobs", type=click.IntRange(1), default=None, show_default="one a GPU; 1 on the CPU")
@option("--gpus", type=click.IntRange(0), default=None, show_default="all there are", help="0: the CPU.")
@option(
    "--threads", type=click.IntRange(1), default=None, show_default="a share of the cores", help="A job's."
)
@option(
    "--figure1", type=click.Path(path_type=Path), default=None, help="CIFAR-10: archive, folders or shards."
)
@option("--activations", default="relu,tanh", help="Of figure 1, with commas between.")
@option("--lrs", default="0.01,0.03,0.1", help="Learning rates that figure 1 tries for each activation.")
@option("--tune-epochs", type=click.IntRange(1), default=2, help="Figure 1: of each rate's trial.")
@option("--max-epochs", type=click.IntRange(1), default=60, help="Figure 1: after which it is given up.")
def main(**config: Any) -> None:
    """Run the paper's claims on DATA over several seeds, and print how each switch changes the error.

    A claim is the baseline beside the same with one switch turned; differences are taken seed by seed. Options
    after `--` go to train.py: to the runs on DATA, or without DATA to those of figure 1. --figure1 measures the
    epochs that four-layer networks take to 25 % training error on CIFAR-10, each activation at the best of --lrs.
    Writes table.md, results.json and PNGs of the curves to --out. Run the same command again to go on after an
    interruption; finished runs stay.
    """
    out: Path = config["out"]
    if str(config["data"]).startswith("-"):  # the first option after `--`, where there is no DATA
        config["extra"], config["data"] = (str(config["data"]), *config["extra"]), None
    if config["data"] is None and config["figure1"] is None:
        raise click.UsageError("give DATA, or --figure1 CIFAR-10, or both")
    gpus = count_gpus(config["gpus"])
    jobs = config["jobs"] or max(1, gpus)
    claims = chosen_claims(config["claims"])
    runs_of = [name for claim in claims if claim in CLAIMS for name in CLAIMS[claim].runs]
    only = chosen(config["only"], "run of these claims", [BASELINE, *runs_of])
    activations = chosen(config["activations"], "activation", ACTIVATIONS)
    rates = [rate.strip() for rate in config["lrs"].split(",")]
    if config["data"] is not None:
        for split in ("train", "val"):
            ShardReader(config["data"] / split).close()
    parts: dict[str, Any] = {}
    failed: list[str] = []
    with locked(out) as lock, Workers(jobs, gpus, config["threads"], lock) as workers:
        try:
            if config["data"] is not None:
                options = [
                    "--data",
                    str(config["data"].resolve()),
                    "--epochs",
                    str(config["epochs"]),
                    *config["extra"],
                ]
                runs = planned(claims, out, config["data"], options, config["seeds"], set(only))
                workers.work(runs, "claims")
                failed += [f"{run.title}: {run.result['failed']}" for run in runs if "failed" in run.result]
                parts["claims"] = summarise(claims, runs)
                if any(run.result.get("top1") for run in runs):
                    save(curves_figure(runs), out / "curves.png")
                if set(EVALUATED) & set(claims):
                    parts["evaluated"] = evaluate_baseline(claims, runs, config["data"], workers, out)
            if config["figure1"] is not None:
                data = cifar_shards(config["figure1"], out)
                runs, parts["figure1"] = figure1(
                    data,
                    out,
                    activations,
                    rates,
                    config["seeds"],
                    config["tune_epochs"],
                    config["max_epochs"],
                    list(config["extra"]) if config["data"] is None else [],
                    workers,
                )
                failed += [f"{run.title}: {run.result['failed']}" for run in runs if "failed" in run.result]
                save(figure1_figure(parts["figure1"]), out / "figure1.png")
        finally:  # whatever ends it early: what has been found is kept
            if parts:
                report(parts, failed, out)
    if failed:
        raise ModelError(f"{len(failed)} runs failed, and the table is without them: see above")


def report(parts: dict[str, Any], failed: list[str], out: Path) -> None:
    """Write and print the table, and say which runs failed."""
    parts["command"] = shlex.join(["python", "tools/ablate.py", *sys.argv[1:]])
    write_text(out / "results.json", json.dumps(parts, indent=1) + "\n")
    table = as_markdown(parts)
    write_text(out / "table.md", table)
    click.echo(table, nl=False)
    click.echo(f"\n{out}/table.md, results.json and the curves are written")
    for line in failed:
        click.echo(f"failed: {line}", err=True)


def chosen_claims(text: str) -> list[str]:
    known = [*CLAIMS, *EVALUATED]
    return known if text.strip() == "all" else chosen(text, "claim", known)


def chosen(text: str, kind: str, known: Iterable[str]) -> list[str]:
    """The names in `text`, commas between; raises UsageError for one that is not known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"no {kind} {', '.join(unknown)}: choose of {', '.join(known)}")
    return names


@contextmanager
def locked(out: Path) -> Iterator[IO[str]]:
    """OUT belongs to one command at a time, and to the runs that it has begun."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error.strerror}; give another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ModelError(f"another command, or a run that it began, is at work in {out}") from None
        os.set_inheritable(file.fileno(), True)
        yield file


def planned(
    claims: list[str], out: Path, data: Path, options: list[str], seeds: int, only: set[str]
) -> list[Run]:
    """The baseline and each claim's runs; one seed after the other, so that a part is a table of fewer seeds."""
    switches: dict[str, tuple[list[str], bool]] = {
        BASELINE: ([], any(CLAIMS[c].train for c in claims if c in CLAIMS))
    }
    for claim in claims:
        if claim in CLAIMS:
            runs = CLAIMS[claim].runs
            switches |= {n: (a, CLAIMS[claim].train) for n, a in runs.items() if not only or n in only}
    return [
        Run(name, seed, out / name / f"seed-{seed}", [*options, *own], train_split=data if train else None)
        for seed in range(seeds)
        for name, (own, train) in switches.items()
    ]


def summarise(claims: list[str], runs: list[Run]) -> list[dict[str, Any]]:
    """A row for the baseline and each switch: errors in %, differences (same seed) to the baseline in points."""
    done = {(run.name, run.seed): run.result for run in runs if run.result and "failed" not in run.result}
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        seeds = sorted(seed for (n, seed) in done if n == name)
        claim = next((c for c in claims if c in CLAIMS and name in CLAIMS[c].runs), None)
        row: dict[str, Any] = {"run": name, "claim": claim, "seeds": seeds}
        if claim:
            row |= {
                "switch": shlex.join(CLAIMS[claim].runs[name]),
                "says": CLAIMS[claim].says,
                "paper": CLAIMS[claim].paper,
            }
        pairs = [seed for seed in seeds if (BASELINE, seed) in done]
        for key, of in (
            ("top1", lambda r: 100 * (1 - r["top1"][-1])),
            ("top5", lambda r: 100 * (1 - r["top5"][-1])),
            ("train", lambda r: 100 * (1 - r["train_top1"]) if "train_top1" in r else None),
        ):
            values = [value for seed in seeds if (value := of(done[name, seed])) is not None]
            row[key] = spread(values)
            if claim:
                both = [(of(done[name, seed]), of(done[BASELINE, seed])) for seed in pairs]
                row[f"{key}_difference"] = spread([a - b for a, b in both if a is not None and b is not None])
        rows.append(row)
    return rows


def spread(values: list[float]) -> dict[str, Any] | None:
    """Mean and standard deviation over seeds (n - 1), and the values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": values}


def evaluate_baseline(
    claims: list[str], runs: list[Run], data: Path, workers: Workers, out: Path
) -> list[dict[str, Any]]:
    """Ten crops and ensembles of the baseline's networks, by tools/evaluate.py; no rows where all have failed."""
    networks = [
        Checkpoints(run.out).paths()[0]
        for run in runs
        if run.name == BASELINE and run.result and "failed" not in run.result
    ]
    if not networks:
        return []
    judged = [[str(network), network.stat().st_size, network.stat().st_mtime_ns] for network in networks]
    rows = []
    for crops in (1, 10) if "crops" in claims else (1,):
        path = out / f"evaluated-{crops}.json"
        arguments = [*map(str, networks), "--data", str(data), "--crops", str(crops), "--json", str(path)]
        result = read_json(path)
        if not result or result.get("judged") != judged:
            code, error = workers.call(
                "tools/evaluate.py", [*arguments, "--no-progress", "--workers", "0"], 0
            )
            workers.check_stopped()
            if code:
                raise ModelError(f"the baseline could not be evaluated: {error}")
            result = {**json.loads(path.read_text()), "judged": judged}
            write_text(path, json.dumps(result, indent=1) + "\n")
        single = result["networks"][: len(networks)]
        row = {"crops": crops, "networks": len(networks), "count": result["count"]}
        for key in ("top1", "top5"):
            row[key] = spread([100 * (1 - network[key]) for network in single])
            row[f"{key}_average"] = 100 * (1 - result[key])
        rows.append(row)
    return rows


# --- figure 1 ------------------------------------------------------------------------------------------------


def cifar_shards(source: Path, out: Path) -> Path:
    """SOURCE itself if it holds shards; else lossless shards of it in OUT/cifar.

    Raises ModelError if those there are of another SOURCE: finished runs may have been trained on them.
    """
    if (source / "train" / MANIFEST).exists():
        return source
    data = out / "cifar"
    try:
        stat = source.stat()
    except OSError as error:
        raise ModelError(f"cannot read {source}: {error.strerror}; give CIFAR-10") from None
    identity = {"path": str(source.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if (data / "val" / MANIFEST).exists():
        if read_json(data / "source.json") != identity:
            raise ModelError(
                f"{data} was not built of {source} as it is now: give another --out, or --figure1 {data}"
            )
        return data
    write_text(data / "source.json", json.dumps(identity) + "\n")
    builds = [[str(source)]]
    if (source / "test").is_dir():  # as CIFAR's own names have it
        builds = [[str(source / "train"), "--split", "train"], [str(source / "test"), "--split", "val"]]
    for arguments in builds:
        command = [sys.executable, str(ROOT / "tools/build_lmdb.py"), arguments[0], str(data), *arguments[1:]]
        options = ["--size", "32", "--encoding", "raw", "--overwrite"]
        if subprocess.run([*command, *options]).returncode:
            raise ModelError(
                f"no shards could be built of {source}: give CIFAR-10's archive or class folders"
            )
    return data


def figure1(
    data: Path,
    out: Path,
    activations: list[str],
    rates: list[str],
    seeds: int,
    tune_epochs: int,
    max_epochs: int,
    extra: list[str],
    workers: Workers,
) -> tuple[list[Run], dict[str, Any]]:
    """Epochs to 25 % training error, for each activation at the rate that makes it fastest in a short trial.

    No augmentation, no regularisation, a constant rate; the error is the running one of the epoch.
    """
    size = ShardReader(data / "train").manifest.size
    options = ["--data", str(data.resolve()), "--variant", "cifar", "--crop", str(size), "--train-error"]
    options += ["--augment", "none", "--color-std", "0", "--weight-decay", "0", "--dropout", "0"]
    options += ["--schedule", "plateau", "--patience", "100000", *extra]  # the rate stays as it is
    folder = out / "figure1"

    def run(activation: str, rate: str, epochs: int, seed: int, target: float | None = None) -> Run:
        kind = "trial" if target is None else "run"
        where = folder / f"{activation}-lr-{rate}-{kind}" / f"seed-{seed}"
        own = ["--activation", activation, "--lr", rate, "--epochs", str(epochs)]
        return Run(f"{activation} at {rate}", seed, where, [*options, *own], target)

    trials = [run(a, r, tune_epochs, 0) for a, r in itertools.product(activations, rates)]
    workers.work(trials, "figure 1: rates")
    best: dict[str, str] = {}
    for activation in activations:
        mine = [t for t in trials if t.name.startswith(f"{activation} at") and "failed" not in t.result]
        if not mine:
            raise ModelError(f"{activation} learns at none of {', '.join(rates)}: give other --lrs")
        best[activation] = min(mine, key=lambda t: t.result["train_errors"][-1]).name.split(" at ")[1]
    runs = [run(a, best[a], max_epochs, seed, TARGET) for seed in range(seeds) for a in activations]
    workers.work(runs, "figure 1: to 25 %")

    rows = []
    for activation in activations:
        mine = [
            r for r in runs if r.name == f"{activation} at {best[activation]}" and "failed" not in r.result
        ]
        epochs = [reaches(r.result["train_errors"], TARGET) for r in mine]
        rows.append(
            {
                "activation": activation,
                "lr": best[activation],
                "trials": {
                    t.name.split(" at ")[1]: t.result.get("train_errors", [None])[-1]
                    for t in trials
                    if t.name.startswith(f"{activation} at")
                },
                "seeds": len(mine),
                "epochs": spread([e for e in epochs if e is not None]),
                "not_reached": sum(e is None for e in epochs),
                "curves": [r.result["train_errors"] for r in mine],
            }
        )
    return runs, {"rows": rows, "target": TARGET, "max_epochs": max_epochs, "trial_epochs": tune_epochs}


# --- the table and the pictures ------------------------------------------------------------------------------


def said(value: dict[str, Any] | None, sign: str = "") -> str:
    """A mean and its spread: "+1.4 ± 0.3"."""
    if value is None:
        return "–"
    return f"{value['mean']:{sign}.1f}" + ("" if value["std"] is None else f" ± {value['std']:.1f}")


def as_markdown(parts: dict[str, Any]) -> str:
    """What is printed and written to table.md."""
    lines: list[str] = []
    if "claims" in parts:
        lines += [
            "Validation error in % after the last epoch, training error (centre crop, no dropout) where it is the",
            "point; mean ± standard deviation over seeds. Changes from the baseline, seed by seed, in points.",
            "",
            "| run | switch | about | top-1 | change | top-5 | change | training | change | paper | seeds |",
            "|---|---|---|--:|--:|--:|--:|--:|--:|---|--:|",
        ]
        for row in parts["claims"]:
            switch = f"`{row['switch']}`" if row["claim"] else "none"
            cells = [row["run"], switch, row.get("says", "")]
            for key in ("top1", "top5", "train"):
                cells += [said(row[key]), said(row.get(f"{key}_difference"), "+")]
            lines.append("| " + " | ".join([*cells, row.get("paper", ""), str(len(row["seeds"]))]) + " |")
        lines.append("")
    if parts.get("evaluated"):
        lines += [
            "| the baseline's networks | top-1 error, each | averaged | top-5 error, each | averaged |",
            "|---|--:|--:|--:|--:|",
        ]
        for row in parts["evaluated"]:
            what = f"{row['networks']} networks, {'centre crop' if row['crops'] == 1 else 'ten crops'}"
            cells = [what, said(row["top1"]), f"{row['top1_average']:.1f}"]
            lines.append("| " + " | ".join([*cells, said(row["top5"]), f"{row['top5_average']:.1f}"]) + " |")
        lines += [
            "",
            "Paper: top-5 error 18.2 % of one network, 16.4 % of five, 15.3 % of seven (two pretrained).",
            "",
        ]
    if "figure1" in parts:
        figure = parts["figure1"]
        lines += [
            f"Figure 1: epochs to {figure['target']:.0%} training error (running error of the epoch).",
            "",
            "| activation | learning rate | epochs | seeds | never reached |",
            "|---|--:|--:|--:|--:|",
        ]
        for row in figure["rows"]:
            cells = [
                row["activation"],
                row["lr"],
                said(row["epochs"]),
                str(row["seeds"]),
                str(row["not_reached"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        by_name = {row["activation"]: row for row in figure["rows"]}
        if {"relu", "tanh"} <= by_name.keys() and by_name["relu"]["epochs"] and by_name["tanh"]["epochs"]:
            ratio = by_name["tanh"]["epochs"]["mean"] / by_name["relu"]["epochs"]["mean"]
            lines += ["", f"tanh takes {ratio:.1f} times the epochs of ReLU; the paper says six."]
        lines.append("")
    return "\n".join(lines)


def curves_figure(runs: list[Run]) -> Figure:
    """Validation error against epochs: mean over seeds, the seeds' range shaded."""
    names = list(dict.fromkeys(run.name for run in runs))
    figure = new_figure(9, 5.5, "Validation error of each switch")
    axes = figure.subplots()
    for number, name in enumerate(names):
        curves = [r.result["top1"] for r in runs if r.name == name and r.result.get("top1")]
        if not curves:
            continue
        style = "-" if number < len(COLORS) else "--"
        draw(
            axes,
            [[100 * (1 - value) for value in c] for c in curves],
            name,
            COLORS[number % len(COLORS)],
            style,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 error, %")
    axes.grid()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def figure1_figure(result: dict[str, Any]) -> Figure:
    """The paper's figure 1: training error against epochs."""
    figure = new_figure(6.5, 4.5, "CIFAR-10, four-layer network")
    axes = figure.subplots()
    for number, row in enumerate(result["rows"]):
        if row["curves"]:
            name = f"{row['activation']}, rate {row['lr']}"
            curves = [[100 * error for error in curve] for curve in row["curves"]]
            draw(axes, curves, name, COLORS[number % len(COLORS)], "-")
    axes.axhline(100 * result["target"], color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xlabel("epoch")
    axes.set_ylabel("running training error, %")
    axes.grid()
    axes.legend()
    return figure


def draw(axes: Any, curves: list[list[float]], name: str, color: str, style: str) -> None:
    """The mean as far as all seeds go, and the range of what there is."""
    columns = [list(column) for column in zip(*curves, strict=False)]
    epochs = range(1, 1 + len(columns))
    axes.plot(epochs, [statistics.fmean(c) for c in columns], color=color, linestyle=style, label=name)
    axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.12)


if __name__ == "__main__":
    main()
