"""The forms in which people have ImageNet and other image folders: what is read, left out, refused."""

import gzip
import io
import json
import os
import tarfile
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import tar_of, tree, webdataset, write_parquet

import pipeline.build.split
from base.errors import DataError
from pipeline.build import cifar
from pipeline.build.listing import RawReader
from pipeline.build.sources import Source, find_splits, open_source, split_source
from pipeline.build.split import Options, build_split
from pipeline.shards import Manifest, ShardReader
from tools.build_lmdb import main as build

WNIDS = ["n01440764", "n01443537", "n02119789"]


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def _write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def _classes(source: Source) -> dict[str, str]:
    return {image.name: source.wnids[image.label] for image in source.images}


def _classes_of_bytes(source: Source) -> dict[bytes, str]:
    reader = RawReader(source.path)
    return {reader.read(image): source.wnids[image.label] for image in source.images}


def _train(root: str = "") -> dict[str, bytes]:
    return {f"{root}{w}/{w}_{i}.JPEG": _jpeg(10 * n + i) for n, w in enumerate(WNIDS) for i in range(3)}


def _invoke(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(build, [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


# --- forms of ImageNet -------------------------------------------------------------------------------------


def test_kaggles_tree_from_any_folder_on_the_way(tmp_path: Path) -> None:
    base = "ILSVRC/Data/CLS-LOC/"
    files = {**_train(base + "train/"), base + "test/ILSVRC2012_test_00000001.JPEG": _jpeg(1)}
    truth = {"ILSVRC2012_val_00000001": WNIDS[2], "ILSVRC2012_val_00000002": WNIDS[0]}
    files |= {f"{base}val/{name}.JPEG": _jpeg(50 + i) for i, name in enumerate(truth)}
    files |= {f"ILSVRC/Annotations/CLS-LOC/{WNIDS[0]}/x.xml": b"<a/>", base + "val/Thumbs.db": b"x"}
    rows = "".join(f"{name},{wnid} 1 2 3 4\n" for name, wnid in truth.items())
    files["LOC_val_solution.csv"] = b"ImageId,PredictionString\n" + rows.encode()
    files["LOC_synset_mapping.txt"] = "".join(f"{w} the {w}, so called\n" for w in WNIDS).encode()
    root = _write(tmp_path / "kaggle", files)
    for start in ("", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"):
        splits = find_splits(root / start)
        assert splits == {name: root / base / name for name in ("train", "val")}
        train = open_source(splits["train"], "train")
        val = open_source(splits["val"], "val", train_wnids=train.wnids)
        assert train.wnids == WNIDS and train.names[WNIDS[0]] == f"the {WNIDS[0]}, so called"
        assert _classes(val) == {f"{name}.JPEG": wnid for name, wnid in truth.items()}
    code, output = _invoke(root, tmp_path / "out", "--size", 32, "--workers", 1)
    assert code == 0 and "CLS-LOC also holds test, which is not read" in output
    assert f"val has no images of {WNIDS[1]}" in output
    assert str(root / "LOC_val_solution.csv") in output


def test_tiny_imagenets_tree(tmp_path: Path) -> None:
    files = {f"train/{w}/images/{w}_{i}.JPEG": _jpeg(i) for w in WNIDS for i in range(2)}
    files |= {f"train/{w}/{w}_boxes.txt": b"0 0 1 1" for w in WNIDS}
    files |= {f"val/images/val_{i}.JPEG": _jpeg(9 + i) for i in range(3)}
    files["val/val_annotations.txt"] = b"".join(
        b"val_%d.JPEG\t%s\t0\t32\t44\t62\n" % (i, w.encode()) for i, w in enumerate(reversed(WNIDS))
    )
    files["wnids.txt"] = "\n".join(WNIDS).encode()
    files["words.txt"] = b"n00001740\tentity\n" + b"".join(b"%s\ta fish\n" % w.encode() for w in WNIDS)
    splits = find_splits(_write(tmp_path, files))
    train = open_source(splits["train"], "train")
    val = open_source(splits["val"], "val", train_wnids=train.wnids)
    assert train.wnids == WNIDS and train.names == dict.fromkeys(WNIDS, "a fish")
    assert _classes(val) == {f"images/val_{i}.JPEG": w for i, w in enumerate(reversed(WNIDS))}


def test_folders_called_by_numbers_are_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    root = _write(tmp_path, {f"{i}/x.jpeg": _jpeg(i) for i in range(12)})
    train_wnids = [f"n{i:08d}" for i in range(12)]
    val = open_source(root, "val", train_wnids=train_wnids)
    assert _classes(val) == {f"{i}/x.jpeg": train_wnids[i] for i in range(12)}
    assert open_source(root, "train").wnids == [str(i) for i in range(12)]
    with pytest.raises(DataError, match="only 11 classes, numbered from 0"):
        open_source(root, "val", train_wnids=train_wnids[:11])


def test_a_class_in_the_name_of_the_file(tmp_path: Path) -> None:
    root = _write(
        tmp_path / "val",
        {
            "ILSVRC2012_val_00000293_n01440764.JPEG": _jpeg(1),
            "n02119789_10026_n02119789.JPEG": _jpeg(2),
            "n01443537_7.JPEG": _jpeg(3),
            "Thumbs2.db": b"",
        },
    )
    source = open_source(root, "val")
    assert list(_classes(source).values()) == ["n01440764", "n01443537", "n02119789"]
    assert source.rejected == [("Thumbs2.db", "no class in its name")]


@pytest.mark.parametrize("prefix", ["", "./", "train/", "/data/imagenet/train/", "HERE/"])
def test_caffes_lists_of_class_folders(tmp_path: Path, prefix: str) -> None:
    root = _write(tmp_path / "images", _train())
    prefix = prefix.replace("HERE", str(root))
    labels = tmp_path / "train.txt"
    labels.write_text("".join(f"{prefix}{n} {WNIDS.index(n.split('/')[0])}\n" for n in _train()))
    source = open_source(root, "train", labels=labels)
    assert source.wnids == WNIDS and _classes(source) == {n: n.split("/")[0] for n in _train()}


def test_webdataset_tars(tmp_path: Path) -> None:
    pictures = {f"{w}_{i}": _jpeg(10 * n + i) for n, w in enumerate(WNIDS) for i in range(3)}
    numbers = {key: WNIDS.index(key[:9]) for key in pictures}
    keys = list(pictures)
    root = tmp_path / "wds"
    parts = {f"in-train-{i:04d}.tar": keys[i::2] for i in range(2)} | {"in-validation-00.tar": keys[:2]}
    _write(root, {t: webdataset({k: pictures[k] for k in part}, numbers) for t, part in parts.items()})
    splits = find_splits(root)
    assert splits == {"train": root, "val": root}
    train, val = open_source(root, "train"), open_source(root, "val", train_wnids=WNIDS)
    assert _classes_of_bytes(train) == {pictures[key]: key[:9] for key in keys}
    assert _classes_of_bytes(val) == {pictures[key]: key[:9] for key in keys[:2]}
    assert find_splits(root / "in-train-0000.tar") == {"train": root / "in-train-0000.tar"}
    outs = [tmp_path / "a", tmp_path / "b"]
    for workers, out in enumerate(outs, 1):
        build_split(train, out, Options(32, images_per_shard=4), workers=workers)
    assert tree(outs[0]) == tree(outs[1])
    # keys without a wnid: the numbers are the classes, and an image without a class is listed
    members = {
        "a/0.jpg": _jpeg(1),
        "a/0.cls": b"1",
        "a/1.jpg": _jpeg(2),
        "a/1.cls": b"0",
        "a/2.jpg": _jpeg(3),
    }
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    source = open_source(tmp_path / "x.tar", "train")
    assert [image.label for image in source.images] == [1, 0] and source.wnids == ["0000", "0001"]
    assert source.rejected == [("x.tar/a/2.jpg", "no class (.cls) beside it in the tar")]


def test_hugging_faces_parquet_files(tmp_path: Path) -> None:
    pictures = [(_jpeg(i), None, i % 3) for i in range(22)]
    names = ["tench, Tinca tinca", "goldfish", "kit fox"]
    root = tmp_path / "imagenet-1k"
    write_parquet(root / "data/train-00000-of-00002.parquet", pictures[:13], names)
    write_parquet(
        root / "data/train-00001-of-00002-0a1b2c.parquet", [*pictures[13:], (_jpeg(99), None, -1)], names
    )
    write_parquet(root / "data/validation-00000-of-00001.parquet", pictures[:5], names)
    splits = find_splits(root)
    assert list(splits) == ["train", "val"]
    train = open_source(splits["train"], "train")
    assert [train.names[wnid] for wnid in train.wnids] == names
    expected = {content: train.wnids[label] for content, _, label in pictures}
    assert _classes_of_bytes(train) == expected
    assert [reason for _, reason in train.rejected] == ["no label"]
    val = open_source(splits["val"], "val", train_wnids=train.wnids)
    assert len(val.images) == 5
    outs = [tmp_path / "a", tmp_path / "b"]
    for workers, out in enumerate(outs, 1):
        build_split(train, out, Options(32, "raw", None, images_per_shard=5), workers=workers)
    assert tree(outs[0]) == tree(outs[1])
    assert sorted(ShardReader(outs[0] / "train").read(i)[1] for i in range(22)) == sorted(
        i % 3 for i in range(22)
    )
    with_names = open_source(splits["train"], "train", names=_names_file(tmp_path))
    assert with_names.wnids == WNIDS


def _names_file(folder: Path) -> Path:
    path = folder / "names.txt"
    path.write_text("".join(f"{wnid} name\n" for wnid in WNIDS))
    return path


def test_damaged_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    write_parquet(path, [(None, "x.jpg", 0), (_jpeg(1), "y.jpg", 1)], None)
    source = open_source(path, "train")
    summary = build_split(source, tmp_path / "out", Options(32), workers=1)
    assert summary.accepted == 1 and summary.rejected[0]["reason"] == "the row holds no image bytes"
    assert summary.empty_classes == ["0000"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="download it again") as caught:
        open_source(path, "train")
    assert "\n" not in caught.value.message


# --- wrong without a word ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["wrap/base", "wrap"])
def test_a_folder_too_high_is_refused_and_the_right_one_named(tmp_path: Path, place: str) -> None:
    _write(tmp_path / place, {**_train("train/"), **_train("val/"), "README": b""})
    with pytest.raises(DataError, match=rf"give {tmp_path / place} instead, which holds train, val"):
        open_source(tmp_path, "train")
    _write(tmp_path / "one", _train("images/"))
    with pytest.raises(DataError, match=rf"give {tmp_path / 'one/images'} instead, which holds {WNIDS[0]}"):
        open_source(tmp_path / "one", "train")


@pytest.mark.parametrize("splits", [["train/", "val/"], ["train/"], ["x/train/", "x/val/"]])
def test_a_tar_with_splits_in_it_is_refused(tmp_path: Path, splits: list[str]) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({name: content for split in splits for name, content in _train(split).items()}))
    with pytest.raises(DataError, match="unpack it, then give the folder of the classes"):
        open_source(path, "train")


def test_what_holds_no_images_is_left_out_and_named(tmp_path: Path) -> None:
    root = _write(
        tmp_path / "photos",
        {
            **_train(),
            "Annotations/x.xml": b"<a/>",
            "@eaDir/SYNO@.jpg": _jpeg(1),
            f"{WNIDS[0]}/@eaDir/thumb.jpg": _jpeg(2),
            "loose.jpg": _jpeg(3),
            "no-suffix/picture": _jpeg(4),
            "broken/x.JPEG": b"no image",
        },
    )
    (root / "empty").mkdir()
    out = root / "data/out"
    for flags in ([], ["--resume"]):  # OUT is there the second time
        code, output = _invoke(root, out, "--size", 32, "--workers", 1, *flags)
        assert code == 0, output
        assert f"folders without images in {root} are left out: Annotations, empty" in output
        assert "classes without an accepted image: broken" in output
    manifest = Manifest.load(out / "train")
    assert [entry["wnid"] for entry in manifest.classes] == ["broken", *WNIDS, "no-suffix"]
    assert {e["source"]: e["reason"] for e in manifest.rejected} == {
        "Annotations/": "a folder without images",
        "broken/x.JPEG": "not a JPEG, PNG, GIF, BMP or WebP file",
        "empty/": "a folder without images",
        "loose.jpg": "not in a class",
    }


def test_val_folders_without_images_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "val/a").mkdir(parents=True)
    for path in (tmp_path / "val", tmp_path / "val/a"):
        with pytest.raises(DataError, match="holds no images"):
            open_source(path, "val", train_wnids=["a"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.jpg 0\nb.jpg 1\na.jpg 1\n", "gives a.jpg two labels, 0 and 1"),
        ("a.jpg 1\nb.jpg 2\n", "numbers its classes from 1"),
    ],
)
def test_labels_that_contradict_themselves(tmp_path: Path, lines: str, message: str) -> None:
    root = _write(tmp_path / "x", {"a.jpg": b"", "b.jpg": b"", "Thumbs.db": b""})
    (tmp_path / "labels.txt").write_text(lines)
    with pytest.raises(DataError, match=message):
        open_source(root, "train", labels=tmp_path / "labels.txt")


def test_a_class_called_train(tmp_path: Path) -> None:
    root = _write(tmp_path, {f"{name}/{i}.jpg": _jpeg(i) for name in ("bus", "train") for i in range(2)})
    assert find_splits(root, "train") == {"train": root}
    assert open_source(root, "train").wnids == ["bus", "train"]


def test_class_names_of_other_systems(tmp_path: Path) -> None:
    composed = unicodedata.normalize("NFC", "café")
    folders = [os.fsencode(unicodedata.normalize("NFD", "café")), b"th\xe9", b"apple, red"]
    for folder in folders:
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + folder))
        path.mkdir()
        (path / "x.jpg").write_bytes(_jpeg(1))
    source = open_source(tmp_path, "train")
    assert source.wnids == ["apple, red", composed, "thé"]
    assert len(open_source(tmp_path, "val", train_wnids=["apple, red", composed, "thé"]).images) == 3


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    root = _write(tmp_path / "x", {"a/x.jpg": _jpeg(1)})
    os.mkfifo(tmp_path / "pipe")
    (root / "a/link.jpg").symlink_to(tmp_path / "pipe")
    source = open_source(root, "train")
    assert source.rejected == [("a/link.jpg", "not a regular file")]
    with pytest.raises(ValueError, match="not a regular file"):
        RawReader(root).read(source.images[0]._replace(name="a/link.jpg"))


