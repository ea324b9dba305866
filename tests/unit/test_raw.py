"""Sources of raw images: class folders, labels files, and the layout of the official tars in miniature."""

import io
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from base.errors import DataError
from pipeline.build.listing import RawReader
from pipeline.build.sources import Source, find_splits, open_source

# As in the real devkit, ids do not follow the sorted order of wnids.
IDS = {1: "n02119789", 2: "n02100735", 3: "n01440764", 4: "n01443537"}
WORDS = {1: "kit fox, Vulpes macrotis", 2: "English setter", 3: "tench, Tinca tinca", 4: "goldfish"}
TRUTH = [1, 3, 2, 4, 3, 1]  # devkit ids of the validation images


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def _add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            _add(tar, name, content)
    return buffer.getvalue()


def _pictures() -> dict[str, bytes]:
    """name -> JPEG of a training set: three images for each of the four classes."""
    return {f"{wnid}/{wnid}_{i}.JPEG": _jpeg(10 * n + i) for n, wnid in IDS.items() for i in range(3)}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three official tars."""
    import scipy.io

    folder = tmp_path_factory.mktemp("ilsvrc")
    pictures = _pictures()
    inner = {
        f"{wnid}.tar": _tar({n.split("/")[1]: c for n, c in pictures.items() if n.startswith(wnid)})
        for wnid in reversed(IDS.values())
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(_tar(inner))
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": _jpeg(100 + i) for i in (3, 1, 2, 6, 5, 4)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(_tar(val))
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(float(i), IDS[i], WORDS[i], "…", 0.0) for i in IDS] + [(5.0, "n00001740", "entity", "…", 4.0)]
    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": np.array(rows, fields).reshape(-1, 1)})
    kit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": mat.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(
            f"{i}\n" for i in TRUTH
        ).encode(),
    }
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, content in kit.items():
            _add(tar, name, content)
    return folder


def _contents(source: Source) -> dict[str, bytes]:
    reader = RawReader(source.path)
    contents = {image.name: reader.read(image) for image in source.images}
    reader.close()
    return contents


def _folders(root: Path, pictures: dict[str, bytes]) -> Path:
    for name, content in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_official_train_tar_equals_its_folders(official: Path, tmp_path: Path) -> None:
    splits = find_splits(official)
    assert list(splits) == ["train", "val"]
    tar = open_source(splits["train"], "train")
    folder = open_source(_folders(tmp_path, _pictures()), "train")
    assert tar.wnids == folder.wnids == sorted(IDS.values())
    assert [image[:2] for image in tar.images] == [image[:2] for image in folder.images]
    assert _contents(tar) == _contents(folder) == _pictures()
    assert tar.names["n01440764"] == "tench, Tinca tinca" and not tar.rejected
    assert find_splits(splits["train"]) == {"train": splits["train"]}
    assert find_splits(splits["val"]) == {"val": splits["val"]}
    assert find_splits(official, "val") == {"val": splits["val"]}


def test_devkit_ids_become_sorted_positions(official: Path) -> None:
    source = open_source(official / "ILSVRC2012_img_val.tar", "val")
    assert source.wnids == sorted(IDS.values())
    for number, (image, truth) in enumerate(zip(source.images, TRUTH, strict=True), 1):
        assert image.name == f"ILSVRC2012_val_{number:08d}.JPEG"
        assert source.wnids[image.label] == IDS[truth]
        assert _contents(source)[image.name] == _jpeg(100 + number)
    assert source.wnids.index(IDS[1]) == 3  # not 0: the trap


def test_unpacked_validation_images_and_devkit(official: Path, tmp_path: Path) -> None:
    packed = open_source(official / "ILSVRC2012_img_val.tar", "val")
    with tarfile.open(official / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        tar.extractall(tmp_path / "kit", filter="data")
    flat = _folders(tmp_path / "val", _contents(packed))
    source = open_source(flat, "val", devkit=tmp_path / "kit/ILSVRC2012_devkit_t12")
    assert [image[:2] for image in source.images] == [image[:2] for image in packed.images]


def test_missing_validation_images_are_named(official: Path, tmp_path: Path) -> None:
    flat = _folders(tmp_path / "val", {f"ILSVRC2012_val_{i:08d}.JPEG": b"x" for i in (2, 5)})
    (flat / "Thumbs.jpg").write_bytes(b"x")
    kit, solution = official / "ILSVRC2012_devkit_t12.tar.gz", tmp_path / "LOC_val_solution.csv"
    names = [f"ILSVRC2012_val_{i:08d}" for i in (1, 3, 4)]
    some = ", ".join(f"{name}.JPEG" for name in names)
    notes = open_source(flat, "val", devkit=kit).notes
    assert notes == [f"{flat} lacks 4 of the 6 images that {kit} labels: {some}, ..."]
    (flat / "Thumbs.jpg").unlink()
    rows = [f"{name},n02119789 1 2 3 4" for name in (*names, *(f"ILSVRC2012_val_{i:08d}" for i in (2, 5)))]
    solution.write_text("\n".join(["ImageId,PredictionString", *rows]))
    notes = open_source(flat, "val").notes
    assert f"{flat} lacks 3 of the 5 images that {solution} labels: {some}" in notes


def test_val_follows_the_classes_of_train(official: Path, tmp_path: Path) -> None:
    val = official / "ILSVRC2012_img_val.tar"
    more = ["n00000001", *sorted(IDS.values())]
    assert {image.label for image in open_source(val, "val", train_wnids=more).images} == {1, 2, 3, 4}
    with pytest.raises(DataError, match=r"class n02119789 .* not in the training set"):
        open_source(val, "val", train_wnids=sorted(IDS.values())[:3])
    folder = _folders(tmp_path, {"b/1.JPEG": b"x", "c/1.JPEG": b"x"})
    assert [image.label for image in open_source(folder, "val", train_wnids=list("abc")).images] == [1, 2]
    with pytest.raises(DataError, match=r"class c of"):
        open_source(folder, "val", train_wnids=["a", "b"])


@pytest.mark.parametrize("kind", ["wnid", "number", "kaggle", "tabs"])
def test_labels_file(official: Path, tmp_path: Path, kind: str) -> None:
    expected = open_source(official / "ILSVRC2012_img_val.tar", "val")
    lines = {
        "wnid": [f"{image.name} {expected.wnids[image.label]}" for image in expected.images],
        "number": [f"{image.name} {image.label}" for image in expected.images],
        "tabs": [f"{image.name}\t{image.label}\r" for image in expected.images],
        "kaggle": [
            "ImageId,PredictionString",
            *(f"{i.name[:-5]},{expected.wnids[i.label]} 1 2 3 4 " for i in expected.images),
        ],
    }[kind]
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(lines) + "\n")
    val = tmp_path / "val.tar"
    val.write_bytes((official / "ILSVRC2012_img_val.tar").read_bytes())
    source = open_source(val, "val", labels=labels, train_wnids=expected.wnids)
    assert [image[:2] for image in source.images] == [image[:2] for image in expected.images]


def test_labels_file_for_a_training_folder(tmp_path: Path) -> None:
    folder = _folders(tmp_path / "x", {f"pic {i}.jpg": b"x" for i in range(12)})
    labels = folder / "train.txt"  # beside the images, and none of them
    labels.write_text("".join(f"pic {i}.jpg {i}\n" for i in range(12)))
    source = open_source(folder, "train", labels=labels)
    assert source.wnids == sorted(source.wnids) and len(source.wnids) == 12
    assert all(image.name == f"pic {image.label}.jpg" for image in source.images)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.jpg n1\n", "no line for b.jpg"),
        ("a.jpg n1\nb.jpg n2\nc.jpg n1\n", "lists c.jpg"),
        ("a.jpg n1\nb.jpg n9\n", "class n9 .* not in the training set"),
        ("a.jpg 0\nb.jpg 2\n", "label 2, but there are only 2"),
        ("a.jpg n1\nb.jpg\n", "line 2: expected"),
    ],
)
def test_wrong_labels_file(tmp_path: Path, lines: str, message: str) -> None:
    folder = _folders(tmp_path / "flat", {"a.jpg": b"x", "b.jpg": b"x"})
    labels = tmp_path / "labels.txt"
    labels.write_text(lines)
    with pytest.raises(DataError, match=message) as caught:
        open_source(folder, "val", labels=labels, train_wnids=["n1", "n2"])
    assert "\n" not in caught.value.message


def test_names_are_taken_from_the_folder_and_its_parent_and_no_further_up(tmp_path: Path) -> None:
    """A folder above them, such as /tmp, may belong to other users; the message names the file that was used."""
    folder = tmp_path / "photos/train"
    _folders(folder, {"a/x.JPEG": b"1"})
    (tmp_path / "synset_words.txt").write_text("a planted")
    source = open_source(folder, "train")
    assert source.names == {} and source.notes == []
    for place in (folder.parent, folder):
        (place / "synset_words.txt").write_text(f"a from {place.name}")
        source = open_source(folder, "train")
        assert source.names == {"a": f"from {place.name}"}
        assert source.notes == [f"names of the classes: {place / 'synset_words.txt'}"]


def test_class_folders_skip_what_is_hidden_and_try_the_rest(tmp_path: Path) -> None:
    _folders(
        tmp_path,
        {
            "b/x.JPEG": b"1",
            "b/deep/er/y.png": b"2",
            "b/.DS_Store": b"",
            "b/notes.txt": b"tried, and rejected by the decoder",
            "a/z.JPEG": b"3",
            "README": b"",
            ".cache/q.JPEG": b"",
            "synset_words.txt": b"a first name\nb second, name\n",
        },
    )
    os.mkfifo(tmp_path / "a/pipe.JPEG")
    (tmp_path / "b/link.JPEG").symlink_to("x.JPEG")
    (tmp_path / "b/round").symlink_to("..")
    (tmp_path / "c").symlink_to("a")
    source = open_source(tmp_path, "train")
    names = [image.name for image in source.images]
    assert names == [*("a/z.JPEG", "b/deep/er/y.png", "b/link.JPEG", "b/notes.txt", "b/x.JPEG", "c/z.JPEG")]
    assert [image.label for image in source.images] == [0, 1, 1, 1, 1, 2]
    assert source.names == {"a": "first name", "b": "second, name"}
    assert source.rejected == [
        ("README", "not in a class"),
        ("a/pipe.JPEG", "not a regular file"),
        ("b/round", "a link to a folder below a class folder"),
        ("c/pipe.JPEG", "not a regular file"),
    ]


def test_hostile_tar_members_are_rejected_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "in/train.tar"
    path.parent.mkdir()
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        _add(tar, "good.JPEG", b"good")
        _add(tar, "/etc/absolute.JPEG", b"x")
        _add(tar, "../../up.JPEG", b"x")
        _add(tar, "soft.JPEG", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        _add(tar, "hard.JPEG", type=tarfile.LNKTYPE, linkname="good.JPEG")
        _add(tar, "device.JPEG", type=tarfile.CHRTYPE)
        _add(tar, "fifo.JPEG", type=tarfile.FIFOTYPE)
        _add(tar, "sub", type=tarfile.DIRTYPE)
        _add(tar, "good.JPEG", b"again")
    with tarfile.open(path, "w") as tar:
        _add(tar, "n1.tar", inner.getvalue())
        _add(tar, "n2.tar", _tar({"a.JPEG": b"a"})[:512])
        _add(tar, "n3.tar", _tar({"a.JPEG": b"a", "b.JPEG": b"b" * 2000})[: 1024 + 512 + 700])
        _add(tar, "n4.tar", _tar({"a.JPEG": b"a"})[:1024])
        _add(tar, "n5.tar", _tar({"a.JPEG": b"a"}))
        _add(tar, "loose.txt", b"x")
    with pytest.raises(DataError, match=r"class n2 of .* has no images"):
        open_source(path, "train")
    source = open_source(path, "val")
    assert [image.name for image in source.images] == [
        *("n1/good.JPEG", "n3/a.JPEG", "n4/a.JPEG", "n5/a.JPEG")
    ]
    assert _contents(source)["n1/good.JPEG"] == b"good"
    reasons = dict(source.rejected)
    assert "outside" in reasons["n1//etc/absolute.JPEG"] and "outside" in reasons["n1/../../up.JPEG"]
    assert "link" in reasons["n1/soft.JPEG"] and "link" in reasons["n1/hard.JPEG"]
    assert reasons["n1/device.JPEG"] == reasons["n1/fifo.JPEG"] == "not a regular file"
    assert "twice" in reasons["n1/good.JPEG"]
    assert all("truncated" in reasons[f"n{i}.tar"] for i in (2, 3, 4))
    assert reasons["loose.txt"] == "not in a class"
    assert len(reasons) == 11
    assert list(tmp_path.rglob("*")) == [path.parent, path]


def test_a_sparse_member_is_rejected(tmp_path: Path) -> None:
    content = bytearray(_tar({"a.JPEG": b"a", "b.JPEG": b"b"}))
    content[156:157] = b"S"  # the type of an old GNU sparse file
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path = tmp_path / "val.tar"
    path.write_bytes(content)
    labels = tmp_path / "labels.txt"
    labels.write_text("a.JPEG x\nb.JPEG y\n")
    source = open_source(path, "val", labels=labels)
    assert source.rejected == [("a.JPEG", "a sparse file in a tar")]
    assert [image.name for image in source.images] == ["b.JPEG"]


def test_every_cut_of_a_tar_is_noticed(official: Path, tmp_path: Path) -> None:
    content = (official / "ILSVRC2012_img_train.tar").read_bytes()
    end = len(content.rstrip(b"\0"))
    path = tmp_path / "train.tar"
    for length in [0, 100, 512, 700, *range(1024, end, 3571), end]:
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"truncated|neither") as caught:
            open_source(path, "train")
        assert "\n" not in caught.value.message


def test_errors_in_one_line(official: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_splits(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no images"):
        open_source(tmp_path, "train")
    _folders(tmp_path / "s", {"train/a/x.JPEG": b"", "train/b/x.JPEG": b""})
    with pytest.raises(DataError, match="no val split, only train"):
        find_splits(tmp_path / "s", "val")
    flat = _folders(tmp_path / "flat", {"x.JPEG": b""})
    with pytest.raises(DataError, match="--labels FILE or --devkit"):
        open_source(flat, "val")
    kit = official / "ILSVRC2012_devkit_t12.tar.gz"
    with pytest.raises(DataError, match=r"no images named like ILSVRC2012_val_.* give --labels"):
        open_source(flat, "val", devkit=kit)
    broken = tmp_path / "kit.tar.gz"
    broken.write_bytes(kit.read_bytes()[:200])
    with pytest.raises(DataError, match="devkit"):
        open_source(flat, "val", devkit=broken)
    text = tmp_path / "text.tar"
    text.write_text("this is no tar" * 99)
    with pytest.raises(DataError, match="neither a folder nor an uncompressed tar"):
        open_source(text, "train")
