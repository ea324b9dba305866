"""tools/show.py: pictures can be opened and show the right numbers."""

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import CROP, make_run, write_log

from base.errors import ModelError
from model.training.log import read_log
from pipeline.load.plan import Plan
from pipeline.preprocess import Preprocess, stored_image
from pipeline.shards import Manifest, ShardReader
from tools import show
from tools.lib import figures
from tools.lib.runs import load_run
from tools.lib.samples import count_classes, training_batch


def invoke(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(show.main, list(map(str, arguments)))
    assert done.exit_code == code, (done.output, done.exception)
    return done


def assert_picture(path: Path, least: int = 200) -> None:
    picture = cv2.imread(str(path))
    assert picture is not None and min(picture.shape[:2]) >= least and picture.std() > 5


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = make_run(tmp_path_factory.mktemp("runs") / "a", dataset)
    write_log(out)
    return out


def test_every_command_writes_a_picture(run: Path, dataset: Path, tmp_path: Path) -> None:
    invoke("batch", dataset, "--images", 5, "--crop", CROP, "--step", 1, "--out", tmp_path / "b.png")
    invoke("filters", run, "--out", tmp_path / "f.png")
    invoke("curves", run, "--out", tmp_path / "c.png")
    output = invoke("dataset", dataset, "--out", tmp_path / "d.png")
    assert "train: 96 images of 4 classes (24 to 24 per class), jpeg, 3 shards" in output.stdout
    for name in "bfcd":
        assert_picture(tmp_path / f"{name}.png")


def test_batch_shows_the_crop_of_the_stored_image(dataset: Path) -> None:
    reader = ShardReader(dataset / "train")
    preprocess = Preprocess.load(dataset / "train", 224)
    plan = Plan(count=96, global_batch=8, color_std=0.0, seed=3)
    batch = training_batch(reader, plan, preprocess, step=13, images=3)  # in the second epoch
    figure = figures.batch_figure(batch, preprocess, reader.manifest.classes, "title")
    samples, views = plan.samples(1, 1), plan.views(1, 1)
    panels = [axes for cell in figure.subfigs for axes in cell.axes]
    for place in range(3):
        stored, augmented, _ = (np.asarray(a.images[0].get_array()) for a in panels[3 * place :][:3])
        image = stored_image(reader, int(samples[place]))
        assert np.array_equal(stored, image)
        top, left = views.anchor[place]
        crop = image[top : top + 224, left : left + 224]
        crop = crop[:, ::-1] if views.flip[place] else crop
        # the loader's decoder and OpenCV's may round a JPEG differently
        assert np.abs(augmented.astype(int) - crop).max() <= 3


def test_filters_are_scaled_about_grey(run: Path) -> None:
    trained = load_run(run)
    figure = figures.filters_figure(trained.network, "title")
    mosaic = np.asarray(figure.axes[0].images[0].get_array())
    weights = trained.network.features.get_parameter("conv1.weight").numpy()
    assert mosaic.shape == (6 * 12 - 1, 16 * 12 - 1, 3)
    for place in (0, 17, 95):  # row by row
        y, x = 12 * (place // 16), 12 * (place % 16)
        kernel = weights[place].transpose(1, 2, 0)
        wanted = 0.5 + kernel / (2 * np.abs(kernel).max())
        np.testing.assert_allclose(mosaic[y : y + 11, x : x + 11], wanted, atol=1e-6)


def test_curves_compare_runs_over_epochs(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_log(other, epochs=2, steps=3)  # another batch size gives other steps but the same epochs
    with (other / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "epo')  # a partial line
    figure = figures.curves_figure({"a": read_log(run), "b": read_log(other)})
    loss, accuracy = figure.axes[:2]
    assert [np.asarray(line.get_xdata()).tolist() for line in loss.lines[1::2]] == [[1, 2, 3], [1, 2]]
    for line, percent in zip(accuracy.lines, ([20, 30, 40], [60, 70, 80]), strict=False):
        assert np.asarray(line.get_ydata()).tolist() == pytest.approx(percent)
    invoke("curves", run, other, "--out", tmp_path / "two.png")
    assert_picture(tmp_path / "two.png")


def test_dataset_counts_classes_of_both_splits(dataset: Path) -> None:
    readers = {split: ShardReader(dataset / split) for split in ("train", "val")}
    counts = {split: count_classes(reader, split) for split, reader in readers.items()}
    assert counts["train"].tolist() == [24] * 4 and counts["val"].tolist() == [6] * 4


def test_pictures_have_the_wnid_where_no_font_has_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    classes: list[dict[str, str | None]] = [
        {"wnid": "n1", "name": "tench"},
        {"wnid": "n2", "name": "猫, cat"},
        {"wnid": "犬", "name": None},
    ]
    monkeypatch.setattr(figures, "_characters", lambda: frozenset(range(32, 127)))
    assert figures.picture_names(classes) == ["tench", "n2", "label 2"]
    assert figures.caption("猫.jpg") == "?.jpg"
    monkeypatch.setattr(figures, "_characters", lambda: frozenset(range(0x10000)))
    assert figures.picture_names(classes) == ["tench", "猫", "犬"]


def test_the_fonts_of_pictures_are_installed_and_their_characters_known() -> None:
    assert figures.drawable("tench … é λ ×") and not figures.drawable("\U0010ffff")


def test_hostile_class_and_file_names_reach_pictures_and_the_terminal(dataset: Path, tmp_path: Path) -> None:
    classes = [{"wnid": w, "name": None} for w in ("caf\udce9", "a\x1b[31m", "$x_2$", "猫")]
    rejected = [{"source": "caf\udce9/\x1b[2J.jpg", "reason": "truncated JPEG"}]
    for split in ("train", "val"):
        shutil.copytree(dataset / split, tmp_path / split)
        manifest = Manifest.load(dataset / split)
        replace(manifest, classes=classes, rejected=rejected).save(tmp_path / split)
    output = invoke("dataset", tmp_path, "--out", tmp_path / "d.png").stdout
    assert "rejected caf\\xe9/\\x1b[2J.jpg: truncated JPEG" in output
    invoke("batch", tmp_path, "--images", 2, "--crop", CROP, "--out", tmp_path / "b.png")
    assert_picture(tmp_path / "d.png")
    assert_picture(tmp_path / "b.png")


class Sources(HTMLParser):
    """All addresses that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for key, value in attributes if key in ("src", "href", "srcset", "data")]


def test_report_is_one_file_that_loads_nothing(run: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    invoke("report", run, "--data", dataset, "--out", out, "--gpus", 0, "--workers", 0, "--no-progress")
    page = out.read_text()
    assert "only guessed" not in page
    sources = Sources()
    sources.feed(page)
    pictures = [s for s in sources.found if not s.startswith("#")]
    assert len(pictures) == 6
    for source in pictures:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR) is not None
    assert "url(" not in page and "<script" not in page and "astronaut" in page
    ids = set(re.findall(r'<h2 id="([^"]+)"', page))
    assert {s[1:] for s in sources.found if s.startswith("#")} == ids


def test_report_tells_that_a_run_only_guessed(run: Path, dataset: Path, tmp_path: Path) -> None:
    stuck = Path(shutil.copytree(run, tmp_path / "stuck"))
    with (stuck / "log.jsonl").open("a") as log:
        log.write(
            json.dumps({"kind": "guessing", "epoch": 2, "step": 300, "loss": 1.4, "guess": 1.386}) + "\n"
        )
    out = tmp_path / "r.html"
    invoke("report", stuck, "--data", dataset, "--out", out, "--gpus", 0, "--workers", 0, "--no-progress")
    assert "only guessed" in (page := out.read_text()) and "1.386" in page and "learnt since" not in page
    with (stuck / "log.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "train", "epoch": 3, "step": 400, "steps": 100, "loss": 0.7, "lr": 0.1,
                              "images_per_s": 9.0, "data_wait": 0.0}) + "\n")  # fmt: skip
    invoke("report", stuck, "--data", dataset, "--out", out, "--gpus", 0, "--workers", 0, "--no-progress")
    assert "it has learnt since, to 0.700" in out.read_text()


def test_errors_are_one_line(run: Path, dataset: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, words in (
        (("curves", empty), "give a folder that train.py wrote"),
        (("filters", empty), "holds no checkpoint"),
        (("batch", empty), "no data set"),
        (("dataset", empty), "no data set"),
        (("batch", dataset, "--crop", 300), "does not fit"),
    ):
        done = invoke(*arguments, "--out", tmp_path / "x.png", code=1)
        assert re.fullmatch(r"Error: [^\n]+\n", done.stderr) and words in done.stderr, done.stderr
    (empty / "log.jsonl").write_text('{"kind": "tr\n{"kind": "train"}\n')
    assert "line 1" in invoke("curves", empty, code=1).stderr


def test_a_log_is_read_but_for_a_partial_last_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = b'{"kind": "train", "step": 1}\n{"kind": "val", "step": 2}\n'
    path.write_bytes(whole)
    entries = read_log(tmp_path)
    assert entries == [{"kind": "train", "step": 1}, {"kind": "val", "step": 2}]
    for rest in (b"", b"{", b'{"kind": "train", "st', b'"\xff', b"3", b"\0\0\0"):
        path.write_bytes(whole + rest)
        assert read_log(tmp_path) == entries, rest
    (tmp_path / "best.pt").touch()
    assert read_log(tmp_path / "best.pt") == entries
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="is empty: train for"):
        read_log(tmp_path)