def test_lists_and_archives_that_are_pipes_are_not_waited_for(tmp_path: Path) -> None:
    root = _write(tmp_path / "val", {"ILSVRC2012_val_00000001.JPEG": _jpeg(1)})
    pipe = tmp_path / "pipe.tar.gz"
    os.mkfifo(pipe)
    for options in ("--devkit", "--labels", "--names"):
        code, output = _invoke(root, tmp_path / "out", "--split", "val", options, pipe)
        assert code == 1 and "not a regular file" in output.splitlines()[-1], output
    with pytest.raises(DataError, match="not a regular file"):
        cifar.unpack(pipe, tmp_path / "cifar")


# --- validation images from the training images ------------------------------------------------------------


def test_val_fraction_takes_a_part_of_each_class(tmp_path: Path) -> None:
    files = {f"{c}/{i}.jpg": _jpeg(i) for c, n in (("a", 20), ("b", 10), ("c", 2)) for i in range(n)}
    root = _write(tmp_path / "photos", files)
    source = open_source(root, "train")
    train, val = split_source(source, 0.2, seed=0)
    assert sorted(train.images + val.images) == source.images
    assert [sum(i.label == label for i in val.images) for label in range(3)] == [4, 2, 1]
    assert split_source(source, 0.2, 0) == (train, val)
    assert split_source(source, 0.2, 1)[1].images != val.images
    arguments = [root, tmp_path / "out", "--size", 32, "--workers", 1]
    code, output = _invoke(*arguments)
    assert code == 0 and "--val-fraction 0.2" in output
    code, output = _invoke(*arguments, "--val-fraction", 0.2, "--overwrite")
    assert code == 0, output
    assert [Manifest.load(tmp_path / "out" / s).count for s in ("train", "val")] == [25, 7]
    assert _invoke(*arguments, "--val-fraction", 0.2, "--split", "train")[0] == 2
    assert _invoke(*arguments, "--val-fraction", 1)[0] == 2
    with pytest.raises(DataError, match=r"class a of .* has one image"):
        split_source(open_source(_write(tmp_path / "y", {"a/x.jpg": b"", "b/x.jpg": b""}), "train"), 0.5, 0)


