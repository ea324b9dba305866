"""Shared helpers: train.py in and outside this process, checkpoints without training, files, waiting."""

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import native
import train
from base.files import lock
from base.machine import STOP_SIGNALS
from model.alexnet import AlexNet
from model.training import checkpoint, recipe
from model.training.checkpoint import Checkpoints
from model.training.config import DEFAULT_INIT
from pipeline.build.split import Options
from pipeline.preprocess import Preprocess
from pipeline.shards import Manifest

ROOT = Path(__file__).parents[1]
OPTIONS = Options(size=64, images_per_shard=8)  # for builds
CRASH = b"this file takes the whole process down"
# without a compiler, tests of kernels are skipped; with one, a missing kernel is a failure
needs_compiler = pytest.mark.skipif(
    shutil.which(native.compiler()[0]) is None, reason=f"no C++ compiler ({native.compiler()[0]})"
)
CROP = 67  # small and fast: the last maps have one pixel


def make_run(
    out: Path,
    data: Path,
    variant: str = "paper",
    *,
    crop: int = CROP,
    mean: str = "pixel",
    seed: int = 0,
    **options: Any,
) -> Path:
    """Make a run folder with best.pt of an untrained network whose outputs differ between images."""
    manifest = Manifest.load(data / "train")
    preprocess = Preprocess.load(data / "train", crop, mean)
    network = AlexNet(len(manifest.classes), variant, image_size=crop, **options)
    recipe.initialise(network, DEFAULT_INIT[variant], seed)
    # the outputs of initial weights are almost equal, so that their order depends on rounding: spread them
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        last = network.classifier[-1].weight
        assert isinstance(last, torch.Tensor)
        last.copy_(torch.randn(last.shape, generator=generator))
        noise = 80 * torch.randn(8, 3, crop, crop, generator=generator)
        last.mul_(2 / network.eval()(noise).std())
    state: dict[str, Any] = {
        "model": network.state_dict(),
        "optimizer": {},
        "schedule": {},
        "scaler": {},
        "epoch": 2,
        "step": 12,
        "best": 0.5,
        "seed": seed,
        "variant": variant,
        "network": network.options,
        "identity": {},
        "ema": {},
        "watch": {},
        "classes": manifest.classes,
        "preprocess": preprocess.state_dict(),
    }
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out / "best.pt", state)
    return out


def train_command(*arguments: object) -> list[str]:
    """The command line of train.py with `arguments`."""
    return [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]


def run_train(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run train.py in its own process; fail the test unless it exits with `code`."""
    done = subprocess.run(
        train_command(*arguments), capture_output=True, text=True, timeout=240, cwd=ROOT, check=False
    )
    assert done.returncode == code, done.stderr
    return done


def write_log(run: Path, epochs: int = 3, steps: int = 6) -> None:
    """Write log.jsonl and config.json as train.py does."""
    lines = []
    for step in range(1, epochs * steps + 1):
        epoch = (step - 1) // steps
        entry = {"kind": "train", "epoch": epoch, "step": step, "loss": 3 / step, "lr": 0.01 * 0.5**epoch}
        lines.append(entry | {"images_per_s": 100.0 + step, "data_wait": 0.01})
        if step % steps == 0:
            val = {"kind": "val", "epoch": epoch, "step": step, "loss": 2 / step, "top1": 0.2 + 0.1 * epoch}
            lines.append(val | {"top5": 0.6 + 0.1 * epoch, "count": 24})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"global_batch": 16, "seed": 0, "augment": "all", "color_std": 0.1, "data": "x"}
    (run / "config.json").write_text(json.dumps(config))


def tar_of(files: dict[str, bytes]) -> bytes:
    """Make a tar with these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def webdataset(names: dict[str, bytes], number_of: dict[str, int]) -> bytes:
    """Make a WebDataset tar of key.json, key.jpg and key.cls."""
    members: dict[str, bytes] = {}
    for key, content in names.items():
        members |= {f"{key}.json": b"{}", f"{key}.jpg": content, f"{key}.cls": str(number_of[key]).encode()}
    return tar_of(members)


def write_parquet(
    path: Path, rows: Sequence[tuple[bytes | None, str | None, int]], names: list[str] | None
) -> None:
    """Write a file as Hugging Face does, with four rows per row group; rows are (bytes, path, label)."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    columns = [[{"bytes": b, "path": p} for b, p, _ in rows], [label for _, _, label in rows]]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=4)


def decode(record: np.ndarray) -> np.ndarray:
    """Decode a JPEG or PNG file's bytes to RGB."""
    image = cv2.imdecode(record, cv2.IMREAD_COLOR)
    assert image is not None
    return image[..., ::-1]


def read_bgr(path: Path | str) -> np.ndarray:
    image = cv2.imread(str(path))
    assert image is not None
    return image


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of each file in `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until `condition` holds; fail the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def held_up(out: Path, number: int) -> Iterator[Path]:
    """Lock one shard of the build that --resume will start in OUT/train, so that it cannot end. Yields work/."""
    work = out / "train.partial/work"
    work.mkdir(parents=True)
    with lock(work / f"shard-{number:05d}.lock", "the lock is new"):
        yield work


def newest(out: Path) -> dict[str, Any]:
    """The newest checkpoint of a run."""
    return Checkpoints(Path(out)).newest()


def same_weights(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two checkpoints hold the same weights, bit for bit."""
    assert a["model"].keys() == b["model"].keys()
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def train_here(*arguments: object) -> Result:
    """Run train.py in this process on the CPU, which is much faster than a process that imports torch."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        small = ["--gpus", 0, "--workers", 0, "--decode-threads", 1, "--no-progress", "--no-tensorboard"]
        return CliRunner().invoke(train.main, list(map(str, [*small, *arguments])))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_error(*arguments: object, code: int = 1) -> str:
    """Run train.py in this process; returns the one line with which it refuses `arguments`."""
    done = train_here(*arguments)
    assert done.exit_code == code, (done.output, done.exception)
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]
