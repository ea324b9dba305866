"""Shards, manifest and checksums, and that DALI reads them as a Caffe LMDB."""

import hashlib
import io
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import lmdb
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT, decode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipeline.shards
from base.errors import DataError
from pipeline.build.sources import open_source
from pipeline.build.split import Options, build_split
from pipeline.datum_pb2 import Datum
from pipeline.shards import Manifest, ShardReader, ShardWriter, pca_of_moments, record_key
from tools.verify_lmdb import main as verify


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the data set that a test may damage."""
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def test_a_data_set_may_lie_in_a_folder_whose_name_is_not_utf8(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / os.fsdecode(b"caf\xe9")))
    assert ShardReader(copy / "val").read(0)[1] == ShardReader(dataset / "val").read(0)[1]
    assert CliRunner().invoke(verify, [str(copy), "--workers", "1"]).exit_code == 0


def test_reader_counts_labels_and_places(dataset: Path) -> None:
    reader = ShardReader(dataset / "train")
    assert len(reader) == 96 == reader.manifest.count
    assert [shard["count"] for shard in reader.manifest.shards] == [32, 32, 32]
    assert [entry["wnid"] for entry in reader.manifest.classes] == [
        "astronaut",
        "chelsea",
        "coffee",
        "rocket",
    ]
    labels = [reader.read(index)[1] for index in range(96)]
    assert np.bincount(labels).tolist() == [24] * 4
    assert len(set(labels[:16])) == 4  # shuffled
    assert reader.locate(0) == ("shard-00000", b"00000000")
    assert reader.locate(95) == ("shard-00002", b"00000031")
    for index in (-1, 96):
        with pytest.raises(IndexError):
            reader.read(index)
    data, _ = reader.read(40)
    assert data.dtype == np.uint8 and decode(data).shape == (256, 256, 3)


READ_IN_CHILD = """
import multiprocessing, sys
from pipeline.shards import ShardReader

def contents(reader):
    return [reader.read(index)[0].tobytes() for index in range(len(reader))]

def read(reader, queue):
    queue.put(contents(reader))

if __name__ == "__main__":
    reader = ShardReader(sys.argv[1])
    expected = contents(reader)
    another = ShardReader(sys.argv[1])
    another.read(0)
    context = multiprocessing.get_context(sys.argv[2])
    queue = context.Queue()
    process = context.Process(target=read, args=(reader, queue))
    process.start()
    assert queue.get(timeout=200) == expected
    process.join()
    assert contents(another) == contents(reader) == expected
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reader_reopens_in_other_processes(dataset: Path, tmp_path: Path, method: str) -> None:
    script = tmp_path / "read.py"  # of its own: a fork of this process would have the locks of its threads
    script.write_text(READ_IN_CHILD)
    subprocess.run([sys.executable, str(script), str(dataset / "val"), method], check=True, timeout=120)
    reader = ShardReader(dataset / "val")
    expected = [reader.read(index)[0].tobytes() for index in range(len(reader))]
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(3)[0].tobytes() == expected[3]
    reader.close()
    assert reader.read(3)[0].tobytes() == expected[3]


@pytest.mark.parametrize("encoding", ["jpeg", "png", "raw"])
def test_dali_reads_it_as_caffe(class_folders: Path, tmp_path: Path, encoding: str) -> None:
    from nvidia import dali

    fn: Any = dali.fn
    pipeline_def: Any = dali.pipeline_def  # the stub knows no pipeline without a device

    quality = 90 if encoding == "jpeg" else None
    source = open_source(class_folders / "val", "val")
    build_split(source, tmp_path, Options(64, encoding, quality, images_per_shard=10), workers=1)
    reader = ShardReader(tmp_path / "val")

    @pipeline_def(batch_size=len(reader), num_threads=1, device_id=None)
    def graph() -> Any:
        paths = [str(tmp_path / "val" / shard["name"]) for shard in reader.manifest.shards]
        data, labels = fn.readers.caffe(path=paths)
        return (data if encoding == "raw" else fn.decoders.image(data, device="cpu")), labels

    images, labels = graph(prefetch_queue_depth=1).run()
    for index in range(len(reader)):
        data, label = reader.read(index)
        assert labels.at(index).item() == label
        if encoding == "raw":
            assert data.shape == (64, 64, 3)
            assert np.array_equal(images.at(index).reshape(64, 64, 3), data)
        else:
            expected = decode(data)
            # libjpeg-turbo versions may round differently, by a level or two.
            assert np.abs(images.at(index).astype(int) - expected).max() <= (3 if encoding == "jpeg" else 0)


