"""That the stages of the benchmark run; figures are for quiet machines, not for tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stages", [("build", "read", "load"), ("lrn", "step", "train")], ids=" ".join)
def test_each_stage_gives_its_rows(class_folders, tmp_path, stages):
    out = tmp_path / "rows.json"
    short = (
        "import sys, tools.bench.core as c, tools.benchmark as b; c.BUILD_IMAGES = c.LOAD_IMAGES = 1;"
        "c.Bench.seconds.__defaults__ = (0.01,); b.main(sys.argv[1:])"
    )
    options = ["--rounds", "1", "--batch", "8", "--workers", "1", "--cpu", "--json", str(out)]
    command = [sys.executable, "-c", short, str(class_folders), *options]
    for stage in stages:
        command += ["--stage", stage]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["stage"] for row in rows] == sorted((row["stage"] for row in rows), key=stages.index)
    assert {row["stage"] for row in rows} == set(stages)
    for row in rows:
        assert row["ours"] > 0 and row["what"] in done.stdout and (row["limit"] or row["peer"])
        for name in ("limit", "peer"):
            assert row[name] is None or row[f"of_{name}"] == row["ours"] / row[name] > 0
