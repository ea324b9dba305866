"""tools/evaluate.py against a slow reference in NumPy, one image at a time."""

import csv
import json
import os
import pickle
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers import CROP, make_run, softmax
from numpy.typing import ArrayLike

from model.parallel.ranks import Ranks, launch
from model.training import checkpoint
from model.training.evaluation import evaluate as evaluate_in_training
from model.training.evaluation import log_probabilities
from pipeline.load.loader import eval_loader
from pipeline.preprocess import stored_image
from pipeline.shards import Manifest, ShardReader
from tools import evaluate as tool
from tools.lib.figures import confusion_figure
from tools.lib.runs import Classes, class_names, load_run
from tools.lib.scores import Scores, as_csv, score_split

QUICK = ["--gpus", "0", "--workers", "0", "--no-progress"]


def invoke(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(tool.main, [*map(str, arguments), *QUICK])
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "a", dataset), make_run(folder / "b", dataset, "bn", mean="channel", seed=1)]


CENTER = 8  # of the ten views below


Reference = tuple[list[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def reference(runs: list[Path], dataset: Path) -> Reference:
    """For each run the softmax of the ten views of each image, (count, 10, classes); and the labels."""
    edge = 256 - CROP
    corners = [(0, 0), (0, edge), (edge, 0), (edge, edge), (edge // 2, edge // 2)]
    reader = ShardReader(dataset / "val")
    labels = np.array([reader.read(i)[1] for i in range(len(reader))])
    softmaxes = []
    for trained in map(load_run, runs):
        each = []
        for index in range(len(reader)):
            image = stored_image(reader, index).astype(np.float32) - trained.preprocess.mean
            crops = [image[top : top + CROP, left : left + CROP] for top, left in corners]
            views = np.stack([view for crop in crops for view in (crop, crop[:, ::-1])])
            with torch.no_grad():
                logits = trained.network(torch.tensor(views).permute(0, 3, 1, 2))
            each.append(softmax(logits.double().numpy()))
        softmaxes.append(np.stack(each))
    return softmaxes, labels


def expected(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    best = np.argsort(-probabilities, axis=1)
    return {
        "loss": -np.log(probabilities[range(len(labels)), labels]).mean(),
        "top1": (best[:, 0] == labels).mean(),
        "top5": (best[:, :5] == labels[:, None]).any(1).mean(),
        "count": len(labels),
    }


def test_without_data_it_is_the_runs_own(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", dataset)
    (run / "config.json").write_text(json.dumps({"data": str(dataset)}))
    assert "24 images of" in invoke(run).output
    assert "24 images of" in invoke(run / "best.pt").output
    assert f"there is no run at {tmp_path / 'ran'}" in invoke(tmp_path / "ran", code=1).output
    (run / "config.json").write_text(json.dumps({"data": "gone"}))
    assert (
        "was trained on gone, which is not found from the current folder: give --data"
        in invoke(run, code=1).output
    )
    for text in ("// another program's", "[1]", "null", '{"data": 3}', "{}"):
        (run / "config.json").write_text(text)
        assert "no data set in data/imagenet/val" in invoke(run, code=1).output
    (run / "config.json").unlink()
    assert "no data set in data/imagenet/val" in invoke(run, code=1).output


@pytest.mark.parametrize("crops", [1, 10])
def test_one_network_and_an_ensemble_equal_the_slow_reference(
    runs: list[Path], reference: Reference, dataset: Path, tmp_path: Path, crops: int
) -> None:
    invoke(*runs, "--data", dataset, "--crops", crops, "--batch", 50, "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    softmaxes, labels = reference
    first, second = (s.mean(1) if crops == 10 else s[:, CENTER] for s in softmaxes)
    wanted = [expected(p, labels) for p in (first, second, (first + second) / 2)]
    assert [row["network"] for row in found["networks"]][2] == "average of 2"
    for row, numbers in zip(found["networks"], wanted, strict=True):
        assert {k: row[k] for k in numbers} == pytest.approx(numbers, rel=2e-4)
    assert found["count"] == len(labels) == 24 and found["crops"] == crops


def test_training_validates_the_same(runs: list[Path], dataset: Path) -> None:
    trained, reader = load_run(runs[0]), ShardReader(dataset / "val")
    loader = eval_loader(reader, trained.preprocess, 7, workers=0)
    wanted = evaluate_in_training(trained.network, loader, Ranks())
    (found,) = score_split([trained], reader, Ranks(), batch=5, workers=0, progress=False)
    assert found.overall() == pytest.approx(wanted, rel=1e-5)


def _two_ranks(ranks: Ranks, config: tuple[list[Path], Path, Path]) -> None:
    runs, data, out = config
    torch.set_num_threads(1)
    networks = [load_run(run) for run in runs]
    results = score_split(networks, ShardReader(data / "val"), ranks, batch=5, workers=0, progress=False)
    if ranks.first:
        out.write_bytes(pickle.dumps(results))


@pytest.mark.slow
def test_ranks_share_the_images_and_count_each_once(runs: list[Path], dataset: Path, tmp_path: Path) -> None:
    launch(_two_ranks, (runs, dataset, tmp_path / "two"), 2, gpu=False)
    two = pickle.loads((tmp_path / "two").read_bytes())
    networks = [load_run(run) for run in runs]
    alone = score_split(networks, ShardReader(dataset / "val"), Ranks(), workers=0, progress=False)
    assert len(two) == len(alone) == 3
    for found, wanted in zip(two, alone, strict=True):
        for name in ("labels", "guesses", "in_top"):
            assert np.array_equal(getattr(found, name), getattr(wanted, name))
        np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-4, atol=1e-4)


def test_classes_and_confusion_add_up(
    runs: list[Path], reference: Reference, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new folder"
    (tmp_path / "val").symlink_to(dataset / "val")  # without train/, because the mean is in the checkpoint
    output = invoke(
        runs[0], "--data", tmp_path, "--csv", out / "c.csv", "--confusion", out / "c.png", "--json", "-"
    )
    result = json.loads(output.stdout)  # nothing else is on standard output
    (first, _), labels = reference
    guesses = first[:, CENTER].argmax(1)
    rows = list(csv.DictReader((out / "c.csv").open()))
    assert [row["wnid"] for row in rows] == ["astronaut", "chelsea", "coffee", "rocket"]
    for label, row in enumerate(rows):
        own = guesses[labels == label]
        assert int(row["images"]) == len(own)
        assert float(row["top1"]) == pytest.approx((own == label).mean(), abs=1e-6)
    correct = sum(float(row["top1"]) * int(row["images"]) for row in rows)
    assert correct / 24 == pytest.approx(result["top1"], abs=1e-6)
    picture = cv2.imread(str(out / "c.png"))
    assert picture is not None and min(picture.shape[:2]) > 300


def scores_of(labels: ArrayLike, guesses: ArrayLike, classes: int) -> Scores:
    labels, guesses = np.array(labels, np.int32), np.array(guesses, np.int32)
    losses = np.zeros(len(labels), np.float32)
    return Scores(labels, guesses, in_top=labels == guesses, losses=losses, classes=classes)


def test_confusion_pairs_are_true_then_guess_and_become_a_map_of_true_rows() -> None:
    scores = scores_of([0, 0, 1, 2, 2, 2], [1, 0, 1, 0, 0, 1], 3)
    pairs = scores.confusion()
    assert [a.tolist() for a in pairs] == [[0, 0, 1, 2, 2], [0, 1, 1, 0, 1], [1, 1, 1, 2, 1]]
    classes: Classes = [{"wnid": wnid, "name": None} for wnid in "abc"]
    shown = np.asarray(confusion_figure(pairs, classes).axes[0].images[0].get_array())
    np.testing.assert_allclose(shown, [[1 / 2, 1 / 2, 0.0], [0.0, 1.0, 0.0], [2 / 3, 1 / 3, 0.0]])
    mistakes = [(row["mistaken_for"], row["mistaken_images"]) for row in scores.per_class(classes)]
    assert mistakes == [("b", 1), ("", 0), ("a", 2)]


def test_memory_does_not_grow_with_images_times_classes() -> None:
    """A matrix of 20,000 x 20,000 classes would take gigabytes."""
    n = 20_000
    random = np.random.default_rng(0)
    classes: Classes = [{"wnid": f"n{i:08d}", "name": f"class ${i}"} for i in range(n)]
    tracemalloc.start()
    try:
        scores = scores_of(random.permutation(n), random.integers(0, n, n), n)
        assert all(array.ndim == 1 for array in vars(scores).values() if isinstance(array, np.ndarray))
        assert scores.overall()["count"] == n
        table = as_csv(scores.per_class(classes))
        figure = confusion_figure(scores.confusion(), classes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150e6, peak
    assert len(table.splitlines()) == n + 1
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown.shape == (1000, 1000)  # each cell stands for 20 x 20


def test_judging_keeps_some_bytes_an_image(dataset: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dataset)
    (scores,) = score_split([load_run(run)], ShardReader(dataset / "val"), Ranks(), workers=0, progress=False)
    arrays = [value for value in vars(scores).values() if isinstance(value, np.ndarray)]
    assert [array.shape for array in arrays] == [(24,)] * 4
    assert sum(array.nbytes for array in arrays) == 13 * 24


def test_names_are_split_only_where_they_are_synonyms_and_always_tell_classes_apart() -> None:
    def names(*pairs: tuple[str, str | None]) -> list[str]:
        return class_names([{"wnid": wnid, "name": name} for wnid, name in pairs])

    assert names(("n1", "tench, Tinca tinca"), ("apple, red", None)) == ["tench", "apple, red"]
    assert names(("apple, green", None), ("apple, red", None)) == ["apple, green", "apple, red"]
    assert names(("n1", "crane"), ("n2", "crane, lifter"), ("n3", "dog")) == ["crane", "crane, lifter", "dog"]
    assert names(("n1", "maillot"), ("n2", "maillot")) == ["maillot (n1)", "maillot (n2)"]


def renamed(dataset: Path, out: Path, classes: Classes) -> tuple[Path, Path]:
    """A copy of the data set's val with other class names, and a run with these classes."""
    shutil.copytree(dataset / "val", out / "data" / "val")
    manifest = replace(Manifest.load(dataset / "val"), classes=classes)
    manifest.save(out / "data" / "val")
    run = make_run(out / "run", dataset)
    checkpoint.save(run / "best.pt", checkpoint.load(run / "best.pt") | {"classes": classes})
    return run, out / "data"


def test_hostile_class_names_reach_tables_and_pictures_unharmed(dataset: Path, tmp_path: Path) -> None:
    wnids = ["caf\udce9", "=HYPERLINK(1)", "a\x1b[31m", "猫"]
    run, data = renamed(dataset, tmp_path, [{"wnid": wnid, "name": None} for wnid in wnids])
    out = tmp_path / "out"
    invoke(
        run, "--data", data, "--csv", out / "c.csv", "--confusion", out / "c.png", "--json", out / "j.json"
    )
    rows = list(csv.DictReader((out / "c.csv").open(encoding="utf-8")))
    assert [row["wnid"] for row in rows] == ["caf\\xe9", "'=HYPERLINK(1)", "a\\x1b[31m", "猫"]
    assert cv2.imread(str(out / "c.png")) is not None
    (run / "best.pt").rename(run / os.fsdecode(b"best \xe9.pt"))
    printed = invoke(run / os.fsdecode(b"best \xe9.pt"), "--data", data).stdout
    assert "best \\xe9.pt" in printed


def one_line(done: Result) -> str:
    assert re.fullmatch(r"(Usage: .*\n.*\n\n)?Error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


def test_errors_are_one_line(runs: list[Path], dataset: Path, tmp_path: Path) -> None:
    state = checkpoint.load(runs[0] / "best.pt")
    wnids = [*state["classes"][:-1], {"wnid": "teapot", "name": None}]
    checkpoint.save(tmp_path / "other.pt", state | {"classes": wnids})
    error = one_line(invoke(tmp_path / "other.pt", "--data", dataset, code=1))
    assert "label 3 is 'teapot' there and 'rocket' here" in error
    assert "no run at" in one_line(invoke(tmp_path / "none", "--data", dataset, code=1))
    assert "no data set" in one_line(invoke(runs[0], "--data", tmp_path, code=1))
    checkpoint.save(tmp_path / "strange.pt", {"weights": 1})
    assert "not a checkpoint of" in one_line(invoke(tmp_path / "strange.pt", "--data", dataset, code=1))
    (tmp_path / "file").touch()
    error = one_line(invoke(runs[0], "--data", dataset, "--csv", tmp_path / "file" / "c.csv", code=1))
    assert "cannot write" in error
    error = one_line(invoke(runs[0], "--data", dataset, "--confusion", tmp_path / "c.xyz", code=1))
    assert "c.png" in error


@pytest.mark.parametrize(("amp", "expected"), [(None, (False, "highest")), (torch.bfloat16, (True, "high"))])
def test_without_amp_a_gpu_computes_in_float32_and_not_in_tf32(
    amp: torch.dtype | None, expected: tuple[bool, str]
) -> None:
    def precision() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    seen = []

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(precision())
            return x.flatten(1)

    torch.set_float32_matmul_precision("high")
    try:
        log_probabilities(Network(), torch.ones(2, 3, 1, 1), amp)
        assert seen == [expected] and precision() == (True, "high")
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@pytest.mark.parametrize("crops", [1, 10])
def test_a_gpu_scores_as_the_cpu_does(runs: list[Path], dataset: Path, tmp_path: Path, crops: int) -> None:
    results = []
    for gpus in (0, 1):
        path = tmp_path / f"{gpus}.json"
        options = ["--data", dataset, "--crops", crops, "--json", path, "--no-progress", "--gpus", gpus]
        done = CliRunner().invoke(tool.main, list(map(str, [runs[0], *options])))
        assert done.exit_code == 0, done.output
        results.append(json.loads(path.read_text()))
    assert results[0]["count"] == results[1]["count"]
    # nvJPEG's pixels differ by a few levels from libjpeg-turbo's
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=0.05)