@settings(max_examples=20, deadline=None)
@given(records=st.lists(st.tuples(st.binary(max_size=300_000), st.integers(0, 999)), max_size=150))
def test_writer_keeps_any_records(tmp_path_factory: pytest.TempPathFactory, records: list) -> None:
    folder = tmp_path_factory.mktemp("shard")
    entries = []
    for name in ("one", "two"):
        writer = ShardWriter(folder / name, 256, encoded=True)
        for data, label in records:
            writer.append(data, label)
        entries.append(writer.close())
    assert entries[0] == entries[1]  # the same file bytes
    with lmdb.open(str(folder / "one"), readonly=True, lock=False) as env, env.begin() as transaction:
        keys = [key for key, _ in transaction.cursor()]
    assert keys == [record_key(index) for index in range(len(records))]
    shutil.rmtree(folder)


def test_file_grows_beyond_its_first_map(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shard", 256, encoded=False)
    block = np.random.default_rng(0).bytes(3 * 256 * 256)
    for label in range(200):
        writer.append(block, label)
    entry = writer.close()
    assert entry["count"] == 200 and entry["bytes"] > 200 * len(block) > 1 << 25


def test_pca_is_that_of_the_pixels() -> None:
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (5000, 3)) // np.array([1, 2, 3])
    products = (pixels.T @ pixels).tolist()
    mean, values, vectors = pca_of_moments(len(pixels), pixels.sum(axis=0).tolist(), products)
    covariance = np.cov(pixels.T / 255, bias=True)
    assert np.allclose(mean, pixels.mean(axis=0))
    assert values == sorted(values, reverse=True)
    assert np.allclose(np.array(vectors) @ np.diag(values) @ np.array(vectors).T, covariance)
    for column in np.array(vectors).T:
        assert column[np.abs(column).argmax()] > 0


# --- damage ------------------------------------------------------------------------------------------------


