"""The benchmark's stages run; their figures are not tested."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.bench.peer_loaders import LOADERS
from tools.bench.peers import OWN
from tools.bench.stages import STAGES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stages", [("build", "read", "load"), ("lrn", "step", "train")], ids=" ".join)
def test_each_stage_gives_its_rows(class_folders: Path, tmp_path: Path, stages: tuple[str, ...]) -> None:
    rows, done = measure(class_folders, tmp_path / "rows.json", *stages)
    assert [row["stage"] for row in rows] == sorted((row["stage"] for row in rows), key=stages.index)
    assert {row["stage"] for row in rows} == set(stages)
    for row in rows:
        assert row["ours"] > 0 and row["what"] in done.stdout and (row["limit"] or row["peer"])
        for name in ("limit", "peer"):
            assert row[name] is None or row[f"of_{name}"] == row["ours"] / row[name] > 0


def test_peers_that_are_installed_run_and_the_others_are_named(class_folders: Path, tmp_path: Path) -> None:
    """`ours` and `dali` are always available; the others only if they are installed."""
    rows, done = measure(class_folders, tmp_path / "rows.json", "peers", "--peers-python", sys.executable)
    ran = [row["what"].partition(":")[0] for row in rows]
    assert ran[:2] == ["ours", "dali"]
    for name in LOADERS:
        assert (name in ran) != (f"peers: {name} is left out: it " in done.stderr), done.stderr
    for row in rows:
        assert "first batch after" in row["what"] and "MB on disk" in row["what"] and row["ours"] > 0
    for row in rows[1:]:
        assert row["peer"] > 0 and row["of_peer"] == row["ours"] / row["peer"]


def test_every_peer_is_in_the_list_that_make_installs() -> None:
    listed = {line.partition("<")[0] for line in (ROOT / "tools/bench/peers.txt").read_text().split()}
    names = {"streaming": "mosaicml-streaming", "torchvision_decode_jpeg": "torchvision"}
    assert {names.get(name, name) for name in LOADERS if name not in OWN} <= listed


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