def test_both_splits_are_compared_before_either_is_built(tmp_path: Path) -> None:
    root = _write(tmp_path / "x", {**_train("train/"), "val/other/x.jpg": _jpeg(1)})
    code, output = _invoke(root, tmp_path / "out", "--size", 32)
    assert code == 1 and "class other of" in output
    assert not (tmp_path / "out").exists()


# --- damaged images ----------------------------------------------------------------------------------------


def test_a_jpeg_that_decodes_with_warnings_is_listed_or_rejected(tmp_path: Path) -> None:
    smooth = cv2.GaussianBlur(
        np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8), (0, 0), 5
    )
    damaged = bytearray(cv2.imencode(".jpg", smooth)[1].tobytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 300] = bytes(300)
    files = {"a/good.jpg": _jpeg(1), "a/zeros.jpg": bytes(damaged), "b/good.jpg": _jpeg(2)}
    root = _write(tmp_path / "x", files)
    code, output = _invoke(root, tmp_path / "out", "--size", 32, "--workers", 1)
    assert code == 0 and "1 accepted with warnings" in output
    manifest = Manifest.load(tmp_path / "out/train")
    assert manifest.count == 3 and [entry["source"] for entry in manifest.warned] == ["a/zeros.jpg"]
    assert "Corrupt JPEG data" in manifest.warned[0]["reason"]
    _, output = _invoke(root, tmp_path / "strict", "--size", 32, "--workers", 1, "--strict")
    manifest = Manifest.load(tmp_path / "strict/train")
    assert manifest.count == 2 and not manifest.warned
    assert manifest.rejected[0]["reason"].startswith("damaged: Corrupt JPEG data")


