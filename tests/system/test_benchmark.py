"""The stages of the benchmark run; tests check no rates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from base.errors import DataError
from model.alexnet import AlexNet
from model.parallel.ranks import Ranks
from model.training.step import train_step
from tools.bench.core import Bench, Row
from tools.bench.layers import Stopwatch, watch
from tools.bench.load import load_cases
from tools.bench.peer_loaders import LOADERS, WRITERS
from tools.bench.peers import OWN
from tools.bench.report import TEST_LINES
from tools.bench.stages import STAGES
from tools.bench.step import flops, held_batch, started
from tools.benchmark import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "stages", [("build", "read", "load"), ("lrn", "step", "layers", "train")], ids=" ".join
)
def test_each_stage_gives_its_rows(class_folders: Path, tmp_path: Path, stages: tuple[str, ...]) -> None:
    rows, done = measure(class_folders, tmp_path / "rows.json", *stages)
    assert [row["stage"] for row in rows] == sorted((row["stage"] for row in rows), key=stages.index)
    assert {row["stage"] for row in rows} == set(stages)
    for row in rows:
        assert row["ours"] > 0 and row["what"] in done.stdout and (row["limit"] or row["peer"])
        for name in ("limit", "peer"):
            assert row[name] is None or row[f"of_{name}"] == row["ours"] / row[name] > 0


def test_the_layers_of_a_step_have_all_of_its_arithmetic() -> None:
    images, labels = held_batch(2, torch.device("cpu"))
    state, stopwatch = started(Ranks(gpu=False), 2), Stopwatch(images.device)
    work = watch(state, stopwatch)
    stopwatch.begin("rest")
    train_step(state, images, labels)
    stopwatch.begin("rest")
    assert sum(needs.flops for needs in work.values()) == 2 * flops(AlexNet(), images.float())
    forward, backward = ([part for part in work if part.endswith(end)] for end in ("forward", "backward"))
    assert list(stopwatch.seconds()) == ["rest", *forward, *reversed(backward), "SGD"]
    assert len(work) == 2 * 18 + 1  # layers, without those that LRN computes


def test_on_a_gpu_parts_are_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.5, 3.5, 4.5])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.now = next(clock)

        def elapsed_time(self, end: Event) -> float:  # in milliseconds
            return 1000 * (end.now - self.now)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stopwatch = Stopwatch(torch.device("cuda"))
    for part in ("conv1", "rest", "conv1", "rest"):
        stopwatch.begin(part)
    assert stopwatch.seconds() == {"conv1": 0.5 + 1.0, "rest": 2.0} and not stopwatch.seconds()


def test_peers_that_are_installed_run_and_the_others_are_named(class_folders: Path, tmp_path: Path) -> None:
    """`ours` and `dali` are always there; the others if this environment has them."""
    rows, done = measure(class_folders, tmp_path / "rows.json", "peers", "--peers-python", sys.executable)
    loading = [row for row in rows if "first batch after" in row["what"]]
    writing = rows[len(loading) :]
    loaders = [row["what"].partition(":")[0] for row in loading]
    assert loaders[:2] == ["ours", "dali"]
    for name in LOADERS:
        assert (name in loaders) != (f"peers: {name} is left out: it " in done.stderr), done.stderr
    assert all("MB on disk" in row["what"] for row in loading)
    writers = [row["peer_is"] for row in writing]
    assert writers[:2] == ["Pillow loop", "OpenCV loop"]
    for name in WRITERS:
        assert (name in writers) != (f"peers: {name} is left out: it " in done.stderr), done.stderr
    for row in rows[1:]:
        assert row["peer"] > 0 and row["of_peer"] == row["ours"] / row["peer"]


def test_every_peer_is_in_the_list_that_make_installs() -> None:
    listed = {line.partition("<")[0] for line in (ROOT / "tools/bench/peers.txt").read_text().split()}
    names = {"streaming": "mosaicml-streaming", "torchvision_decode_jpeg": "torchvision"}
    assert {names.get(name, name) for name in LOADERS if name not in OWN} <= listed


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("no such card\nmore"), "RuntimeError: no such card"),
        (SystemExit(3), "SystemExit: 3"),  # what ranks.launch raises if a rank dies
        (DataError("no images: give another folder"), "no images: give another folder"),
    ],
    ids=["error", "exit", "user error"],
)
def test_the_report_for_an_issue_is_one_block_and_survives_a_stage_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, line: str
) -> None:
    def fails(bench: Bench) -> Iterator[Row]:
        yield Row("train", "begun", "images/s", 1.0)
        raise error

    monkeypatch.setitem(STAGES, "train", fails)
    monkeypatch.setattr(Bench, "seconds", lambda self, work, least=0: 0.01)
    (tmp_path / "tests.txt").write_text("first\n" * TEST_LINES + "3 passed, 1 failed\n")
    options = ["--stage", "lrn", "--stage", "train", "--rounds", 1, "--batch", 2, "--cpu"]
    options += ["--json", tmp_path / "rows.json", "--issue", tmp_path / "tests.txt"]
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    done = CliRunner().invoke(main, [str(photographs), *map(str, options)])
    assert done.exit_code == 1 and f"Error: train failed: {line}\n" in done.stderr
    block = done.stdout.partition("copy from here -----\n")[2].partition("----- to here")[0]
    assert (
        "| lrn | ReLU, LRN, pool after conv1" in block
        and "| train | begun" in block
        and "3 passed, 1 failed\n```" in block
    )
    assert block.count("first\n") == TEST_LINES - 1
    written = block.partition("```json\n")[2].partition("```")[0]
    assert json.loads(written) == json.loads((tmp_path / "rows.json").read_text())
    assert [row["stage"] for row in json.loads(written)["rows"]] == ["lrn", "lrn", "train"]


def test_a_gpu_run_shows_both_decoders() -> None:
    assert [case for case in load_cases(gpu=True) if case[0] == "jpeg"] == [
        ("jpeg", mean, decoder) for mean in ("pixel", "channel") for decoder in ("mixed", "cpu")
    ]
    assert [case[:2] for case in load_cases(gpu=False)] == [
        ("jpeg", "pixel"),
        ("jpeg", "channel"),
        ("raw", "pixel"),
    ]


def measure(
    photographs: Path, out: Path, *words: str
) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    """Run the benchmark briefly; returns its rows and the process. `words` are stages and other options."""
    short = (
        "import sys, tools.bench.core as c, tools.benchmark as b; c.BUILD_IMAGES = c.LOAD_IMAGES = 1;"
        "c.Bench.seconds.__defaults__ = (0.01,); b.main(sys.argv[1:])"
    )
    options = ["--rounds", "1", "--batch", "8", "--workers", "1", "--cpu", "--json", str(out)]
    command = [sys.executable, "-c", short, str(photographs), *options]
    for word in words:
        command += ["--stage", word] if word in STAGES else [word]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["rows"], done
