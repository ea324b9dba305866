"""tools/predict.py: the same preprocessing as in training, neighbours, and images that cannot be read."""

import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers import make_run

from base.errors import DataError, ModelError
from model.training.log import read_log
from pipeline.build.images import prepare
from pipeline.build.sources import open_source
from pipeline.build.split import Options, build_split
from pipeline.load.loader import eval_loader
from pipeline.preprocess import Preprocess, network_input, stored_image
from pipeline.shards import ShardReader
from tools import predict as tool
from tools.lib import samples
from tools.lib.runs import load_run, read_config

QUICK = ["--gpus", "0", "--workers", "0", "--no-progress"]


def invoke(*arguments: object, code: int = 0, **kwargs: Any) -> Result:
    done = CliRunner().invoke(tool.main, [*map(str, arguments), *QUICK], **kwargs)
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a", dataset)


@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_a_photograph_becomes_what_the_shards_hold_and_the_loader_gives(
    class_folders: Path, tmp_path: Path, encoding: str
) -> None:
    source = class_folders / "train"
    build_split(open_source(source, "train"), tmp_path, Options(encoding=encoding), workers=1)
    reader = ShardReader(tmp_path / "train")
    prepared = np.stack([prepare(p.read_bytes()) for p in sorted(source.rglob("*.JPEG"))])
    stored = np.stack([stored_image(reader, i) for i in range(len(reader))])
    # the shards are shuffled: find each record's photograph by its pixels
    place = {image.tobytes(): i for i, image in enumerate(prepared)}
    assert len(place) == len(prepared) == len(stored)
    order = [place[image.tobytes()] for image in stored]
    for mean in ("pixel", "channel", "none"):
        preprocess = Preprocess.load(tmp_path / "train", crop=224, mean_mode=mean)
        loader = eval_loader(reader, preprocess, 20, workers=0)
        loaded = torch.cat([images.clone() for images, _ in loader])
        assert torch.equal(network_input(prepared[order], preprocess), loaded), mean
        loader.close()


