"""CIFAR's archives, rebuilt here byte for byte in both official forms; small images through shards and loader."""

import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from model.parallel import Ranks
from pipeline import DataError
from pipeline.cifar import unpack
from pipeline.loader import Preprocess, eval_loader, train_loader
from pipeline.plan import Plan
from pipeline.shards import ShardReader
from tools import build_lmdb
from tools.common import load_run
from tools.evaluate import judge

ROOT = Path(__file__).parent.parent
NAMES = ["airplane", "automobile", "bird"]


@pytest.fixture(scope="module")
def batches():
    """(images (N, 32, 32, 3), labels) of two training batches and the test batch."""
    random = np.random.default_rng(0)
    return [(random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 3) for n in (9, 6, 6)]


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def python_version(path, batches):
    # as Python 2 wrote it: byte strings, protocol 2
    files = {"batches.meta": pickle.dumps({b"label_names": [n.encode() for n in NAMES]}, 2)}
    for name, (images, labels) in zip(("data_batch_1", "data_batch_2", "test_batch"), batches, strict=True):
        files[name] = pickle.dumps({b"data": planes(images), b"labels": labels.tolist()}, 2)
    return archive(path, files)


def binary_version(path, batches):
    files = {"batches.meta.txt": "\n".join(NAMES).encode() + b"\n\n"}
    for name, (images, labels) in zip(("data_batch_1", "data_batch_2", "test_batch"), batches, strict=True):
        rows = np.concatenate([labels[:, None].astype(np.uint8), planes(images)], axis=1)
        files[f"{name}.bin"] = rows.tobytes()
    return archive(path, files)


@pytest.mark.parametrize("make", [python_version, binary_version])
def test_an_archive_becomes_the_same_pixels_in_shards(batches, tmp_path, make):
    source = make(tmp_path / "cifar-10-of-a-kind.tar.gz", batches)
    arguments = [str(source), str(tmp_path / "d"), "--size", "32", "--encoding", "png", "--workers", "1"]
    done = CliRunner().invoke(build_lmdb.main, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    train = [(i, int(label)) for part, labels in batches[:2] for i, label in zip(part, labels, strict=True)]
    test = [(i, int(label)) for i, label in zip(*batches[2], strict=True)]
    for split, expected in (("train", train), ("val", test)):
        reader = ShardReader(tmp_path / "d" / split)
        assert [c["wnid"] for c in reader.manifest.classes] == NAMES
        preprocess = Preprocess.load(tmp_path / "d" / "train", 32, "none")
        found = [
            (image.permute(1, 2, 0).numpy().astype(np.uint8).tobytes(), int(label))
            for images, labels in eval_loader(reader, preprocess, 4, workers=0)
            for image, label in zip(images, labels, strict=True)
        ]
        assert sorted(found) == sorted((image.tobytes(), label) for image, label in expected)


@pytest.mark.parametrize("crop", [32, 24])
@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_small_images_through_the_loader_equal_numpy(batches, tmp_path, crop, encoding):
    source = binary_version(tmp_path / "cifar-10-binary.tar.gz", batches)
    arguments = [str(source), str(tmp_path / "d"), "--size", "32", "--encoding", encoding, "--workers", "1"]
    assert CliRunner().invoke(build_lmdb.main, arguments).exit_code == 0
    reader = ShardReader(tmp_path / "d" / "train")
    stored = np.concatenate([images for images, _ in batches[:2]]).astype(np.float64)
    mean = stored.mean(0)
    plan = Plan(len(reader), 5, seed=3, size=32, crop=crop)
    loader = train_loader(
        reader, plan, Preprocess.load(tmp_path / "d" / "train", crop), end_step=4, workers=0
    )
    by_pixels = {image.astype(np.uint8).tobytes() for image in stored}
    eigenvalues, eigenvectors = np.linalg.eigh(np.cov(stored.reshape(-1, 3).T / 255, bias=True))
    for number, (images, _) in enumerate(loader):
        epoch, step = divmod(number, plan.steps_per_epoch)
        views = plan.views(epoch, step)
        assert views.anchor.max() < max(1, 32 - crop)
        for row, index in enumerate(map(int, plan.samples(epoch, step))):
            record, _ = reader.read(index)
            image = record if encoding == "raw" else build_lmdb_decode(record)
            assert image.tobytes() in by_pixels
            # the manifest's eigenvectors are these up to their order and sign
            basis = np.array(reader.manifest.pca_eigenvectors) * np.array(reader.manifest.pca_eigenvalues)
            for column in basis.T:
                size = np.linalg.norm(column)
                match = np.argmin(np.abs(eigenvalues - size))
                assert size == pytest.approx(eigenvalues[match], rel=1e-4)
                assert abs(column @ eigenvectors[:, match]) == pytest.approx(size, rel=1e-3)
            top, left = views.anchor[row]
            expected = (image - mean)[top : top + crop, left : left + crop] + 255 * basis @ views.color[row]
            expected = expected[:, ::-1] if views.flip[row] else expected
            np.testing.assert_allclose(images[row].permute(1, 2, 0), expected, atol=1e-3)


def build_lmdb_decode(record):
    import cv2

    return cv2.imdecode(record, cv2.IMREAD_COLOR)[..., ::-1]


def test_hostile_and_damaged_archives_are_refused(batches, tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run by the unpickler",)

    bad = archive(tmp_path / "cifar-10-evil.tar.gz", {"batches.meta": pickle.dumps(Evil())})
    with pytest.raises(DataError, match=r"print has no place in it"):
        unpack(bad, tmp_path / "evil")
    short = archive(
        tmp_path / "cifar-10-short.tar.gz", {"batches.meta.txt": b"a\nb", "data_batch_1.bin": b"123"}
    )
    with pytest.raises(DataError, match="damaged"):
        unpack(short, tmp_path / "short")
    with pytest.raises(DataError, match="damaged"):
        unpack(archive(tmp_path / "cifar-10-none.tar.gz", {"readme.html": b""}), tmp_path / "none")


def test_the_papers_network_trains_on_small_images_with_a_stride_of_1(batches, tmp_path):
    source, data = binary_version(tmp_path / "cifar-10-binary.tar.gz", batches), tmp_path / "d"
    arguments = [str(source), str(data), "--size", "32", "--encoding", "png", "--workers", "1"]
    assert CliRunner().invoke(build_lmdb.main, arguments).exit_code == 0
    options = ["--gpus", 0, "--crop", 24, "--stride", 1, "--global-batch", 5, "--epochs", 1, "--workers", 0]
    command = [sys.executable, ROOT / "train.py", "--data", data, "--out", tmp_path / "run", *options]
    done = subprocess.run(
        [*map(str, command), "--no-progress", "--no-tensorboard"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    trained = load_run(tmp_path / "run")
    assert dict(trained.network.features.named_children())["conv1"].stride == (1, 1)
    logp, labels = judge(trained, ShardReader(data / "val"), Ranks(), crops=10, workers=0, progress=False)
    assert logp.shape == (6, 3) and sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(logp.exp().sum(1), 1, rtol=1e-5)