# --- hostile archives and folders --------------------------------------------------------------------------


def test_a_tar_header_that_claims_much_costs_one_inner_tar(tmp_path: Path) -> None:
    long_name = tarfile.TarInfo("x")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1 << 42
    chain = b""
    for _ in range(3000):
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, 0
        chain += header.tobuf()
    members = {"n1.tar": tar_of({"a.jpg": b"a"}), "n2.tar": long_name.tobuf() + bytes(1024), "n3.tar": chain}
    path = tmp_path / "train.tar"
    path.write_bytes(tar_of(members))
    source = open_source(path, "val")
    assert [image.name for image in source.images] == ["n1/a.jpg"]
    assert [name for name, _ in source.rejected] == ["n2.tar", "n3.tar"]


def test_a_devkit_that_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    import scipy.io

    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": np.zeros(10 << 20)}, do_compression=True)
    files = {"k/data/meta.mat": mat.getvalue(), "k/data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}
    bombs = {"mat": gzip.compress(tar_of(files)), "gz": gzip.compress(bytes(80 << 20), 1)}
    flat = _write(tmp_path / "val", {"ILSVRC2012_val_00000001.JPEG": b""})
    for name, content in bombs.items():
        assert len(content) < 1 << 20
        path = tmp_path / f"{name}.tar.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match="more than 67,108,864 bytes"):
            open_source(flat, "val", devkit=path)


@pytest.mark.parametrize("planted", ["name", "compressed", "pipe"])
def test_a_planted_note_deletes_nothing(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _write(tmp_path / "photos", _train())
    source = open_source(root, "train")
    out = tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.build.split, "_write_manifest", killed)
        build_split(source, out, Options(32), workers=1)
    expected = build_split(source, tmp_path / "whole", Options(32), workers=1)
    victim = _write(tmp_path / "victim", {"thesis.tex": b"x"})
    (note,) = (out / "train.partial/work").glob("*.npz")
    with np.load(note) as arrays:
        text, sums = json.loads(str(arrays["text"])), arrays["sums"]
    if planted == "pipe":
        note.unlink()
        os.mkfifo(note)
    elif planted == "compressed":  # the right note, but one like it could unfold to any size
        np.savez_compressed(note, sums=sums, text=np.array(json.dumps(text)))
    else:
        text["shard"] |= {"name": "../../victim", "count": 0}
        np.savez(note, sums=sums, text=np.array(json.dumps(text)))
    summary = build_split(source, out, Options(32), workers=1, resume=True)
    assert summary.accepted == expected.accepted and summary.resumed == 0
    assert (victim / "thesis.tex").exists()
    assert tree(out / "train") == tree(tmp_path / "whole/train")


def test_a_linked_split_is_replaced_where_it_lies(tmp_path: Path) -> None:
    source = open_source(_write(tmp_path / "photos", _train()), "train")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train").symlink_to(tmp_path / "disk/train")
    for size in (32, 48):
        build_split(source, tmp_path / "out", Options(size), workers=1, overwrite=True)
        assert Manifest.load(tmp_path / "out/train").size == size
    assert (tmp_path / "out/train").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["train"]
