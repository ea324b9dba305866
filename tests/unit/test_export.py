"""tools/export.py: exported files hold the same network, with the metadata to use it."""

import base64
import json
import os
import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers import CROP, ROOT, make_run, read_bgr

from model.training import checkpoint
from model.training.weights import IMAGENET_STD
from pipeline.preprocess import IMAGENET_MEAN, MEANS, Preprocess
from tools import export, predict
from tools.bench.reference import import_torchvision
from tools.lib import formats
from tools.lib.runs import load_run

torchvision = import_torchvision()


def invoke(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(export.main, list(map(str, arguments)))
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "paper", dataset)


@pytest.fixture(scope="module")
def owt(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "owt", dataset, "owt", crop=224, mean="channel")


def noise(count: int, crop: int) -> torch.Tensor:
    return 80 * torch.randn(count, 3, crop, crop, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def onnx_file(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("onnx") / "n"
    assert "within" in invoke(run, "--onnx", folder / "a.onnx").stdout
    assert [p.name for p in folder.iterdir()] == ["a.onnx"]  # no other files
    return folder / "a.onnx"


def test_onnx_gives_the_same_logits_and_says_how_to_make_inputs(run: Path, onnx_file: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    proto = onnx.load(onnx_file)
    lrn = [node for node in proto.graph.node if node.op_type == "LRN"]
    assert len(lrn) == 2
    constants = {a.name: onnx.helper.get_attribute_value(a) for a in lrn[0].attribute}
    assert constants == pytest.approx({"size": 5, "alpha": 5e-4, "beta": 0.75, "bias": 2.0})

    session = runtime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    trained = load_run(run)
    for count in (1, 4):
        images = noise(count, CROP)
        (found,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(
            torch.tensor(found), trained.network(images), rtol=0, atol=formats.TOLERANCE * np.abs(found).max()
        )
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == trained.classes and metadata["variant"] == "paper"
    preprocess = json.loads(metadata["preprocess"])
    mean = np.frombuffer(base64.b64decode(preprocess["mean_pixels"]), "<f4").reshape(256, 256, 3)
    assert np.array_equal(mean, trained.preprocess.mean)
    assert (preprocess["size"], preprocess["crop"], preprocess["mean_mode"]) == (256, CROP, "pixel")
    for words in (
        "central square",
        "INTER_AREA",
        "INTER_CUBIC",
        f"{CROP} x {CROP}",
        f"from {(256 - CROP) // 2}",
        "mean_pixels",
    ):
        assert words in metadata["preprocess_text"]


def test_the_sentence_says_what_is_subtracted(run: Path) -> None:
    own = load_run(run).preprocess
    sentences = {mode: formats.describe(replace(own, mean_mode=mode)) for mode in MEANS}
    words = {"pixel": "mean_pixels", "channel": "channel_mean", "imagenet": "channel_mean", "none": "nothing"}
    for mode, word in words.items():
        assert f"subtract {word}" in sentences[mode] or f"({word}" in sentences[mode]


def test_the_script_in_docs_agrees_with_predict(
    run: Path,
    onnx_file: Path,
    class_folders: Path,
    photos: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """For photographs that are larger and smaller than the stored size, in portrait and landscape format."""
    tiles = sorted((class_folders / "val").rglob("*.JPEG"))
    paths = [str(path) for path in [*tiles, *photos.values()]]
    sides = [min(read_bgr(path).shape[:2]) for path in paths]
    assert min(sides) < 256 < max(sides)
    done = CliRunner().invoke(predict.main, [str(run), *paths, "--json", "-", "--gpus", "0", "--no-progress"])
    wanted = json.loads(done.stdout)
    monkeypatch.setattr("sys.argv", ["onnx_predict.py", str(onnx_file), *paths])
    runpy.run_path(str(ROOT / "docs/onnx_predict.py"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * len(paths)  # four classes
    monkeypatch.setattr("sys.argv", ["onnx_predict.py", str(onnx_file)])
    with pytest.raises(SystemExit, match="python onnx_predict"):
        runpy.run_path(str(ROOT / "docs/onnx_predict.py"))
    for at, entry in enumerate(wanted):
        for line, guess in zip(lines[4 * at : 4 * at + 4], entry["top"], strict=True):
            matched = re.fullmatch(r"(.*): (0\.\d{4}|1\.0000) (.*)", line)
            assert matched, line
            path, chance, name = matched.groups()
            assert (path, name) == (entry["image"], guess["name"])
            assert float(chance) == pytest.approx(guess["probability"], abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["owt", "bn"])
def test_the_other_variants_become_onnx_too(dataset: Path, tmp_path: Path, variant: str) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    path = make_run(tmp_path / variant, dataset, variant)
    invoke(path, "--onnx", tmp_path / "a.onnx")  # verifies the file


@pytest.mark.slow
def test_an_onnx_file_that_computes_something_else_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    monkeypatch.setattr(formats, "TOLERANCE", -1.0)
    assert "logits differ" in invoke(run, "--onnx", tmp_path / "a.onnx", code=1).stderr
    assert list(tmp_path.iterdir()) == []


def test_safetensors_hold_the_state_dict(run: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    invoke(run, "--safetensors", tmp_path / "a.safetensors")
    wanted = load_run(run).network.state_dict()
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == set(wanted)
        assert all(torch.equal(file.get_tensor(name), wanted[name]) for name in wanted)
        assert json.loads(file.metadata()["preprocess"])["crop"] == CROP
        assert "centre crop" in file.metadata()["preprocess_text"]


@pytest.mark.slow
def test_torchvision_loads_owt_and_computes_the_same(owt: Path, tmp_path: Path) -> None:
    output = invoke(owt, "--torchvision", tmp_path / "tv.pth").stdout
    theirs = torchvision.models.alexnet(num_classes=4).eval()
    theirs.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True))
    trained, images = load_run(owt), noise(2, 224)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), trained.network(images), rtol=1e-4, atol=1e-4)
        # the recommended transform makes our inputs
        normalized = re.search(r"Normalize\(\[(.*?)\]", output)
        assert normalized, output
        mean = [float(x) for x in normalized.group(1).split(",")]
        normalize = torchvision.transforms.Normalize(mean, [1 / 255] * 3)
        levels = torch.randint(0, 256, (1, 3, 224, 224)).float()
        ours = levels - torch.tensor(trained.preprocess.mean[0, 0])[:, None, None]
        torch.testing.assert_close(normalize(levels / 255), ours, rtol=0, atol=0.02)


def test_torchvision_has_no_network_with_other_options(dataset: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dataset, "owt", activation="tanh")
    done = invoke(run, "--torchvision", tmp_path / "tv.pth", code=1)
    assert "trained with activation tanh" in done.output and not (tmp_path / "tv.pth").exists()


@pytest.mark.slow
def test_torchvision_weights_become_a_checkpoint_that_predicts_alike(dataset: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet(num_classes=4).eval()
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    out = tmp_path / "new" / "tv.pt"
    invoke("--from-torchvision", tmp_path / "tv.pth", "--out", out, "--data", dataset)
    trained = load_run(out)
    assert trained.classes == load_run(out).classes and len(trained.classes) == 4
    pixels = torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(2)).float()
    normalize = torchvision.transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    ours = pixels - torch.tensor(trained.preprocess.mean[0, 0])[:, None, None]
    with torch.no_grad():
        wanted = theirs(normalize(pixels / 255))
        torch.testing.assert_close(trained.network(ours), wanted, rtol=1e-4, atol=1e-5)


def test_torchvision_weights_need_no_data_set(tmp_path: Path) -> None:
    torch.save(torchvision.models.alexnet(num_classes=3).state_dict(), tmp_path / "tv.pth")
    back = ("--from-torchvision", tmp_path / "tv.pth", "--out", tmp_path / "tv.pt")
    invoke(*back)
    assert load_run(tmp_path / "tv.pt").classes == [{"wnid": str(i), "name": None} for i in range(3)]
    names = tmp_path / "LOC_synset_mapping.txt"
    names.write_text("n02 goldfish, Carassius\nn01 tench, Tinca tinca\nn03\n")
    invoke(*back, "--names", names)
    trained = load_run(tmp_path / "tv.pt")
    assert [c["wnid"] for c in trained.classes] == ["n01", "n02", "n03"]
    assert trained.names == ["tench", "goldfish", "n03"]
    assert (trained.preprocess.size, trained.preprocess.mean_mode) == (256, "imagenet")
    names.write_text("n01 tench\n")
    assert "3 outputs" in invoke(*back, "--names", names, code=1).stderr


def test_imagenets_class_names_come_with_torchvision() -> None:
    names = [entry["name"] for entry in formats._numbered_classes(1000)]
    assert names[:2] == ["tench", "goldfish"] and names[999] == "toilet tissue" and len(names) == 1000


@pytest.mark.slow
def test_there_and_back_is_the_same_network(owt: Path, dataset: Path, tmp_path: Path) -> None:
    invoke(owt, "--torchvision", tmp_path / "tv.pth")
    before = load_run(owt)
    mean = (before.preprocess.mean[0, 0] / 255).tolist()
    back = ["--mean", *mean, "--std", *[1 / 255] * 3]
    invoke("--from-torchvision", tmp_path / "tv.pth", "--out", tmp_path / "b.pt", "--data", dataset, *back)
    after = load_run(tmp_path / "b.pt")
    for name, tensor in before.network.state_dict().items():
        assert torch.equal(tensor, after.network.state_dict()[name]), name
    np.testing.assert_allclose(after.preprocess.mean, before.preprocess.mean, rtol=1e-6)
    np.testing.assert_array_equal(after.preprocess.color_basis, before.preprocess.color_basis)
    state = checkpoint.load(tmp_path / "b.pt")
    assert isinstance(Preprocess.from_state_dict(state["preprocess"]), Preprocess)


def test_errors_are_one_line(
    run: Path, owt: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "junk.pth").write_text("junk")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save(torchvision.models.alexnet(num_classes=7).state_dict(), tmp_path / "seven.pth")
    os.mkfifo(tmp_path / "pipe")
    names = ("--names", tmp_path / "pipe")
    back = ("--out", tmp_path / "o.pt", "--data", dataset)
    for arguments, code, words in (
        ((run,), 2, "nothing to write"),
        ((), 2, "give a RUN"),
        ((run, "--onnx", "a", "--out", "b"), 2, "need --from-torchvision"),
        (("--from-torchvision", "a"), 2, "needs --out"),
        ((run, "--torchvision", tmp_path / "x"), 1, "train with --variant owt"),
        (("--from-torchvision", tmp_path / "junk.pth", *back), 1, "not a file of weights"),
        (("--from-torchvision", tmp_path / "none.pth", *back), 1, "No such file"),
        (("--from-torchvision", tmp_path / "other.pth", *back), 1, "not a state dict of torchvision"),
        (("--from-torchvision", tmp_path / "seven.pth", *back), 1, "7 outputs"),
        (("--from-torchvision", tmp_path / "pipe", *back), 1, "not a regular file"),
        (("--from-torchvision", tmp_path / "seven.pth", *back[:2], *names), 1, "not a regular file"),
    ):
        done = invoke(*arguments, code=code)
        assert re.search(r"(^|\n\n)Error: [^\n]+\n$", done.stderr) and words in done.stderr, done.stderr

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(formats.importlib, "import_module", missing)
    assert "'.[export]'" in invoke(run, "--onnx", tmp_path / "a.onnx", code=1).stderr
