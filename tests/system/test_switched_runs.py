"""Runs with changed switches: resuming, refusals, and the checkpoints in the tools."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_train, train_error

from model.parallel.ranks import Ranks
from model.training.checkpoint import Checkpoints, load
from model.training.config import checkpoint_paths
from pipeline.shards import ShardReader
from tools.lib.runs import load_run
from tools.lib.scores import score_split

TINY = [
    "--gpus",
    0,
    "--crop",
    63,
    "--global-batch",
    32,
    "--workers",
    0,
    "--decode-threads",
    1,
    "--amp",
    "off",
]
TINY += ["--no-progress", "--no-tensorboard", "--log-every", 1, "--init", "torch", "--lr", 0.003]
MODERN = ["--mixup", 0.4, "--ema", 0.9, "--label-smoothing", 0.1]


def run(data: Any, out: Any, *arguments: Any) -> None:
    run_train("--data", data, "--out", out, *TINY, *arguments)


@pytest.fixture(scope="module")
def switched(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two epochs with all switches changed."""
    out = tmp_path_factory.mktemp("runs") / "switched"
    arguments = ["--no-lrn", "--groups", 1, "--pool", "2,2", "--drop-layer", "conv3", "--activation", "tanh"]
    run(dataset, out, "--epochs", 2, *arguments, *MODERN, "--train-error")
    return out


def test_the_tools_rebuild_the_network_and_evaluate_the_averaged_weights(
    switched: Path, dataset: Path
) -> None:
    saved = Checkpoints(switched).newest()
    assert saved["network"] == {
        "activation": "tanh", "groups": 1, "lrn": False, "pool": [2, 2], "drop_layers": ["conv3"],
    }  # fmt: skip
    trained = load_run(checkpoint_paths(switched)[0])
    assert "conv3" not in dict(trained.network.features.named_children())
    for key, value in trained.network.state_dict().items():
        assert torch.equal(value, saved["ema"]["model"][key])
    assert any(not torch.equal(saved["model"][k], saved["ema"]["model"][k]) for k in saved["model"])
    logged = [json.loads(line) for line in (switched / "log.jsonl").read_text().splitlines()]
    (scores,) = score_split([trained], ShardReader(dataset / "val"), Ranks(), workers=0, progress=False)
    ours = scores.overall()
    validation = [entry for entry in logged if entry["kind"] == "val"][-1]
    assert ours["top1"] == validation["top1"] and ours["loss"] == pytest.approx(validation["loss"], rel=1e-5)
    errors = [entry["error"] for entry in logged if entry["kind"] == "train"]
    assert len(errors) == 6 and all(error * 32 == pytest.approx(round(error * 32)) for error in errors)


def test_mixup_and_averaging_resume_in_mid_epoch_bit_for_bit(
    switched: Path, dataset: Path, tmp_path: Path
) -> None:
    """From step 4, in the middle of the second epoch, to the same weights and averages."""
    arguments = ["--no-lrn", "--groups", 1, "--pool", "2,2", "--drop-layer", "conv3", "--activation", "tanh"]
    out = tmp_path / "part"
    options = ["--epochs", 2, *arguments, *MODERN, "--train-error", "--save-every", 4]
    run(dataset, out, *options)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
    for path in checkpoint_paths(out):
        if load(path)["step"] > 4:
            path.unlink()
    assert Checkpoints(out).newest()["step"] == 4
    run(dataset, out, "--resume")
    whole, resumed = Checkpoints(switched).newest(), Checkpoints(out).newest()
    assert whole["step"] == resumed["step"] == 6 and whole["ema"]["steps"] == resumed["ema"]["steps"] == 6
    for a, b in ((whole["model"], resumed["model"]), (whole["ema"]["model"], resumed["ema"]["model"])):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_mixup_is_the_same_for_any_number_of_parts_and_ranks(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "one", "--epochs", 1, *MODERN)
    run(dataset, tmp_path / "two", "--epochs", 1, *MODERN, "--cpu-ranks", 2, "--accumulate", 2)
    one, two = (Checkpoints(tmp_path / name).newest() for name in ("one", "two"))
    for part in (lambda s: s["model"], lambda s: s["ema"]["model"]):
        for key, value in part(one).items():
            torch.testing.assert_close(value, part(two)[key], atol=5e-5, rtol=1e-3)


def test_a_resume_with_other_switches_is_refused(switched: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(switched, out)
    for option, name in ((["--lrn"], "lrn"), (["--groups", 2], "groups"), (["--ema", 0.5], "ema")):
        assert f"has {name} " in train_error("--data", dataset, "--out", out, "--resume", *option)
    # even if config.json was edited, because the checkpoint has the options, too
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"pool": "3,2"}))
    assert "has network {" in train_error("--data", dataset, "--out", out, "--resume")
    (out / "config.json").write_text(json.dumps(config | {"ema": 0}))
    assert "--ema" in train_error("--data", dataset, "--out", out, "--resume")
