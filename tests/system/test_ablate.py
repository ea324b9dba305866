"""tools/ablate.py: two small claims end to end, a second call that runs nothing, figure 1, and the numbers."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from base.errors import ModelError
from base.files import lock
from pipeline.build.sources import open_source
from pipeline.build.split import Options, build_split
from tools import ablate
from tools.ablation import figure1, jobs
from tools.ablation.claims import planned, spread, summarise
from tools.ablation.report import as_markdown

ROOT = Path(__file__).parents[2]
# 63 pixels is the smallest crop that passes three pools
TINY = ["--crop", "63", "--global-batch", "32", "--init", "torch", "--lr", "0.001"]


def command(data: Path, out: Path, *arguments: object) -> list[str]:
    common = ["--out", out, "--claims", "lrn,pool", "--seeds", 2, "--epochs", 1, "--jobs", 2, "--gpus", 0]
    script = [sys.executable, str(ROOT / "tools/ablate.py"), data, *common, *arguments, "--", *TINY]
    return [str(part) for part in script]


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An ablation that was stopped by a signal after its first run and then continued."""
    out = tmp_path_factory.mktemp("ablate") / "out"
    process = subprocess.Popen(command(dataset, out), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(out.rglob("result.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 75 and "run the same command again to continue" in errors, errors
    early = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert 0 < len(early) < 6
    done = subprocess.run(command(dataset, out), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in early.items())
    return out, done.stdout


def test_two_claims_make_a_table(finished: tuple[Path, str]) -> None:
    out, printed = finished
    assert {path.parent.relative_to(out).as_posix() for path in out.rglob("result.json")} == {
        f"{name}/seed-{seed}" for name in ("baseline", "no-lrn", "pool-2-2") for seed in (0, 1)
    }
    configs = {
        p.parent.relative_to(out).as_posix(): json.loads(p.read_text()) for p in out.rglob("config.json")
    }
    base = configs["baseline/seed-1"]
    for name, switch, value in (("no-lrn", "lrn", False), ("pool-2-2", "pool", "2,2")):
        other = configs[f"{name}/seed-1"]
        assert {k for k in base if base[k] != other[k]} == {"out", switch} and other[switch] == value
    table = (out / "table.md").read_text()
    assert table in printed and "| no-lrn | `--no-lrn` |" in table and "+1.4 / +1.2" in table
    rows = {row["run"]: row for row in json.loads((out / "results.json").read_text())["claims"]}
    errors = {
        (name, seed): 100 * (1 - last_validation(out / name / f"seed-{seed}")["top1"])
        for name in rows
        for seed in (0, 1)
    }
    for name, row in rows.items():
        assert row["top1"]["values"] == pytest.approx([errors[name, 0], errors[name, 1]])
        assert row["top1"]["std"] == pytest.approx(statistics.stdev([errors[name, 0], errors[name, 1]]))
    pairs = [errors["no-lrn", seed] - errors["baseline", seed] for seed in (0, 1)]
    assert rows["no-lrn"]["top1_difference"]["mean"] == pytest.approx(sum(pairs) / 2)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def last_validation(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "val"][-1]


def test_a_second_call_runs_nothing(finished: tuple[Path, str], dataset: Path) -> None:
    out, printed = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")} | {
        p: p.stat().st_mtime_ns for p in out.rglob("log.jsonl")
    }
    done = subprocess.run(command(dataset, out), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout == printed
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    again = [*command(dataset, out), "--dropout", "0.3"]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "holds a run with other options" in done.stderr


def test_figure_1_stops_each_run_at_the_target(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On four classes that are easy to distinguish, in shards of 32x32."""
    for split in ("train", "val"):
        source = open_source(class_folders / split, split)
        build_split(source, tmp_path / "data", Options(size=32, encoding="raw"), workers=1)
    out = tmp_path / "out"
    arguments = ["--figure1", tmp_path / "data", "--out", out, "--gpus", 0, "--jobs", 1, "--seeds", 1]
    arguments += ["--lrs", "0.002,0.00001"]

    def run(epochs: int) -> str:
        more = ["--max-epochs", epochs, "--", "--global-batch", "32"]
        script = [sys.executable, ROOT / "tools/ablate.py", *arguments, *more]
        done = subprocess.run(list(map(str, script)), cwd=ROOT, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(1).count("| – | 1 | 1 | 0.002: more than 1, 0.00001: more than 1 |") == 2
    first = [path.stat().st_mtime_ns for path in sorted(out.glob("figure1/*/seed-0/arguments.json"))]
    printed = run(200)  # continues the same runs
    assert first == [path.stat().st_mtime_ns for path in sorted(out.glob("figure1/*/seed-0/arguments.json"))]
    figure = json.loads((out / "results.json").read_text())["figure1"]
    assert [row["activation"] for row in figure["rows"]] == ["relu", "tanh"]
    for row in figure["rows"]:
        (curve,) = row["curves"]
        assert all(error > 0.25 for error in curve[: math.ceil(row["epochs"]["mean"]) - 1])
        assert any(error <= 0.25 for error in curve) and len(curve) < 200
        assert row["lr"] == "0.002" and row["trials"]["0.002"]["epochs"] == row["epochs"]["mean"]
        slow = row["trials"]["0.00001"]  # given up when it could not win any more
        assert slow["epochs"] is None and row["epochs"]["mean"] <= slow["tried"] < 200
        assert f"The best rate of {row['activation']} is at the edge" in printed
    config = json.loads((out / "figure1/tanh-lr-0.002/seed-0/config.json").read_text())
    expected: dict[str, object] = {"variant": "cifar-18pct", "activation": "tanh", "mean": "pixel"}
    expected |= {"augment": "none", "color_std": 0, "dropout": 0, "weight_decay": 0, "layer_decay": []}
    expected |= {"init": "cuda-convnet", "bias_lr": 2, "schedule": "plateau", "patience": 100_000}
    assert (expected | {"warmup_epochs": 0, "lr": 0.002, "momentum": 0.9}).items() <= config.items()
    assert (out / "figure1.png").exists()


def test_the_ratio_of_figure_1_is_a_bound_if_tanh_does_not_get_there() -> None:
    def row(activation: str, *epochs: float, missed: int = 0) -> dict[str, object]:
        rest = {"lr": "1", "seeds": 2, "trials": {}, "at_edge": False}
        return {"activation": activation, "epochs": spread(list(epochs)), "not_reached": missed, **rest}

    for rows, line in (
        ([row("relu", 4, 6), row("tanh", 10, 20)], "tanh takes 3.0 times"),
        ([row("relu", 4, 6), row("tanh", 10, missed=1)], "tanh takes more than 11.0 times"),
        ([row("relu", 4, 6), row("tanh", missed=2)], "tanh takes more than 20.0 times"),
    ):
        assert line in as_markdown({"figure1": {"rows": rows, "target": 0.25, "max_epochs": 100}})
    rows = [row("relu", 4, missed=1), row("tanh", 10, 20)]
    assert "times" not in as_markdown({"figure1": {"rows": rows, "target": 0.25, "max_epochs": 100}})


def test_the_running_error_of_an_epoch_counts_every_step_once(tmp_path: Path) -> None:
    lines = [("train", 4, 0.5), ("train", 6, 0.2), ("val", 6, None), ("train", 8, 0.1), ("train", 12, 0.3)]
    lines += [("val", 12, None), ("train", 14, 0.9)]
    text = []
    for kind, step, error in lines:
        entry = {"kind": kind, "step": step, "epoch": (step - 1) // 6, "loss": 1.0, "top1": 0.0, "top5": 0.0}
        text.append(json.dumps(entry | ({} if error is None else {"error": error})))
    (tmp_path / "log.jsonl").write_text("\n".join(text) + '\n{"kind": "tr')
    assert jobs.epoch_errors(tmp_path) == pytest.approx([(4 * 0.5 + 2 * 0.2) / 6, (2 * 0.1 + 4 * 0.3) / 6])
    # halfway between the second and the third epoch
    assert jobs.reaches([0.45, 0.35, 0.15], 0.25) == pytest.approx(2.5)
    assert jobs.reaches([0.45, 0.35], 0.25) is None and jobs.reaches([0.2], 0.25) == 1


def test_steps_to_learn_end_the_last_stay_at_the_level_of_guessing() -> None:
    """The threshold is 0.95 of the entropy of the first epoch's labels, from its last line."""

    def log(*losses: float) -> list[dict[str, object]]:
        lines: list[dict[str, object]] = [
            {
                "kind": "train",
                "epoch": i // 2,
                "step": 20 * (i + 1),
                "loss": loss,
                "guess": 0.9 + 0.1 * (i % 2),
            }
            for i, loss in enumerate(losses)
        ]
        return [*lines, {"kind": "val", "epoch": 0, "step": 40}]

    assert jobs.steps_to_learn(log(1.0, 0.94, 0.96, 0.94, 0.8)) == 80
    assert jobs.steps_to_learn(log(0.94, 0.5)) == 20
    assert jobs.steps_to_learn(log(1.0, 0.5, 0.95)) is None and jobs.steps_to_learn([]) is None


def test_the_table_of_initial_weights_tells_when_they_learn_and_when_never() -> None:
    (out, data), names = (
        (Path("out"), Path("data")),
        ["baseline", "init-cuda-convnet2", "init-paper", "init-he"],
    )
    runs = planned(["init"], out, data, ["--epochs", "8"], 2, set())
    assert [(run.name, run.seed) for run in runs] == [(name, seed) for seed in (0, 1) for name in names]
    own = [["--init", "cuda-convnet2", "--bias-lr", "2"], ["--init", "paper"], ["--init", "he"]]
    assert [run.arguments for run in runs[:4]] == [["--epochs", "8", *options] for options in ([], *own)]
    for run, learnt in zip(runs, [80, 140, 160, None, 100, 160, None, None], strict=True):
        run.result = {"top1": [0.1, 0.7 - 0.1 * run.seed], "top5": [1.0, 1.0], "steps_to_learn": learnt}
    lines = as_markdown({"claims": summarise(["init"], runs)}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    column = {row[0]: row[cells[0].index("learns after")] for row in cells[2:]}
    assert list(column.values()) == ["90 ± 14", "150 ± 14", "160, 1 never", "–, 2 never"]
    assert [row[cells[0].index("top-1")] for row in cells[2:]] == ["35.0 ± 7.1"] * 4


def test_errors_are_one_line(dataset: Path, tmp_path: Path) -> None:
    def ablate_output(*arguments: object, code: int) -> str:
        done = CliRunner().invoke(ablate.main, list(map(str, arguments)))
        assert done.exit_code == code, (done.output, done.exception)
        return done.output

    assert "no claim lrm" in ablate_output(dataset, "--claims", "lrm", "--out", tmp_path / "a", code=2)
    assert "give DATA" in ablate_output("--out", tmp_path / "a", code=2)
    assert "no run of these claims no-lnr" in ablate_output(
        dataset, "--only", "no-lnr", "--out", tmp_path / "a", code=2
    )
    assert "no activation rulu" in ablate_output(
        "--figure1", dataset, "--activations", "relu,rulu", "--out", tmp_path / "a", code=2
    )
    assert "build_lmdb.py" in ablate_output(tmp_path / "none", "--out", tmp_path / "a", code=1)
    (tmp_path / "a").mkdir()
    with lock(tmp_path / "a" / ".lock", "not taken"):
        assert "another tools/ablate.py" in ablate_output(
            dataset, "--gpus", 0, "--out", tmp_path / "a", code=1
        )
    # a run that fails is reported, and the table has the others
    output = ablate_output(
        dataset, "--out", tmp_path / "f", "--claims", "pool,ensemble", "--seeds", 1, "--epochs", 1, "--gpus", 0,
        "--", "--global-batch", 4096, code=1,
    )  # fmt: skip
    assert (
        "failed: baseline, seed 0: " in output
        and "fewer than one global batch" in output
        and "2 runs failed" in output
    )
    assert "| pool-2-2 |" in output and "| pool-2-2 |" in (tmp_path / "f/table.md").read_text()


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs and evaluations that take no time; returns the list of those that were started."""
    started: list[list[str]] = []

    def call(
        _workers: jobs.Workers, script: str, arguments: list[str], _slot: int, run: Any = None
    ) -> tuple[int, str]:
        started.append([script, *arguments])
        if run:
            run.out.mkdir(parents=True, exist_ok=True)
            last = {"kind": "val", "epoch": 0, "step": 3, "top1": 0.5, "top5": 1.0, "loss": 1.0}
            (run.out / "log.jsonl").write_text(json.dumps(last) + "\n")
            (run.out / "checkpoint-000000003.pt").touch()
        else:
            rows = [{"network": n, "top1": 0.5, "top5": 1.0} for n in arguments[: arguments.index("--data")]]
            rows += [{**rows[0], "network": f"average of {len(rows)}"}] * (len(rows) > 1)
            path = Path(arguments[arguments.index("--json") + 1])
            path.write_text(json.dumps({"count": 24, "top1": 0.5, "top5": 1.0, "networks": rows}))
        return 0, ""

    monkeypatch.setattr(jobs.Workers, "call", call)
    return started


def ablated(data: Path, out: Path, claims: str, *arguments: object, code: int = 0) -> str:
    """Run tools/ablate.py in this process with one epoch on the CPU; returns its output."""
    command = [data, "--out", out, "--claims", claims, "--epochs", 1, "--gpus", 0, *arguments]
    done = CliRunner().invoke(ablate.main, list(map(str, command)))
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def test_an_unfinished_run_goes_on_only_with_its_own_options(
    dataset: Path, tmp_path: Path, instant: list[list[str]]
) -> None:
    one = ["--seeds", 1, "--only", "baseline"]
    ablated(dataset, tmp_path, "lrn", *one, "--", "--dropout", "0.3")
    assert "--resume" not in instant.pop()
    for result in (True, False):
        if not result:
            (tmp_path / "baseline/seed-0/result.json").unlink()
        for other in (["--dropout", "0.4"], [], ["--dropout", "0.3", "--pool", "2,2"]):
            output = ablated(dataset, tmp_path, "lrn", *one, "--", *other, code=1)
            assert "holds a run with other options" in output and "--dropout 0.3" in output
        assert not instant
    # the same options in other words, computed in another way
    same = ["--dropout=0.30", "--workers", "3", "--log-every", "7", "--pool", "3,2"]
    ablated(dataset / "train/..", tmp_path, "lrn", *one, "--threads", 1, "--", *same)
    (again,) = instant
    assert again[-1] == "--resume"
    # a run without a checkpoint may be run again with other options
    (tmp_path / "baseline/seed-0/checkpoint-000000003.pt").unlink()
    (tmp_path / "baseline/seed-0/result.json").unlink()
    ablated(dataset, tmp_path, "lrn", *one)
    assert "--resume" not in instant[-1]


def test_a_finished_baseline_gets_the_training_error_that_another_claim_needs(
    dataset: Path, tmp_path: Path, instant: list[list[str]]
) -> None:
    ablated(dataset, tmp_path, "lrn", "--seeds", 1)
    instant.clear()
    ablated(dataset, tmp_path, "lrn,dropout", "--seeds", 1)
    (baseline,) = [c for c in instant if c[0] == "train.py" and str(tmp_path / "baseline/seed-0") in c]
    assert baseline[-1] == "--resume"
    assert [c[0] for c in instant].count("tools/evaluate.py") == 2
    rows = {row["run"]: row for row in json.loads((tmp_path / "results.json").read_text())["claims"]}
    assert rows["baseline"]["train"]["values"] == [50] and rows["no-lrn"]["train"] is None
    assert rows["dropout-0"]["train_difference"]["values"] == [0]
    instant.clear()
    ablated(dataset, tmp_path, "lrn,dropout", "--seeds", 1)
    ablated(dataset, tmp_path, "lrn", "--seeds", 1)
    assert not instant


def test_an_evaluation_is_of_the_networks_there_are(
    dataset: Path, tmp_path: Path, instant: list[list[str]]
) -> None:
    def evaluations(seeds: int) -> list[list[str]]:
        instant.clear()
        ablated(dataset, tmp_path, "ensemble", "--seeds", seeds)
        return [c[1 : c.index("--data")] for c in instant if c[0] == "tools/evaluate.py"]

    paths = [str(tmp_path / f"baseline/seed-{seed}/checkpoint-000000003.pt") for seed in range(3)]
    assert evaluations(3) == [paths] and evaluations(3) == []
    assert evaluations(2) == [paths[:2]] and evaluations(2) == []
    assert evaluations(1) == [paths[:1]] and evaluations(1) == []
    os.utime(paths[0], ns=(0, 0))
    assert evaluations(1) == [paths[:1]]
    (tmp_path / "evaluated-1.json").write_text('{"count"')
    assert evaluations(1) == [paths[:1]]


@pytest.mark.parametrize(
    ("stop", "code", "message"), [(False, 1, "out of memory"), (True, 75, "to continue")]
)
def test_the_table_is_kept_when_the_evaluation_ends_early(
    dataset: Path,
    tmp_path: Path,
    instant: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    stop: bool,
    code: int,
    message: str,
) -> None:
    train, before = jobs.Workers.call, signal.getsignal(signal.SIGTERM)

    def call(
        workers: jobs.Workers, script: str, arguments: list[str], slot: int, run: Any = None
    ) -> tuple[int, str]:
        assert signal.getsignal(signal.SIGTERM) is not before
        if script == "train.py":
            return train(workers, script, arguments, slot, run)
        if stop:
            signal.raise_signal(signal.SIGTERM)
        return 1, "out of memory"

    monkeypatch.setattr(jobs.Workers, "call", call)
    output = ablated(dataset, tmp_path, "lrn,ensemble", "--seeds", 1, code=code)
    assert message in output and "| no-lrn |" in (tmp_path / "table.md").read_text()
    assert signal.getsignal(signal.SIGTERM) is before


def test_shards_of_another_cifar_are_not_taken(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def build(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        built.append(command)
        (tmp_path / "cifar/val").mkdir(parents=True, exist_ok=True)
        (tmp_path / "cifar/val/manifest.json").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(figure1.subprocess, "run", build)
    archive = tmp_path / "cifar.tar.gz"
    archive.touch()
    assert figure1.cifar_shards(archive, tmp_path) == tmp_path / "cifar"
    assert figure1.cifar_shards(tmp_path / "cifar/../cifar.tar.gz", tmp_path) == tmp_path / "cifar"
    with pytest.raises(ModelError, match="was built from another version"):
        figure1.cifar_shards(class_folders, tmp_path)
    archive.write_text("another")
    with pytest.raises(ModelError, match="was built from another version"):
        figure1.cifar_shards(archive, tmp_path)
    with pytest.raises(ModelError, match="cannot read"):
        figure1.cifar_shards(tmp_path / "none", tmp_path)
    assert len(built) == 1


def test_every_job_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "4,7")
    assert [jobs.visible_gpu(i) for i in range(2)] == ["4", "7"]
    monkeypatch.delitem(os.environ, "CUDA_VISIBLE_DEVICES")
    assert [jobs.visible_gpu(i) for i in range(2)] == ["0", "1"]