def test_files_are_written_when_the_reader_of_the_output_ends(
    run: Path, photos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `| head` does."""

    def ends(text: str, err: bool = False) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("tools.lib.cli.echo", ends)
    invoke(run, photos["rocket"], "--json", tmp_path / "p.json", "--sheet", tmp_path / "s.png", code=1)
    assert len(json.loads((tmp_path / "p.json").read_text())) == 1
    assert cv2.imread(str(tmp_path / "s.png")) is not None


def test_json_text_and_sheet_agree_with_the_network(run: Path, class_folders: Path, tmp_path: Path) -> None:
    folder = class_folders / "val" / "coffee"
    assert len(list(folder.iterdir())) == 6
    output = invoke(run, folder, "--json", tmp_path / "p.json", "--sheet", tmp_path / "s.png", "--top", 3)
    listed = json.loads((tmp_path / "p.json").read_text())
    paths = sorted(map(str, folder.iterdir()))
    assert [entry["image"] for entry in listed] == paths
    trained = load_run(run)
    images = np.stack([prepare(p.read_bytes()) for p in sorted(folder.iterdir())])
    with torch.no_grad():
        wanted = trained.network(network_input(images, trained.preprocess)).softmax(1)
    for entry, row in zip(listed, wanted, strict=True):
        best = row.topk(3)
        assert [guess["label"] for guess in entry["top"]] == best.indices.tolist()
        assert [g["probability"] for g in entry["top"]] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert all(g["name"] == trained.classes[g["label"]]["wnid"] for g in entry["top"])
    assert output.stdout.count("█") > 0 and output.stdout.count("coffee *") == len(
        [1 for entry in listed if "coffee" in [g["name"] for g in entry["top"]]]
    )
    picture = cv2.imread(str(tmp_path / "s.png"))
    assert picture is not None and picture.std() > 20


def test_what_is_left_out_of_a_folder_is_counted(run: Path, class_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(class_folders / "val" / "coffee", tmp_path / "photos")
    for name in ("scan.txt", "notes", ".hidden"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    done = invoke(run, tmp_path / "photos", "--json", tmp_path / "p.json")
    assert len(json.loads((tmp_path / "p.json").read_text())) == 6
    assert done.stderr == "2 other files in the folders are not images\n"


def test_neighbours_are_the_nearest_of_all_by_fc7(
    run: Path, dataset: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    chosen = [photos["coffee"], photos["chelsea"]]
    invoke(
        run, *chosen, "--neighbours", dataset, "--json", tmp_path / "n.json", "--sheet", tmp_path / "n.png"
    )
    trained, reader = load_run(run), ShardReader(dataset / "train")
    stored = np.stack([stored_image(reader, i) for i in range(len(reader))])

    def fc7(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return trained.network.forward_features(network_input(images, trained.preprocess)).numpy()

    everything = fc7(stored)
    for path, entry in zip(chosen, json.loads((tmp_path / "n.json").read_text()), strict=True):
        gaps = np.linalg.norm(everything - fc7(prepare(path.read_bytes())[None]), axis=1)
        order = np.argsort(gaps, kind="stable")[:6]
        assert [n["index"] for n in entry["neighbours"]] == order.tolist()
        assert [n["distance"] for n in entry["neighbours"]] == pytest.approx(gaps[order], rel=1e-3)
        assert [n["label"] for n in entry["neighbours"]] == [reader.read(int(i))[1] for i in order]
    assert cv2.imread(str(tmp_path / "n.png")) is not None


def test_a_broken_image_gets_a_line_and_the_others_go_on(
    run: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(photos["rocket"].read_bytes()[:5000])
    (tmp_path / "text.png").write_text("not an image")
    paths = [tmp_path / "broken.jpg", photos["rocket"], tmp_path / "text.png", tmp_path / "none.jpg"]
    done = invoke(run, "-", "--json", "-", input="".join(f"{path}\n" for path in paths), code=1)
    listed = json.loads(done.stdout)
    assert [entry["image"] for entry in listed if "top" in entry] == [str(photos["rocket"])]
    lines = done.stderr.splitlines()
    assert len(lines) == 4 and lines[-1] == "3 of 4 images could not be read"
    assert "truncated JPEG" in lines[0] and "text.png" in lines[1] and "No such file" in lines[2]


def test_paths_on_standard_input_end_with_nul_or_newline(
    run: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    odd = [tmp_path / os.fsdecode(name) for name in (b"two\nlines.jpg", b"caf\xe9.jpg", b"no suffix")]
    for path in odd:
        shutil.copy(photos["rocket"], path)
    listing = b"\0".join(os.fsencode(path) for path in odd) + b"\0"
    listed = json.loads(invoke(run, "-", "--json", "-", input=listing).stdout)
    assert [os.fsencode(entry["image"]) for entry in listed] == [os.fsencode(path) for path in odd]
    assert len({json.dumps(entry["top"]) for entry in listed}) == 1
    lines = os.fsencode(odd[1]) + b"\r\n" + os.fsencode(odd[2])
    printed = invoke(run, "-", "--sheet", tmp_path / "s.png", input=lines).stdout
    assert f"{tmp_path}/caf\\xe9.jpg\n" in printed and f"{tmp_path}/no suffix\n" in printed
    assert cv2.imread(str(tmp_path / "s.png")) is not None


def test_an_image_on_standard_input_is_refused(run: Path, photos: dict[str, Path]) -> None:
    error = invoke(run, "-", input=photos["rocket"].read_bytes(), code=1).stderr
    assert error == (
        "Error: standard input is an image, not a list of paths: give the file's name instead of -\n"
    )
    for suffix in (".jpg", ".png", ".gif", ".bmp", ".webp", ".tiff"):
        content = cv2.imencode(suffix, np.zeros((50, 60, 3), np.uint8))[1].tobytes()
        kind = "binary data" if suffix == ".tiff" else "an image"
        with pytest.raises(DataError, match=f"standard input is {kind}, not a list of paths: give"):
            samples._paths_of(content)


@pytest.mark.parametrize("name", [b"BMW.jpg", b"BM", b"RIFF.webp", b"GIF8.gif", b"\xff\xd8.jpg"])
def test_names_that_begin_as_images_do_are_paths(name: bytes) -> None:
    for end in (b"", b"\n", b"\0"):
        assert [os.fsencode(path) for path in samples._paths_of(name + end)] == [name]


def test_a_folder_is_read_as_the_build_reads_it(run: Path, photos: dict[str, Path], tmp_path: Path) -> None:
    """Suffixes do not matter, but a file with an image's suffix that is not an image is an error."""
    names = ("a.jfif", "b.jpe", "c", "d.JPEG", "e.txt")
    for name in names:
        shutil.copy(photos["rocket"], tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    listed = json.loads(invoke(run, tmp_path, "--json", "-").stdout)
    assert [Path(entry["image"]).name for entry in listed] == sorted(names)
    source = open_source(folder_of_class(tmp_path), "train")
    assert {Path(image.name).name for image in source.images} >= set(names)
    (tmp_path / "f.jfif").write_text("no image")
    done = invoke(run, tmp_path, code=1)
    assert "f.jfif: not a" in done.stderr and "1 of 6 images could not be read" in done.stderr


def folder_of_class(folder: Path) -> Path:
    """The same files as one class of a source."""
    root = folder.with_name(f"{folder.name}-source")
    shutil.copytree(folder, root / "class")
    return root


def test_the_true_class_is_the_folder_as_the_build_reads_its_name(run: Path, photos: dict[str, Path]) -> None:
    trained = load_run(run)
    trained.classes[0]["wnid"], trained.classes[1]["wnid"] = "caf\u00e9", "na\u00efve"
    image = samples.read_photograph(str(photos["rocket"]), trained.preprocess.size)
    folders = ("cafe\u0301", "na\udcefve", "elsewhere")  # decomposed, Latin-1, no class
    loaded = [(f"{folder}/x.jpg", image) for folder in folders]
    predictions, _ = samples.predict(trained, loaded, 2, torch.device("cpu"))
    assert [prediction.truth for prediction in predictions] == [0, 1, None]


def test_the_network_runs_once(run: Path, photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    trained = load_run(run)
    seen: list[int] = []
    trained.network.features.get_submodule("conv1").register_forward_hook(lambda *_: seen.append(1))
    image = samples.read_photograph(str(photos["rocket"]), trained.preprocess.size)
    ((prediction,), fc7) = samples.predict(trained, [("x", image)], 2, torch.device("cpu"))
    assert seen == [1]
    with torch.no_grad():
        images = network_input(image[None], trained.preprocess)
        chances, labels = trained.network(images).softmax(1).topk(2)
        torch.testing.assert_close(fc7, trained.network.forward_features(images))
    assert [label for label, _ in prediction.top] == labels[0].tolist()
    assert [chance for _, chance in prediction.top] == pytest.approx(chances[0].tolist(), rel=1e-4)


def test_errors_are_one_line(run: Path, dataset: Path, tmp_path: Path, photos: dict[str, Path]) -> None:
    for arguments, words in (
        ((tmp_path / "none", photos["rocket"]), "no run at"),
        ((run, tmp_path), "no images in"),
        ((run, photos["rocket"], "--neighbours", tmp_path), "no data set"),
    ):
        done = invoke(*arguments, code=1)
        assert re.fullmatch(r"Error: [^\n]+\n", done.stderr) and words in done.stderr
    done = CliRunner().invoke(tool.main, [str(run)])
    assert done.exit_code == 2


def test_pipes_are_not_waited_for_and_bombs_are_refused_unread(
    run: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("pipe.jpg")
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.write(photos["rocket"].read_bytes())
        file.truncate(4 << 30)
    names = [tmp_path / name for name in ("pipe.jpg", "link.jpg", "sparse.jpg")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = invoke(run, photos["rocket"], *names, code=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB
    errors = done.stderr.splitlines()
    assert [f"{path}: not a regular file" for path in names[:2]] == errors[:2]
    assert errors[2].startswith(f"{names[2]}: 4,294,967,296 bytes, more than the limit")
    assert str(photos["rocket"]) in done.stdout


def test_a_run_folder_of_pipes_is_refused(run: Path, photos: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    os.mkfifo(folder / "config.json")
    assert read_config(folder) == {}
    os.mkfifo(folder / "log.jsonl")
    with pytest.raises(ModelError, match=r"cannot read .*not a regular file"):
        read_log(folder)
    os.mkfifo(folder / "best.pt")
    for path in (folder, folder / "best.pt"):
        assert re.fullmatch(r"Error: [^\n]+\n", invoke(path, photos["rocket"], code=1).stderr)
