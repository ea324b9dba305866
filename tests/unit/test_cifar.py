"""CIFAR's archives, rebuilt here byte for byte in both official forms; small images through shards and loader."""

import gzip
import io
import pickle
import random
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import decode

from base.errors import DataError, UserError
from model.parallel.ranks import Ranks
from pipeline.build import cifar
from pipeline.build.cifar import unpack
from pipeline.load.loader import eval_loader, train_loader
from pipeline.load.plan import Plan
from pipeline.preprocess import Preprocess
from pipeline.shards import ShardReader
from tools import build_lmdb
from tools.lib.runs import load_run
from tools.lib.scores import score_split

ROOT = Path(__file__).parents[2]
NAMES = ["airplane", "automobile", "bird"]


Batches = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def batches() -> Batches:
    """(images (N, 32, 32, 3), labels) of two training batches and the test batch."""
    random = np.random.default_rng(0)
    return [(random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 3) for n in (9, 6, 6)]


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def python_version(path: Path, batches: Batches) -> Path:
    # as Python 2 wrote it: byte strings, protocol 2
    files = {"batches.meta": pickle.dumps({b"label_names": [n.encode() for n in NAMES]}, 2)}
    for name, (images, labels) in zip(("data_batch_1", "data_batch_2", "test_batch"), batches, strict=True):
        files[name] = pickle.dumps({b"data": planes(images), b"labels": labels.tolist()}, 2)
    return archive(path, files)


def binary_version(path: Path, batches: Batches) -> Path:
    files = {"batches.meta.txt": "\n".join(NAMES).encode() + b"\n\n"}
    for name, (images, labels) in zip(("data_batch_1", "data_batch_2", "test_batch"), batches, strict=True):
        rows = np.concatenate([labels[:, None].astype(np.uint8), planes(images)], axis=1)
        files[f"{name}.bin"] = rows.tobytes()
    return archive(path, files)


@pytest.mark.parametrize("make", [python_version, binary_version])
def test_an_archive_becomes_the_same_pixels_in_shards(
    batches: Batches, tmp_path: Path, make: Callable[[Path, Batches], Path]
) -> None:
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
def test_small_images_through_the_loader_equal_numpy(
    batches: Batches, tmp_path: Path, crop: int, encoding: str
) -> None:
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
            image = record if encoding == "raw" else decode(record)
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


