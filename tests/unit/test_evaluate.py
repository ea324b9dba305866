"""tools/evaluate.py against a slow reference: one image at a time, in NumPy."""

import csv
import json
import re

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import CROP, make_run, softmax

from model.parallel.ranks import Ranks, launch
from model.training import checkpoint
from model.training.evaluation import evaluate as evaluate_in_training
from model.training.evaluation import log_probabilities
from pipeline.load.loader import eval_loader
from pipeline.preprocess import stored_image
from pipeline.shards import ShardReader
from tools import evaluate as tool
from tools.common import load_run

QUICK = ["--gpus", "0", "--workers", "0", "--no-progress"]


def invoke(*arguments, code=0):
    done = CliRunner().invoke(tool.main, [*map(str, arguments), *QUICK])
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "a", dataset), make_run(folder / "b", dataset, "bn", mean="channel", seed=1)]


CENTER = 8  # of the ten views below


@pytest.fixture(scope="module")
def reference(runs, dataset):
    """For each run the softmax of ten views (count, 10, classes), image by image; and the labels."""
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


def expected(probabilities, labels):
    best = np.argsort(-probabilities, axis=1)
    return {
        "loss": -np.log(probabilities[range(len(labels)), labels]).mean(),
        "top1": (best[:, 0] == labels).mean(),
        "top5": (best[:, :5] == labels[:, None]).any(1).mean(),
        "count": len(labels),
    }


def test_without_data_it_is_the_runs_own(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", dataset)
    (run / "config.json").write_text(json.dumps({"data": str(dataset)}))
    assert "24 images of" in invoke(run).output
    assert "24 images of" in invoke(run / "best.pt").output
    assert f"there is no run at {tmp_path / 'ran'}" in invoke(tmp_path / "ran", code=1).output
    (run / "config.json").write_text(json.dumps({"data": "gone"}))
    assert "was trained on gone, which is not found from here: give --data" in invoke(run, code=1).output
    for text in ("// another program's", "[1]", "null", '{"data": 3}', "{}"):
        (run / "config.json").write_text(text)
        assert "no data set in data/imagenet/val" in invoke(run, code=1).output
    (run / "config.json").unlink()
    assert "no data set in data/imagenet/val" in invoke(run, code=1).output


@pytest.mark.parametrize("crops", [1, 10])
def test_one_network_and_an_ensemble_equal_the_slow_reference(runs, reference, dataset, tmp_path, crops):
    invoke(*runs, "--data", dataset, "--crops", crops, "--batch", 50, "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    softmaxes, labels = reference
    first, second = (s.mean(1) if crops == 10 else s[:, CENTER] for s in softmaxes)
    wanted = [expected(p, labels) for p in (first, second, (first + second) / 2)]
    assert [row["network"] for row in found["networks"]][2] == "average of 2"
    for row, numbers in zip(found["networks"], wanted, strict=True):
        assert {k: row[k] for k in numbers} == pytest.approx(numbers, rel=2e-4)
    assert found["count"] == len(labels) == 24 and found["crops"] == crops


def test_training_validates_the_same(runs, dataset):
    trained, reader = load_run(runs[0]), ShardReader(dataset / "val")
    loader = eval_loader(reader, trained.preprocess, 7, workers=0)
    wanted = evaluate_in_training(trained.network, loader, Ranks())
    found = tool.score(*tool.judge(trained, reader, Ranks(), batch=5, workers=0, progress=False))
    assert found == pytest.approx(wanted, rel=1e-5)


def _two_ranks(ranks, config):
    run, data, out = config
    torch.set_num_threads(1)
    results = tool.judge(load_run(run), ShardReader(data / "val"), ranks, batch=5, workers=0, progress=False)
    if ranks.first:
        torch.save(results, out)


@pytest.mark.slow
def test_ranks_share_the_images_and_count_each_once(runs, dataset, tmp_path):
    launch(_two_ranks, (runs[1], dataset, tmp_path / "two.pt"), 2, gpu=False)
    logp, labels = torch.load(tmp_path / "two.pt")
    alone = tool.judge(load_run(runs[1]), ShardReader(dataset / "val"), Ranks(), workers=0, progress=False)
    assert torch.equal(labels, alone[1])
    torch.testing.assert_close(logp, alone[0], rtol=1e-4, atol=1e-4)


def test_classes_and_confusion_add_up(runs, reference, dataset, tmp_path):
    out = tmp_path / "new folder"
    (tmp_path / "val").symlink_to(dataset / "val")  # and no train/: the mean comes with the checkpoint
    said = invoke(
        runs[0], "--data", tmp_path, "--csv", out / "c.csv", "--confusion", out / "c.png", "--json", "-"
    )
    result = json.loads(said.stdout)  # and nothing else on the standard output
    (first, _), labels = reference
    guesses = first[:, CENTER].argmax(1)
    rows = list(csv.DictReader((out / "c.csv").open()))
    assert [row["wnid"] for row in rows] == ["astronaut", "chelsea", "coffee", "rocket"]
    for label, row in enumerate(rows):
        own = guesses[labels == label]
        assert int(row["images"]) == len(own)
        assert float(row["top1"]) == pytest.approx((own == label).mean(), abs=1e-6)
    hits = sum(float(row["top1"]) * int(row["images"]) for row in rows)
    assert hits / 24 == pytest.approx(result["top1"], abs=1e-6)
    picture = cv2.imread(str(out / "c.png"))
    assert picture is not None and min(picture.shape[:2]) > 300


def test_confusion_has_true_rows_and_a_picture_for_a_thousand_classes():
    logp = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]).log()
    counts = tool.confusion(logp, torch.tensor([0, 0, 1]))
    assert counts.tolist() == [[1, 1], [0, 1]]
    many = torch.eye(1000, dtype=torch.int64) * 3
    many[3, 7] = 2
    assert tool.confusion_figure(many, [f"class ${i}" for i in range(1000)]).axes


def one_line(done):
    assert re.fullmatch(r"(Usage: .*\n.*\n\n)?Error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


def test_what_is_wrong_is_said_in_one_line(runs, dataset, tmp_path):
    state = checkpoint.load(runs[0] / "best.pt")
    wnids = [*state["classes"][:-1], {"wnid": "teapot", "name": None}]
    checkpoint.save(tmp_path / "other.pt", state | {"classes": wnids})
    error = one_line(invoke(tmp_path / "other.pt", "--data", dataset, code=1))
    assert "label 3 is 'teapot' there and 'rocket' here" in error
    assert "no run at" in one_line(invoke(tmp_path / "none", "--data", dataset, code=1))
    assert "no data set" in one_line(invoke(runs[0], "--data", tmp_path, code=1))
    checkpoint.save(tmp_path / "strange.pt", {"weights": 1})
    assert "no checkpoint of" in one_line(invoke(tmp_path / "strange.pt", "--data", dataset, code=1))
    (tmp_path / "file").touch()
    error = one_line(invoke(runs[0], "--data", dataset, "--csv", tmp_path / "file" / "c.csv", code=1))
    assert "cannot write" in error
    error = one_line(invoke(runs[0], "--data", dataset, "--confusion", tmp_path / "c.xyz", code=1))
    assert "c.png" in error


@pytest.mark.parametrize(("amp", "expected"), [(None, (False, "highest")), (torch.bfloat16, (True, "high"))])
def test_without_amp_a_gpu_computes_in_float32_and_not_in_tf32(amp, expected):
    def precision():
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    seen = []

    class Network(torch.nn.Module):
        def forward(self, x):
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
def test_a_gpu_judges_as_the_cpu_does(runs, dataset, tmp_path, crops):
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
