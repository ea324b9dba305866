"""A run's log: the one writer and the one reader of log.jsonl, and everything that is made from it.

log.jsonl has one JSON object per line. Its `kind` is one of

    train     means over the last `steps` steps: loss, lr, images_per_s, data_wait (the share of the time that was
              spent waiting for data), with --train-error error, and guess, the loss of always predicting the
              frequencies of the labels in the last 100 steps or so
    val       validation after an epoch: loss, top1, top5, count
    guessing  the network has not learnt anything yet: loss, guess

`epoch` is counted from 0 and `step` from 1.
"""

from __future__ import annotations

import csv
import io
import json
import math
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from base.errors import ModelError
from base.files import open_regular, read_regular, write_atomic

FIELDS = ("epoch", "step", "loss", "lr", "images_per_s", "data_wait", "val_loss", "top1", "top5")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises ModelError instead of OSError, for example if the disk is full."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"cannot write {path}: {error.strerror or error}; free space or give another --out"
        ) from None


def read_log(run: Path, strict: bool = True) -> list[dict[str, Any]]:
    """Read the entries of RUN/log.jsonl; a partial last line, as a kill leaves it, is ignored.

    Args:
        run: a run's folder, or a checkpoint in it.
        strict: raise ModelError if there are no entries or a line is damaged. Otherwise the entries before the
            damaged line are returned.
    """
    path = (run.parent if run.is_file() else run) / "log.jsonl"
    try:
        with open_regular(path) as file:
            lines = file.read().splitlines()
    except OSError as error:
        if not strict:
            return []
        raise ModelError(
            f"cannot read {path} ({error.strerror}): give a folder that train.py wrote"
        ) from None
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            entries.append({**entry, "step": int(entry["step"]), "kind": str(entry["kind"])})
        # ValueError includes bytes that are not UTF-8; OverflowError is raised for a step of Infinity
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            if strict and number < len(lines):
                raise ModelError(f"line {number} of {path} is damaged: delete it") from None
            break
    if strict and not entries:
        raise ModelError(f"{path} is empty: train for --log-every steps first")
    return entries