def test_hostile_and_damaged_archives_are_refused(batches: Batches, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("run by the unpickler",)

    bad = archive(tmp_path / "cifar-10-evil.tar.gz", {"batches.meta": pickle.dumps(Evil())})
    with pytest.raises(DataError, match=r"print is not allowed"):
        unpack(bad, tmp_path / "evil")
    short = archive(
        tmp_path / "cifar-10-short.tar.gz", {"batches.meta.txt": b"a\nb", "data_batch_1.bin": b"123"}
    )
    with pytest.raises(DataError, match="damaged"):
        unpack(short, tmp_path / "short")
    with pytest.raises(DataError, match="damaged"):
        unpack(archive(tmp_path / "cifar-10-none.tar.gz", {"readme.html": b""}), tmp_path / "none")


def build(source: Path, out: Path, *more: object) -> Result:
    arguments = [source, out, "--size", 32, "--encoding", "png", "--workers", 1, *more]
    return CliRunner().invoke(build_lmdb.main, list(map(str, arguments)))


@pytest.mark.parametrize(
    "name", ["/abs/olute", "../up", "a/b", "..", ".", ".hidden", "nul\0", "two\nlines", ""]
)
def test_a_class_name_that_is_no_folders_name_is_refused(batches: Batches, tmp_path: Path, name: str) -> None:
    images, labels = batches[0]
    content = pickle.dumps({"data": planes(images), "labels": labels.tolist()})
    meta = pickle.dumps({"label_names": ["bird", name.replace("/abs", str(tmp_path)), "cat"]})
    files = {"batches.meta": meta, "data_batch_1": content, "test_batch": content}
    with pytest.raises(DataError, match="cannot be the name of a class"):
        unpack(archive(tmp_path / "cifar-10-x.tar.gz", files), tmp_path / "a/b/out")
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-x.tar.gz"]


def test_every_changed_bit_and_every_cut_is_refused(batches: Batches, tmp_path: Path) -> None:
    source = binary_version(tmp_path / "cifar-10-binary.tar.gz", batches)
    good, draw = source.read_bytes(), random.Random(0)
    damaged = [good[: draw.randrange(len(good))] for _ in range(20)]
    # behind the head, whose time of change and name nothing depends on, to the checksum and length at the end
    for position in [*(draw.randrange(40, len(good)) for _ in range(60)), *range(len(good) - 8, len(good))]:
        damaged.append(
            good[:position] + bytes([good[position] ^ 1 << draw.randrange(8)]) + good[position + 1 :]
        )
    unpack(source, tmp_path / "whole")
    for content in damaged:
        source.write_bytes(content)
        with pytest.raises(DataError, match=r"damaged.*: download it again") as error:
            unpack(source, tmp_path / "out")
        assert "\n" not in error.value.message
    assert not (tmp_path / "out").exists()
    done = build(source, tmp_path / "out")  # by the command too
    assert done.exit_code == 1 and "damaged" in done.output and not (tmp_path / "out").exists()


def test_an_archive_that_unfolds_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "MAX_BYTES", 1 << 20)
    bomb = tmp_path / "cifar-10-bomb.tar.gz"
    bomb.write_bytes(gzip.compress(bytes(1 << 24)))
    with pytest.raises(DataError, match="more than 1,048,576 bytes"):
        unpack(bomb, tmp_path / "out")
    sparse = tmp_path / "cifar-10-sparse.tar"
    with tarfile.open(sparse, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("batches.meta.txt")
        member.pax_headers = {
            "GNU.sparse.major": "0",
            "GNU.sparse.minor": "1",
            "GNU.sparse.map": "0,0",
            "GNU.sparse.size": str(1 << 50),
            "GNU.sparse.numblocks": "1",
        }
        tar.addfile(member)
    with pytest.raises(DataError, match="damaged"):
        unpack(sparse, tmp_path / "out")


@pytest.mark.parametrize(
    "meta",
    [
        pickle.dumps([1]),
        pickle.dumps({"label_names": 3}),
        pickle.dumps({"label_names": ["a", "a", "b"]}),
        pickle.dumps({"label_names": [b"\xff", "b", "c"]}, 2),
        b"\x80\x02]q\x00K\x01a",
        b"cnumpy.f2py.__main__\ndtype\n.",
        b"cnumpy.nothere\ndtype\n.",
        b"cnumpy.char\nndarray\n.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"cnumpy\nndarray\n(L1000000000000000L\ntR.",
        # an index of the memo for which 3 GB of room would be made
        b"\x80\x02}r" + struct.pack("<I", 200_000_000) + b".",
    ],
)
def test_whatever_the_unpickler_meets_is_one_line(batches: Batches, tmp_path: Path, meta: bytes) -> None:
    images, labels = batches[0]
    content = pickle.dumps({"data": planes(images), "labels": labels.tolist()})
    files = {"batches.meta": meta, "data_batch_1": content, "test_batch": content}
    before = set(sys.modules)
    done = build(archive(tmp_path / "cifar-10-x.tar.gz", files), tmp_path / "out")
    assert done.exit_code == 1 and done.output.count("Error: ") == 1, done.exception
    assert "download it again" in done.output
    assert not {name for name in set(sys.modules) - before if name.startswith("numpy.f2py")}


def test_none_of_numpys_classes_is_made(batches: Batches, tmp_path: Path) -> None:
    """A type of objects, which NumPy would take the array's bytes for the addresses of: it crashed the process."""
    images, labels = batches[0]

    class Type:
        def __reduce__(self) -> tuple[Any, ...]:
            return np.dtype, ("u1",), (3, "|", None, None, None, 8, 8, 63)

    class Array:
        def __reduce__(self) -> tuple[Any, ...]:
            state = (1, (1, 3072), Type(), False, planes(images)[:1].tobytes())
            return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state

    batch = pickle.dumps({"data": Array(), "labels": [0]}, 2)
    files = {"batches.meta": pickle.dumps({"label_names": NAMES}), "data_batch_1": batch, "test_batch": batch}
    unpack(archive(tmp_path / "cifar-10-type.tar.gz", files), tmp_path / "type")  # its state is not used
    for kind in ("O", "f8", "V1", "i1"):
        data = np.zeros((1, 3072), np.uint8) if kind == "O" else np.zeros((1, 3072), kind)
        batch = pickle.dumps({"data": data.astype(kind), "labels": [0]}, 2)
        with pytest.raises(DataError, match="damaged"):
            unpack(archive(tmp_path / "cifar-10-x.tar.gz", files | {"data_batch_1": batch}), tmp_path / "out")
    column_wise = np.asfortranarray(planes(images))
    batch = pickle.dumps({"data": column_wise, "labels": labels.tolist()}, 2)
    pixels, _ = cifar._from_pickle(batch)
    assert np.array_equal(pixels, planes(images))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels", [0, 1, -1]),
        ("labels", [0, 1, 3]),
        ("labels", [0, 1]),
        ("labels", [0, 1, 1.5]),
        ("data", np.zeros((3, 3072))),
        ("data", np.zeros((3, 3071), np.uint8)),
        ("data", [[0] * 3072] * 3),
    ],
)
def test_labels_and_images_are_what_they_should_be(tmp_path: Path, key: str, value: object) -> None:
    batch = {"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 2]}
    files = {"batches.meta": pickle.dumps({"label_names": NAMES}), "test_batch": pickle.dumps(batch)}
    good = archive(tmp_path / "cifar-10-good.tar.gz", {**files, "data_batch_1": pickle.dumps(batch)})
    unpack(good, tmp_path / "good")
    files["data_batch_1"] = pickle.dumps({**batch, key: value})
    with pytest.raises(DataError, match="damaged"):
        unpack(archive(tmp_path / "cifar-10-bad.tar.gz", files), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_ctrl_c_while_unpacking_is_interrupted_like_a_build(
    batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = binary_version(tmp_path / "cifar-10-binary.tar.gz", batches), tmp_path / "out"
    write = cifar._write

    def interrupted(*arguments: Any) -> None:
        write(*arguments)
        assert (out / cifar.UNPACKED / "train/bird").is_dir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cifar, "_write", interrupted)
        done = build(source, out)
    assert done.exit_code == 130 and "continue with --resume" in done.output
    assert list(out.iterdir()) == []
    # what a kill leaves is replaced, not built
    (out / cifar.UNPACKED / "train/zebra").mkdir(parents=True)
    (out / cifar.UNPACKED / "train/zebra/0.png").write_bytes(b"left")
    busy = pytest.raises(UserError, match="another build is running")
    with cifar.unpacked(source, out), busy, cifar.unpacked(source, out):
        pass
    (out / cifar.UNPACKED / "train/zebra").mkdir(parents=True)
    assert build(source, out, "--resume").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]
    assert [c["wnid"] for c in ShardReader(out / "train").manifest.classes] == NAMES


@pytest.mark.slow
def test_the_papers_network_trains_on_small_images_with_a_stride_of_1(
    batches: Batches, tmp_path: Path
) -> None:
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
    val = ShardReader(data / "val")
    (scores,) = score_split([trained], val, Ranks(), crops=10, workers=0, progress=False)
    assert sorted(scores.labels.tolist()) == [0, 0, 1, 1, 2, 2] and scores.in_top.all()  # of three classes
    assert np.isfinite(scores.losses).all() and (scores.losses > 0).all()
