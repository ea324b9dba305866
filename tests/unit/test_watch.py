"""Detection of a network that only guesses, and the message."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import newest, train_here

from model.training.config import Config
from model.training.watch import Watch


def test_the_level_of_guessing_is_the_entropy_of_the_labels() -> None:
    watch = Watch(3)
    watch.add(1.0, 10, torch.tensor([50, 25, 25]))
    assert watch.guess() == pytest.approx(-(0.5 * math.log(0.5) + 0.5 * math.log(0.25)))
    smoothed = Watch(3, smoothing=0.3)
    smoothed.add(1.0, 10, torch.tensor([100, 0, 0]))
    assert smoothed.guess() == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.1)))


def test_a_stuck_run_is_reported_once_and_not_before_it_had_time() -> None:
    watch, counts = Watch(2), torch.tensor([50, 50])

    def epoch(loss: float, step: int, last: bool = False) -> bool:
        watch.add(loss, 100, counts)
        return watch.epoch_ends(step, last) is not None

    assert not epoch(0.69, 100) and not epoch(0.69, 200)
    assert epoch(0.69, 300) and not epoch(0.69, 400) and not watch.learnt
    other = Watch(2)
    other.load_state_dict(watch.state_dict())
    assert other.warned and not other.learnt
    assert not epoch(0.6, 500) and watch.learnt
    assert not epoch(0.69, 600, last=True) and watch.learnt  # a network that has learnt is not reported later
    short = Watch(2, steps_per_epoch=10)
    short.add(0.69, 10, counts)
    assert short.epoch_ends(10, last=True) == pytest.approx({"loss": 0.69, "guess": math.log(2)})


def test_labels_that_are_rare_by_chance_are_not_learning() -> None:
    """A constant guess is compared with the best constant guess for the same images, however rare a class is."""
    watch, random = Watch(2), torch.Generator().manual_seed(1)
    log_shares = torch.tensor([0.99, 0.01]).log()
    for _ in range(500):
        labels = torch.rand(20 * 32, generator=random) < 0.01
        counts = torch.tensor([(~labels).sum(), labels.sum()])
        watch.add(-(counts * log_shares).sum().item() / len(labels), 20, counts)
    assert not watch.learnt
    watch.add(0.0, 100, counts)
    assert watch.learnt


def test_the_state_of_earlier_versions_is_taken() -> None:
    watch = Watch(2, steps_per_epoch=20)
    watch.load_state_dict(
        {"learnt": False, "warned": True, "loss": 13.8, "steps": 20, "counts": torch.tensor([320, 320])}
    )
    assert watch.warned and (watch.loss(), watch.guess()) == pytest.approx((0.69, math.log(2)))
    watch.load_state_dict(
        {"learnt": True, "warned": False, "loss": 0.0, "steps": 0, "counts": torch.tensor([0, 0])}
    )
    assert watch.learnt and not watch.recent


def test_the_last_steps_count_however_long_the_plateau_was_before() -> None:
    """ImageNet's first epoch: 8,000 steps on the plateau, then 2,000 with a loss that falls to 5.5."""
    watch, counts = Watch(1000), torch.full((1000,), 3)
    for step in range(0, 10_000, 20):
        watch.add(6.908 if step < 8_000 else 6.908 - 1.4 * (step - 8_000) / 2_000, 20, counts)
        assert watch.learnt == (step >= 8_540)  # the mean of the last 100 steps is below 0.95 of the entropy
    assert watch.epoch_ends(10_009, last=False) is None
    other = Watch(1000)
    other.add(6.0, 20, counts)  # one line can be low by chance
    assert not other.learnt
    other.load_state_dict(watch.state_dict())
    assert other.loss() == watch.loss() and other.guess() == watch.guess()


@pytest.mark.parametrize(
    ("options", "poor"),
    [
        ({"variant": "paper", "init": "paper"}, True),
        ({"variant": "owt", "init": "he"}, True),
        ({"variant": "bn", "init": "he"}, False),  # its default
        ({"variant": "paper", "init": "torch"}, False),
        ({"variant": "paper", "init": "paper", "weights": Path("run")}, False),
    ],
)
def test_the_remedy_is_other_initial_weights_where_they_are_the_cause(
    options: dict[str, Any], poor: bool
) -> None:
    config, losses = Config(**options), {"loss": 1.0, "guess": 1.0}
    assert ("--init torch" in Watch(2).advice(losses, 400, config.poor_start)) == poor
    assert ("train longer" in Watch(2).advice(losses, 200, False)) and config.poor_start == poor


def test_a_network_that_cannot_learn_says_so_and_keeps_its_rate(dataset: Path, tmp_path: Path) -> None:
    options = ["--data", dataset, "--out", tmp_path, "--crop", 63, "--schedule", "plateau", "--patience", 1]
    done = train_here(*options, "--epochs", 3, "--lr", 1e-12, "--init", "paper")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if "only guesses" in line]
    assert "classes gives 1.386;" in line and "--init torch" in line
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (entry,) = [entry for entry in log if entry["kind"] == "guessing"]
    assert entry["step"] == 9 and entry["guess"] == pytest.approx(math.log(4), rel=1e-4)
    assert newest(tmp_path)["schedule"]["drops"] == 0


def test_a_network_that_learns_is_left_in_peace(dataset: Path, tmp_path: Path) -> None:
    done = train_here("--data", dataset, "--out", tmp_path, "--crop", 63, "--epochs", 6, "--global-batch", 16)
    assert done.exit_code == 0, done.output
    assert "guess" not in done.output and newest(tmp_path)["watch"]["learnt"]