def epochs_of(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of FIELDS for each complete epoch, counted from 1.

    `loss` and `error` are means over the epoch's steps; `lr`, `images_per_s` and `data_wait` are those of its last
    log line.
    """
    rows: list[dict[str, Any]] = []
    sums = {"loss": 0.0, "error": 0.0}
    steps, before, last = 0, 0, dict[str, Any]()
    for entry in entries:
        if entry["kind"] == "train":
            if entry["step"] <= before:
                continue  # the file was edited: steps must increase
            if last.get("epoch") != entry["epoch"]:
                sums, steps = dict.fromkeys(sums, 0.0), 0
            new, before, last = entry.get("steps", entry["step"] - before), entry["step"], entry
            steps += new
            for key in sums:
                sums[key] += entry.get(key, math.nan) * new
        elif entry["kind"] == "val":
            whole = steps and last.get("epoch") == entry["epoch"]
            row: dict[str, Any] = {"epoch": entry["epoch"] + 1, "step": entry["step"]}
            row |= {key: last.get(key) if whole else None for key in ("lr", "images_per_s", "data_wait")}
            row |= {key: total / steps if whole and total == total else None for key, total in sums.items()}
            rows.append(row | {"val_loss": entry["loss"], "top1": entry["top1"], "top5": entry["top5"]})
            before = max(before, entry["step"])
    return rows


class Log:
    """Writes log.jsonl, metrics.csv, TensorBoard and Weights & Biases, and shows the progress bar.

    Args:
        out: the run's folder.
        on: whether this rank writes. On other ranks, all methods do nothing.
        step: the step of the checkpoint that a resumed run continues from; later lines are dropped.
        config: the options, for Weights & Biases; None disables it.
        tensorboard: whether to write TensorBoard events.
        progress: whether to show progress bars.
    """

    def __init__(
        self,
        out: Path,
        on: bool = True,
        step: int = 0,
        *,
        config: dict[str, Any] | None = None,
        tensorboard: bool = False,
        progress: bool = False,
    ) -> None:
        self.out, self.on, self.progress = out, on, progress and on
        self._bar: tqdm | None = None
        self._rest = ""  # what the progress bar shows about the whole run
        if not on:
            return
        # a resumed run repeats the steps after its checkpoint
        self.entries = (
            [entry for entry in read_log(out, strict=False) if entry["step"] <= step] if step else []
        )
        lines = "".join(json.dumps(entry) + "\n" for entry in self.entries)
        write_atomic(out / "log.jsonl", lines.encode())
        self._write_table()
        self.jsonl = (out / "log.jsonl").open("a")
        self.tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
        self.wandb = _wandb(out, config, resumed=step > 0) if config is not None else None

    def _write_table(self) -> None:
        """Write metrics.csv, one row per epoch."""
        table = io.StringIO()
        writer = csv.DictWriter(table, FIELDS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(epochs_of(self.entries))
        write_atomic(self.out / "metrics.csv", table.getvalue().encode())

    def write(self, kind: str, **entry: Any) -> None:
        """Append a line to log.jsonl and update everything that is made from it."""
        if not self.on:
            return
        entry = {"kind": kind, **entry}
        self.entries.append(entry)
        with writing(self.out / "log.jsonl"):
            self.jsonl.write(json.dumps(entry) + "\n")
            self.jsonl.flush()
            if kind == "val":
                self._write_table()
        curves = {
            f"{kind}/{k}": v for k, v in entry.items() if k not in ("kind", "epoch", "step", "steps", "count")
        }
        if self.tensorboard:
            for name, value in curves.items():
                self.tensorboard.add_scalar(name, value, entry["step"])
        if self.wandb:
            self.wandb.log(curves, step=entry["step"])
        if kind == "train" and self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {entry['loss']:.3f}, {entry['images_per_s']:.0f} images/s, "
                f"waiting for data {entry['data_wait']:.0%}{self._rest}"
            )
        if kind == "val":
            loss = epochs_of(self.entries)[-1]["loss"]
            self.say(
                f"epoch {entry['epoch'] + 1}: train loss {math.nan if loss is None else loss:.3f}, "
                f"val loss {entry['loss']:.3f}, top-1 {entry['top1']:.2%}, top-5 {entry['top5']:.2%}"
            )

    def remaining(self, seconds: float) -> None:
        """Set the remaining time that the progress bar shows."""
        self._rest = f", {duration(seconds)} left"

    def bar(self, epoch: int, step_in_epoch: int, steps: int) -> None:
        """Advance the epoch's progress bar; call before each step."""
        if not self.progress:
            return
        if self._bar is None or step_in_epoch == 0:
            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(
                total=steps, initial=step_in_epoch, desc=f"epoch {epoch + 1}", unit="step", leave=False
            )
        else:
            self._bar.update()

    def watch(self, batches: Iterable[Any], total: int) -> Iterable[Any]:
        """Iterate over validation batches with a progress bar."""
        return tqdm(batches, "validating", total, unit="batch", leave=False) if self.progress else batches

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self.on:
            tqdm.write(line)

    def close(self) -> None:
        if not self.on:
            return
        if self._bar is not None:
            self._bar.close()
        self.jsonl.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def _wandb(out: Path, config: dict[str, Any], resumed: bool) -> Any:
    """Start a Weights & Biases run; a resumed run continues under its id."""
    try:
        import wandb
    except ImportError:
        raise ModelError(
            "wandb is not installed: run pip install -e '.[wandb]', or leave --wandb out"
        ) from None
    identity = out / "wandb-id"
    if not (resumed and identity.exists()):
        write_atomic(identity, uuid.uuid4().hex.encode())
    own = read_regular(identity, 100).decode("ascii")
    return wandb.init(project="alexnet-dali", config=config, id=own, name=out.name, resume="allow")


def duration(seconds: float) -> str:
    """Format as "40 s", "3 min", "2 h 40 min" or "5 days 3 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h"


def size(n: float) -> str:
    """Format as "456 MB" or "1.8 GB"."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"