def test_missing_data_set_names_the_tool(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tools/build_lmdb\.py") as caught:
        ShardReader(tmp_path / "train")
    assert isinstance(caught.value, click.ClickException) and "\n" not in caught.value.message


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_flipped_bit_of_the_manifest_is_found(
    dataset: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray((dataset / "val/manifest.json").read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"damaged|format"):
        Manifest.load(folder)


def test_reader_refuses_a_short_or_missing_shard(copy: Path) -> None:
    database = copy / "train/shard-00001/data.mdb"
    with database.open("r+b") as file:
        file.truncate(database.stat().st_size - 4096)
    with pytest.raises(DataError, match="shard-00001"):
        ShardReader(copy / "train")
    database.unlink()
    with pytest.raises(DataError, match="shard-00001"):
        ShardReader(copy / "train")


def test_reader_names_the_key_of_a_lost_record(copy: Path) -> None:
    folder = copy / "val/shard-00000"
    with lmdb.open(str(folder), lock=False) as env, env.begin(write=True) as transaction:
        transaction.put(b"00000005", b"\xff\xff\xff")
        transaction.delete(b"00000007")
        transaction.put(b"somethin", b"else")
    manifest = Manifest.load(copy / "val")
    manifest.shards[0]["bytes"] = (folder / "data.mdb").stat().st_size
    manifest.save(copy / "val")
    reader = ShardReader(copy / "val")
    for index in (5, 7):
        with pytest.raises(DataError, match=rf"shard-00000.*0000000{index}"):
            reader.read(index)
    output = CliRunner().invoke(verify, [str(copy / "val")]).output
    assert "key 00000005: not a Datum" in output and "key 00000007: missing" in output


@pytest.fixture(scope="module")
def small(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A val split of 24 raw images of 8x8 pixels in three shards. Do not change it."""
    out = tmp_path_factory.mktemp("small")
    options = Options(8, "raw", None, images_per_shard=8)
    build_split(open_source(class_folders / "val", "val"), out, options, workers=1)
    return out / "val"


@pytest.fixture
def split(small: Path, tmp_path: Path) -> Path:
    """A copy of `small` that a test may change."""
    return Path(shutil.copytree(small, tmp_path / "val"))


def change_record(split: Path, index: int, **changes: Any) -> None:
    """Give a record other fields and sign everything again, as somebody who means harm would."""
    manifest = Manifest.load(split)
    shard, key = ShardReader(split).locate(index)
    folder = split / shard
    with lmdb.open(str(folder), lock=False) as env, env.begin(write=True) as transaction:
        stored = transaction.get(key)
        assert stored is not None
        datum = Datum.FromString(stored)
        for name, value in changes.items():
            setattr(datum, name, value)
        record = datum.SerializeToString()
        transaction.put(key, record)
    crcs = np.load(folder / "crc32.npy")
    crcs[int(key)] = zlib.crc32(record)
    np.save(folder / "crc32.npy", crcs)
    entry = next(entry for entry in manifest.shards if entry["name"] == shard)
    entry["bytes"] = (folder / "data.mdb").stat().st_size
    entry["sha256"], entry["crc32_sha256"] = (
        hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("data.mdb", "crc32.npy")
    )
    manifest.save(split)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.integers(0, 23), bit=st.integers(0, 8 * 3 * 64 - 1))
def test_one_flipped_bit_of_a_picture_is_noticed_when_it_is_read(split: Path, index: int, bit: int) -> None:
    reader = ShardReader(split)
    shard, key = reader.locate(index)
    database = split / shard / "data.mdb"
    original = database.read_bytes()
    pixels = reader.read(index)[0].tobytes()
    content = bytearray(original)
    content[content.index(pixels) + bit // 8] ^= 1 << bit % 8
    database.write_bytes(content)
    try:
        changed, _ = ShardReader(split, checksums=False).read(index)
        assert changed.tobytes() != pixels  # a picture like any other
        with pytest.raises(
            DataError, match=rf"{shard}, key {key.decode()} is damaged \(its checksum differs\)"
        ):
            ShardReader(split).read(index)
    finally:
        database.write_bytes(original)


@pytest.mark.parametrize("label", [-100, -1, 4, 2**31 - 1])
@pytest.mark.parametrize("checksums", [True, False])
def test_labels_without_a_class_are_refused(split: Path, label: int, checksums: bool) -> None:
    change_record(split, 13, label=label)
    reader = ShardReader(split, checksums)
    reader.read(12)
    with pytest.raises(
        DataError, match=rf"shard-00001, key 00000005 .*label {label}, but there are 4 classes"
    ):
        reader.read(13)


@pytest.mark.parametrize("damage", ["missing", "flipped", "pipe"])
def test_checksums_are_checked_themselves(split: Path, damage: str) -> None:
    path = split / "shard-00001/crc32.npy"
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flipped":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "pipe":
        os.mkfifo(path)
    reader = ShardReader(split)
    reader.read(0)
    for read in (lambda: reader.read(8), reader.check_counts):
        with pytest.raises(DataError, match=r"shard-00001/crc32\.npy cannot be used"):
            read()
    ShardReader(split, checksums=False).check_counts()


def test_a_shard_that_is_cut_while_it_is_read_is_an_error_and_no_bus_error(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.shards, "SECONDS_BETWEEN_CHECKS", 0)
    reader = ShardReader(split)
    reader.read(8)
    database = split / "shard-00001/data.mdb"
    with database.open("r+b") as file:
        file.truncate(4096)
    for read in (reader.read, reader.stored_bytes):
        with pytest.raises(DataError, match=r"shard-00001/data\.mdb was changed while in use"):
            read(9)
    reader.read(0)
    # what is open can be read when the name is gone or another file's
    database = split / "shard-00000/data.mdb"
    database.unlink()
    reader.read(1)
    database.write_bytes(b"another")
    reader.read(2)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def claims(shape: tuple[int, ...]) -> bytes:
    """The header of a large array, and no array."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(768)


@pytest.mark.parametrize(
    "content",
    [
        npy(np.zeros((4, 4, 3), np.float32)),
        npy(np.zeros((8, 8, 3), np.float64)),
        npy(np.full((8, 8, 3), np.nan, np.float32)),
        npy(np.full((8, 8, 3), 256, np.float32)),
        npy(np.asfortranarray(np.zeros((8, 8, 3), np.float32))),
        npy(np.zeros((8, 8, 3), np.float32))[:-1],
        npy(np.zeros((8, 8, 3), np.float32)) + b"x",
        npy(np.array([[[{}]]])),
        claims((1 << 22, 1 << 20, 3)),
        b"\x93NUMPY\x01\x00\xf0\x0f" + b"(" * 4080,
        b"",
        b"PK\x03\x04",
    ],
)
def test_a_mean_image_that_was_signed_again_is_checked(split: Path, content: bytes) -> None:
    manifest = Manifest.load(split)
    (split / "mean.npy").write_bytes(content)
    replace(manifest, mean_sha256=hashlib.sha256(content).hexdigest()).save(split)
    with pytest.raises(DataError, match=r"mean\.npy is not a mean image") as caught:
        Manifest.load(split).load_mean(split)
    assert "\n" not in caught.value.message
    output = CliRunner().invoke(verify, [str(split), "--workers", "1"])
    assert output.exit_code == 1 and "mean.npy is not a mean image" in output.output


SHARD = {"name": "shard-00000", "count": 24, "bytes": 1, "sha256": "", "crc32_sha256": ""}


@pytest.mark.parametrize(
    "changes",
    [
        {"split": "../train"},
        {"split": None},
        {"count": "24"},
        {"count": 25},
        {"count": True},
        {"size": 0},
        {"size": 1 << 20},
        {"size": 8.0},
        {"encoding": "webp"},
        {"encoding": ["raw"]},
        {"quality": 101},
        {"seed": -1},
        {"classes": []},
        {"classes": {"wnid": "a"}},
        {"classes": [{"wnid": "a"}]},
        {"classes": [{"wnid": 1, "name": None}]},
        {"classes": [{"wnid": "a", "name": None}] * 100_001},
        {"shards": "none"},
        {"shards": [{**SHARD, "name": "../outside"}]},
        {"shards": [{**SHARD, "name": "shard-00000/../../x"}]},
        {"shards": [{**SHARD, "name": "shard-00000\n"}]},
        {"shards": [{**SHARD, "bytes": -1}]},
        {"shards": [{**SHARD, "count": 1e3}]},
        {"shards": [{**SHARD, "count": 12}] * 2},
        {"shards": [{"name": "shard-00000", "count": 24}]},
        {"rejected": [{"source": "a"}]},
        {"rejected": [None]},
        {"channel_mean": [0.0, 0.0]},
        {"channel_mean": [0.0, 0.0, math.nan]},
        {"channel_mean": [0.0, 0.0, 256.0]},
        {"pca_eigenvalues": [math.inf, 0.0, 0.0]},
        {"pca_eigenvalues": ["0", "0", "0"]},
        {"pca_eigenvectors": [[0.0] * 3] * 2},
        {"pca_eigenvectors": [[0.0, 0.0, -math.inf]] * 3},
        {"mean_sha256": None},
        {"fingerprint": 7},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_manifests_that_were_signed_again_are_refused_in_one_line(
    split: Path, changes: dict[str, Any]
) -> None:
    replace(Manifest.load(split), **changes).save(split)
    with pytest.raises(DataError, match=r"manifest\.json has an invalid value \(") as caught:
        ShardReader(split)
    assert "\n" not in caught.value.message and len(caught.value.message) < 400


@pytest.mark.parametrize("damage", ["pipe", "large", "deep", "empty"])
def test_a_manifest_that_cannot_be_read_never_waits_and_takes_no_memory(split: Path, damage: str) -> None:
    path = split / "manifest.json"
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "large":
        with path.open("wb") as file:
            file.truncate((64 << 20) + 1)
    else:
        path.write_bytes(b"[" * 100_000 if damage == "deep" else b"")
    with pytest.raises(DataError, match=r"not a regular file|larger than|damaged"):
        Manifest.load(split)


def test_verify_names_folders_that_are_in_no_manifest(split: Path) -> None:
    shutil.copytree(split / "shard-00000", split / "shard-00003")
    (split / ".snapshot").mkdir()
    result = CliRunner().invoke(verify, [str(split), "--workers", "1"])
    assert result.exit_code == 1 and "shard-00003: not in the manifest" in result.output
    assert ".snapshot" not in result.output


@pytest.mark.parametrize("encoding", ["jpeg", "png"])
def test_a_record_cut_short_is_named(class_folders: Path, tmp_path: Path, encoding: str) -> None:
    """In a batch, zeros follow each record, so a decoder might not notice a missing end."""
    options = Options(64, encoding, 90 if encoding == "jpeg" else None)
    build_split(open_source(class_folders / "val", "val"), tmp_path, options, workers=1)
    folder, key = tmp_path / "val/shard-00000", record_key(3)
    with lmdb.open(str(folder), lock=False) as env, env.begin(write=True) as transaction:
        stored = transaction.get(key)
        assert stored is not None
        datum = Datum.FromString(stored)
        datum.data = datum.data[:-1]
        transaction.put(key, datum.SerializeToString())
    manifest = Manifest.load(tmp_path / "val")
    manifest.shards[0]["bytes"] = (folder / "data.mdb").stat().st_size
    manifest.save(tmp_path / "val")
    for checksums, why in ((False, "ends too early"), (True, "its checksum differs")):
        reader = ShardReader(tmp_path / "val", checksums)
        reader.read(2)
        with pytest.raises(DataError, match=rf"shard-00000, key 00000003 .*{why}"):
            reader.read(3)


def test_the_error_for_a_folder_without_a_data_set_has_the_remedy(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "photos/train/n01440764").mkdir(parents=True)
    with pytest.raises(DataError, match=r"which holds n01440764: .*build_lmdb.py \S*photos OUT"):
        ShardReader(tmp_path / "photos/train")
    (tmp_path / "my tars").mkdir()
    (tmp_path / "my tars/ILSVRC2012_img_train.tar").touch()
    with pytest.raises(
        DataError, match=r"holds ILSVRC2012_img_train\.tar: .*build_lmdb.py '\S*my tars' OUT`"
    ):
        ShardReader(tmp_path / "my tars/train")
    with pytest.raises(DataError, match=f"one split of a data set; give {re.escape(str(copy))}$"):
        ShardReader(copy / "train" / "val")
    shutil.rmtree(copy / "val")
    with pytest.raises(
        DataError, match=rf": build it with `\S+ \S+ SOURCE {re.escape(str(tmp_path))}/none`$"
    ):
        ShardReader(tmp_path / "none" / "train")
    with pytest.raises(DataError, match=r" --split train\|val`$"):
        ShardReader(copy / "training")
    with pytest.raises(DataError, match=r"--split val`; without .*`.* --val-fraction 0\.2 --overwrite`$"):
        ShardReader(copy / "val")


def test_too_many_open_files_are_no_damage(class_folders: Path, tmp_path: Path) -> None:
    build_split(
        open_source(class_folders / "val", "val"), tmp_path, Options(32, images_per_shard=1), workers=1
    )
    program = """if True:
        import resource, sys
        from base.errors import DataError
        from pipeline.shards import Manifest, ShardReader
        def attempt(call):
            try:
                call()
            except DataError as error:
                print(error.message)
        readers = [ShardReader(sys.argv[1]) for _ in range(2)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
        attempt(readers[0].check_counts)
        attempt(lambda: [readers[1].read(index) for index in range(24)])
        files = []
        try:
            while True:
                files.append(open("/dev/null"))
        except OSError:
            attempt(lambda: Manifest.load(sys.argv[1]))
            attempt(lambda: readers[0].manifest.load_mean(sys.argv[1]))
    """
    command = [sys.executable, "-c", program, str(tmp_path / "val")]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert "too many open files (one per shard, and the limit is 16)" in line
        assert "ulimit -n 65536" in line and "again" not in line and "damaged" not in line


def test_mean_is_checked(copy: Path) -> None:
    manifest = Manifest.load(copy / "val")
    assert manifest.load_mean(copy / "val").shape == (256, 256, 3)
    path = copy / "val/mean.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"mean\.npy"):
        manifest.load_mean(copy / "val")


def test_verify_passes_what_was_built(dataset: Path) -> None:
    result = CliRunner().invoke(verify, [str(dataset), "--workers", "2"])
    assert result.exit_code == 0, result.output
    assert "96 images" in result.output and "24 images" in result.output and "damaged" not in result.output


def test_verify_names_the_damaged_record(copy: Path) -> None:
    reader = ShardReader(copy / "train")
    index = 70
    shard, key = reader.locate(index)
    database = copy / "train" / shard / "data.mdb"
    content = bytearray(database.read_bytes())
    data = reader.read(index)[0].tobytes()
    middle = data[len(data) // 2 :][:300]  # the tables at the start are the same in all JPEGs
    content[content.index(middle) + 99] ^= 4
    database.write_bytes(content)
    result = CliRunner().invoke(verify, [str(copy / "train")])
    assert result.exit_code == 1
    assert f"key {key.decode()}: " in result.output
    assert [line.split()[-1] for line in result.output.splitlines() if line.startswith("  shard")] == [
        *("ok", "ok", "damaged")
    ]


@pytest.mark.parametrize(
    ("file", "positions"),
    [
        ("shard-00000/data.mdb", (20, 4096 + 12, 5 / 7)),
        ("shard-00000/crc32.npy", (0.9,)),
        ("mean.npy", (0.5,)),
    ],
)
def test_verify_finds_a_flip_anywhere(copy: Path, file: str, positions: tuple[float, ...]) -> None:
    """At bytes, or at shares of the file; `make faults` tries a thousand."""
    path = copy / "val" / file
    original = path.read_bytes()
    for position in positions:
        content = bytearray(original)
        content[int(position * len(original)) if position < 1 else int(position)] ^= 0x10
        path.write_bytes(content)
        result = CliRunner().invoke(verify, [str(copy / "val"), "--workers", "1"])
        assert result.exit_code == 1 and "damaged" in result.output, (file, position, result.output)
