"""Config: defaults that depend on the number of images, and options from files."""

import json
import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from subprocess import run
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest
import torch
from helpers import ROOT, train_error, train_here

import train
from base.errors import ModelError
from base.files import lock
from model.alexnet import ACTIVATIONS, DROPPABLE, VARIANTS
from model.parallel.layouts import LAYOUTS
from model.parallel.ranks import Ranks
from model.training import recipe
from model.training.config import Config, command
from model.training.log import Log, duration
from model.training.state import TrainState
from model.training.watch import Watch
from pipeline.load.plan import AUGMENTATIONS
from pipeline.preprocess import MEANS


def given(*arguments: object) -> Config:
    with train.main.make_context("train.py", list(map(str, arguments))) as context:
        return Config(**context.params)


@pytest.mark.parametrize(
    ("images", "batch", "lr", "schedule", "warmup"),
    [
        (20, 20, 0.004, "cosine", 1),
        (500, 32, 0.005, "cosine", 1),
        (2_934, 32, 0.005, "cosine", 1),
        (8_144, 64, 0.0071, "cosine", 1),
        (50_000, 128, 0.01, "cosine", 1),
        (1_281_167, 128, 0.01, "plateau", 0),
    ],
)
def test_few_images_get_small_batches_and_imagenet_the_papers_values(
    images: int, batch: int, lr: float, schedule: str, warmup: float
) -> None:
    config = Config()
    output = config.fill(images)
    assert (config.global_batch, config.schedule, config.warmup_epochs) == (batch, schedule, warmup)
    assert (config.lr, config.init, config.variant, config.mean) == (lr, "torch", "paper", "pixel")
    assert f"{images:,} training images" in output and f"batches of {batch}" in output and schedule in output


def test_what_is_given_stays() -> None:
    config = given(
        "--global-batch", 7, "--lr", 0.5, "--schedule", "step", "--warmup-epochs", 0, "--init", "paper"
    )
    config.fill(500)
    assert (config.global_batch, config.lr, config.schedule, config.warmup_epochs) == (7, 0.5, "step", 0)
    assert config.init == "paper"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_a_start(variant: str) -> None:
    config = Config(variant=variant)
    config.fill(1000)
    assert config.init in recipe.INITS


def test_the_choices_are_those_of_the_modules_that_use_them() -> None:
    """Config repeats them because it must not import torch."""
    choices = {
        f.name: tuple(f.metadata["type"].choices)
        for f in fields(Config)
        if isinstance(f.metadata["type"], click.Choice)
    }
    assert choices["variant"] == tuple(VARIANTS) and choices["activation"] == tuple(ACTIVATIONS)
    assert choices["drop_layer"] == DROPPABLE and choices["layout"] == LAYOUTS
    assert choices["init"] == tuple(recipe.INITS) and choices["optimizer"] == recipe.OPTIMIZERS
    assert choices["schedule"] == recipe.SCHEDULES
    assert set(choices["mean"]) == set(MEANS) and set(choices["augment"]) == set(AUGMENTATIONS)


def test_help_is_in_groups_and_needs_neither_torch_nor_dali() -> None:
    code = (
        "import sys, train\n"
        "try:\n    train.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'nvidia', 'cv2', 'tqdm'} & sys.modules.keys())"
    )
    output = run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert output.splitlines()[-1] == "set()"
    titles = [line for line in output.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:6] == ["Data:", "Network:", "Training:", "Regularisation:", "Speed:", "Run:"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"keep": 0}, "keep cannot be 0"),
        ({"lr": "fast"}, "lr cannot be 'fast'"),
        ({"global_batch": [1]}, "global_batch cannot be"),
        ({"drop_layer": "conv2"}, "drop_layer cannot be"),
        ({"learning_rate": 1}, "options that train.py does not know: learning_rate"),
        ([1], "not a config.json"),
    ],
)
def test_a_config_file_of_another_making_is_refused_in_one_line(
    content: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        given("--config", tmp_path / "config.json")


def test_a_strangers_config_sends_nothing_away(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"wandb": True, "out": "/elsewhere", "lr": 0.25}))
    config = given("--config", tmp_path / "config.json")
    assert (config.wandb, config.out, config.lr) == (False, None, 0.25)


def test_two_trainings_in_one_folder_are_kept_apart(dataset: Path, tmp_path: Path) -> None:
    options = ["--data", dataset, "--out", tmp_path, "--crop", 63, "--epochs", 1, "--global-batch", 32]
    with lock(tmp_path / ".lock", "taken"):
        done = train_here(*options)
    assert done.exit_code == 1 and "another train.py writes to" in done.output
    assert not (tmp_path / "config.json").exists()
    assert train_here(*options).exit_code == 0


def test_the_first_rate_is_that_of_training_alone(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock starts after the loaders and the log, which may take many seconds."""
    from model.training.log import Log
    from model.training.state import TrainState
    from pipeline.load import loader

    order: list[str] = []

    def noted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            order.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (loader, "train_loader"),
        (loader, "eval_loader"),
        (Log, "__init__"),
        (TrainState, "start_window"),
        (loader.Loader, "__next__"),
    ):
        noted(owner, name)
    options = ["--data", dataset, "--out", tmp_path, "--crop", 63, "--epochs", 1, "--global-batch", 32]
    assert train_here(*options).exit_code == 0
    assert order[:5] == ["train_loader", "eval_loader", "__init__", "start_window", "__next__"]


@pytest.mark.parametrize("steps_per_epoch", [91, 1000])
def test_the_estimate_is_printed_once_at_the_rate_of_the_first_hundred_steps(steps_per_epoch: int) -> None:
    """8 epochs in batches of 32; the first 20 steps take 2 s each and the others 0.5 s."""
    state = SimpleNamespace(
        _estimate_step=100, _measured_seconds=0.0, _measured_images=0, checkpoint_bytes=4.5e8
    )
    state.plan = SimpleNamespace(steps_per_epoch=steps_per_epoch, global_batch=32)
    state.config = SimpleNamespace(epochs=8, save_every=0, keep=3)
    state.end_step = 8 * steps_per_epoch
    lines = {}
    for step in (
        [*range(20, 90, 20), 91, *range(100, 300, 20)] if steps_per_epoch == 91 else range(20, 300, 20)
    ):
        state.step, state.epoch_ends = step, step % steps_per_epoch == 0
        state.images_left = (state.end_step - step) * 32
        state._measured_images = step * 32
        state._measured_seconds = 40 + 0.5 * (step - 20)
        if line := TrainState.estimate(cast(TrainState, state)):
            lines[step] = line
    when, per_step = (91, (40 + 35.5) / 91) if steps_per_epoch == 91 else (100, 80 / 100)
    rest, files = (
        per_step * (8 * steps_per_epoch - when),
        "up to 4 checkpoints of 450 MB take 1.8 GB, and 2.2 GB",
    )
    assert lines == {
        when: f"at {32 / per_step:,.0f} images/s an epoch takes {duration(per_step * steps_per_epoch)} and the "
        f"rest of the run {duration(rest)}, without validation; {files} while one is written"
    }
    assert [duration(s) for s in (0.2, 89, 90, 3599, 9600, 49 * 3600)] == [
        "1 s", "89 s", "2 min", "1 h 0 min", "2 h 40 min", "2 days 1 h"
    ]  # fmt: skip


def test_the_rate_of_the_estimate_is_that_of_all_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of 20 steps in 40 s, then one of 10 in 5 s."""
    clock = iter([40.0, 40.0, 45.0, 45.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    state = SimpleNamespace(ranks=Ranks(), step=20, data_wait=0.0, _window_start=0.0, _window_step=0)
    state.config = SimpleNamespace(train_error=False, folder=tmp_path)
    state.plan = SimpleNamespace(global_batch=32)
    state.loss_sum, state.correct, state.label_counts = torch.ones(()), torch.zeros(()), torch.tensor([1, 1])
    state.watch, state.scaler = Watch(2), torch.amp.GradScaler("cpu", enabled=False)
    state.optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    state.start_window = lambda: TrainState.start_window(cast(TrainState, state))
    state._measured_seconds, state._measured_images = 0.0, 0
    assert TrainState.end_window(cast(TrainState, state))["images_per_s"] == 20 * 32 / 40
    state.step = 30
    assert TrainState.end_window(cast(TrainState, state))["images_per_s"] == 10 * 32 / 5
    assert (state._measured_images, state._measured_seconds) == (30 * 32, 45)


def test_the_progress_bar_shows_the_time_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(tmp_path, progress=True)
    for step in range(3):
        log.bar(4, step, 10)
        log.remaining(600 - 120 * step)
        row = {"images_per_s": 78.0, "loss": 1.25, "lr": 0.01, "data_wait": 0.0, "steps": 1}
        log.write("train", epoch=4, step=step + 1, **row)
    log.close()
    shown = capsys.readouterr().err
    assert "epoch 5" in shown and "10 min left" in shown and "6 min left" in shown.split("10 min left")[-1]


def test_a_finished_run_says_so_and_keeps_its_config(dataset: Path, tmp_path: Path) -> None:
    options = ["--data", dataset, "--out", tmp_path, "--crop", 63, "--global-batch", 48]
    assert train_here(*options, "--epochs", 2).exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = train_here("--out", tmp_path, "--resume")
    assert done.exit_code == 0 and "is finished, 2 epochs" in done.output
    done = train_here("--out", tmp_path, "--resume", "--epochs", 1)
    assert done.exit_code == 1 and "has 2 epochs already" in done.output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"keep": 0}, "keep cannot be 0"),
        ({"milestones": ["1"]}, "milestones cannot be"),
        ({"epochs": "many"}, "epochs cannot be 'many'"),
        ({"data": {}}, "data cannot be"),
    ],
)
def test_resume_reads_a_run_folder_of_another_making_as_strictly(
    content: Any, message: str, tmp_path: Path
) -> None:
    """Otherwise `keep` 0 would delete all checkpoints except the best."""
    (tmp_path / "config.json").write_text(json.dumps(content))
    for step in range(3):
        (tmp_path / f"checkpoint-{step:09d}.pt").write_bytes(b"")
    error = train_error("--out", tmp_path, "--resume")
    assert f"{tmp_path / 'config.json'}: {message}" in error
    assert len(list(tmp_path.glob("checkpoint-*.pt"))) == 3


def test_resume_sends_nothing_away_unless_asked_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"wandb": True, "lr": 0.25}))
    (tmp_path / "checkpoint-000000001.pt").write_bytes(b"")
    seen: list[Config] = []
    command(seen.append).main(["--out", str(tmp_path), "--resume"], standalone_mode=False)
    command(seen.append).main(["--out", str(tmp_path), "--resume", "--wandb"], standalone_mode=False)
    assert [(config.wandb, config.lr) for config in seen] == [(False, 0.25), (True, 0.25)]


@pytest.mark.parametrize("content", [None, "[" * 100_000, " " * (1 << 21)])
def test_a_config_that_is_a_pipe_or_huge_or_deep_is_one_line(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_text(content)
    (tmp_path / "checkpoint-000000001.pt").write_bytes(b"")
    for arguments in (("--config", path), ("--out", tmp_path, "--resume")):
        assert f"{path} is not a config.json" in train_error(*arguments)
