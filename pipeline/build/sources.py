"""Sources of raw images: folders, the official tars, and the forms that Kaggle and Hugging Face distribute.

`find_splits` finds the splits in a SOURCE; `open_source` lists and labels the images of one split. docs/data.md has
all supported forms.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from base.errors import DataError
from pipeline.build import labels as labelling
from pipeline.build import parquet
from pipeline.build.labels import DEVKIT, Devkit
from pipeline.build.listing import (
    Listing,
    RawImage,
    Tick,
    is_litter,
    is_tar_of_tars,
    is_webdataset,
    looks_like_image,
)

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
NAME_FILES = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")
KAGGLE = Path("ILSVRC/Data/CLS-LOC")  # relative to the root of Kaggle's download
KAGGLE_LABELS, TINY_LABELS = "LOC_val_solution.csv", "val_annotations.txt"
NAMES_OF_VAL = ("valid", "validation", "test")  # in this order, if there is no val
# A folder that holds two or more of these holds splits, not classes.
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")
_SPLIT_IN_NAME = re.compile(r"(?:^|[-_.])(train|val|test)(?:ing|id|idation)?(?=[-_.]|$)")


@dataclass(frozen=True)
class Source:
    """All images of one split, sorted by name, so that a folder and a tar of it give the same data set."""

    path: Path  # a directory, or a tar
    split: str
    images: list[RawImage]
    wnids: list[str]  # sorted; the label is the position
    names: dict[str, str]  # wnid -> readable name, for the classes that have one
    rejected: list[tuple[str, str]]  # (name, reason) of files that are rejected before decoding
    notes: list[str] = field(default_factory=list)  # messages: which files were used, what was left out


# --- which splits a SOURCE holds ---------------------------------------------------------------------------


def find_splits(source: Path, split: str | None = None, rename: bool = True) -> dict[str, Path]:
    """Return {split: directory or archive}, train first. Raises DataError if `source` cannot be read.

    A directory can hold the official tars, train/ and val/, or parquet files or WebDataset tars of both splits.
    Without val/ and if `rename` is true, one of NAMES_OF_VAL is val if its folders are classes of train. Any other
    directory is one split itself: "train", or `split` if that is given.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist: give a folder of class folders or an ILSVRC2012 tar")
    if not source.is_dir():
        if not source.is_file():
            raise DataError(f"{source} is not a regular file: give a folder of class folders or an archive")
        return {split or _split_of_archive(source): source}
    for steps in range(len(KAGGLE.parts)):
        if (inner := source.joinpath(*KAGGLE.parts[steps:])).is_dir():
            source = inner
            break
    found = {}
    for name, tar in (("train", TRAIN_TAR), ("val", VAL_TAR)):
        if (source / tar).is_file():
            found[name] = source / tar
        elif (source / name).is_dir() and not (split and _is_class(source / name)):
            found[name] = source / name
    if rename and "val" not in found and found.get("train") == source / "train":
        for name in NAMES_OF_VAL:
            # with classes: the test images of a contest have none
            if (
                (source / name).is_dir()
                and (classes := _folders(source / name))
                and set(classes) <= set(_folders(source / "train"))
            ):
                found["val"] = source / name
                break
    if not found:
        for folder in (source, source / "data"):
            if archives := _archives(folder):
                splits = {_split_in(name) for name in archives}
                found = {name: folder for name in ("train", "val") if name in splits}
                if found:
                    break
                return {split or "train": folder}
    if not found:
        return {split or "train": source}
    if split is None:
        return found
    if split not in found:
        raise DataError(
            f"{source} has no {split} split, only {', '.join(found)}: give the split's own folder or tar"
        )
    return {split: found[split]}


def _split_of_archive(path: Path) -> str:
    if path.suffix == ".parquet" or is_webdataset(path):
        return "val" if _split_in(path.name) == "val" else "train"
    return "train" if is_tar_of_tars(path) else "val"


def _split_in(name: str) -> str | None:
    """The split in an archive's name: train, val, test, or None if it has none."""
    match = _SPLIT_IN_NAME.search(Path(name).stem.lower())
    return match[1] if match else None


def _archives(folder: Path, split: str | None = None) -> list[str]:
    """Names of the parquet files in a folder, or else of its WebDataset tars.

    If the names contain splits, only the archives of `split` are returned.
    """
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not is_litter(path.name))
    tars = [name for name in names if name.endswith(".tar")]
    found = [name for name in names if name.endswith(".parquet")]
    if not found and tars and is_webdataset(folder / tars[0]):
        found = tars
    if split and any(_split_in(name) for name in found):
        return [name for name in found if _split_in(name) == split]
    return found


def _is_class(folder: Path) -> bool:
    """Whether a folder called train or val is a class: it and other folders beside it hold images directly."""

    def is_flat(path: Path) -> bool:
        return not _folders(path) and any(looks_like_image(file.name) for file in path.iterdir())

    others = [name for name in _folders(folder.parent) if name.lower() not in SPLIT_NAMES]
    return is_flat(folder) and any(is_flat(folder.parent / name) for name in others)


def refuse_splits_as_classes(source: Path, splits: dict[str, Path]) -> None:
    """Raise DataError if the folders that `find_splits` takes for classes are splits with other names."""
    if list(splits.values()) != [source] or not source.is_dir():
        return
    called = [name for name in _folders(source) if name.lower() in SPLIT_NAMES]
    if len(called) > 1:
        raise DataError(
            f"{source} holds {' and '.join(called)}, which look like splits, not classes: rename them to train and "
            f"val, or build them one by one, for example {source / called[0]} with --split train; if they are "
            "classes, give --split"
        )


def not_read(source: Path, splits: dict[str, Path], known: Sequence[Path]) -> tuple[Path, list[str]]:
    """Return (folder, names of the folders beside those of train and val in it that are not read).

    The devkit and folders that contain one of the `known` paths are not listed.
    """
    folder = next(iter(splits.values())).parent
    own = {"train": ("train",), "val": ("val", *NAMES_OF_VAL)}
    read = {path.name for name, path in splits.items() if path.parent == folder and path.name in own[name]}
    if not read or not folder.is_relative_to(source):
        return folder, []
    read.add(DEVKIT)
    read |= {parent.name for path in known for parent in (path.resolve(), *path.resolve().parents)}
    return folder, [name for name in _folders(folder) if name not in read]


def _folders(path: Path) -> list[str]:
    """Sorted names of the folders in a folder, without hidden ones."""
    try:
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not is_litter(entry.name))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


# --- one split ---------------------------------------------------------------------------------------------


def open_source(
    path: Path,
    split: str,
    *,
    labels: Path | None = None,
    devkit: Path | None = None,
    names: Path | None = None,
    train_wnids: Sequence[str] | None = None,
    exclude: Sequence[Path] = (),
    tick: Tick = lambda found: None,
) -> Source:
    """List and label the images of one split.

    Args:
        path: a folder or archive that `find_splits` returned.
        labels: a file of lines `filename label`; a label is a wnid or a number.
        devkit: ILSVRC2012_devkit_t12, either the tar.gz or the folder.
        names: a file of lines `wnid name`.
        train_wnids: the classes of the training set, which define the labels of validation images.
        exclude: paths inside the source that do not belong to it.
        tick: called with the number of images found so far.

    Devkit, names and Kaggle's labels are also looked for beside the images. Raises DataError with a one-line
    message if the images cannot be listed and labelled.
    """
    try:
        return _open_source(path, split, labels, devkit, names, train_wnids, exclude, tick)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror or error}") from None


def _open_source(
    path: Path,
    split: str,
    labels: Path | None,
    devkit: Path | None,
    names: Path | None,
    train_wnids: Sequence[str] | None,
    exclude: Sequence[Path],
    tick: Tick,
) -> Source:
    notes: list[str] = []
    nearby = [path] * path.is_dir() + [path.parent]
    if path.parent.parts[-len(KAGGLE.parts) :] == KAGGLE.parts:
        nearby.append(path.parents[len(KAGGLE.parts)])
    beside = _first_existing(nearby, (KAGGLE_LABELS,)) if split == "val" else None
    beside = _first_existing([path], (TINY_LABELS,)) or beside
    devkit = devkit or _first_existing(nearby, (f"{DEVKIT}.tar.gz", DEVKIT))
    if not names and (names := _first_existing(nearby, NAME_FILES)):
        notes.append(f"names of the classes: {names}")
    kit = Devkit(devkit) if devkit else None
    known_names = {**(kit.names if kit else {}), **(labelling.read_names(names) if names else {})}
    known = sorted(known_names)

    listing = Listing(tick)
    root, archives = path, _archives(path, split) if path.is_dir() else []
    if not path.is_dir() and (path.suffix == ".parquet" or is_webdataset(path)):
        root, archives = path.parent, [path.name]
    if archives and archives[0].endswith(".parquet"):
        parquet.index(listing, root, archives)
    elif archives:
        listing.index_webdataset(root, archives)
    elif path.is_dir():
        own = [path / name for name in (*NAME_FILES, KAGGLE_LABELS, TINY_LABELS, "wnids.txt")]
        listing.walk(path, [*(file for file in (labels, devkit, names) if file), *own, *exclude])
    else:
        listing.index_tar(path)
    listing.files.sort()

    if labels:
        wnids, numbers = labelling.from_file(labels, listing, path, train_wnids, known)
    elif archives:
        (wnids, numbers), own_names = labelling.from_given(listing, path, train_wnids, known)
        known_names = {**own_names, **known_names}
    elif beside and (beside.name == TINY_LABELS or not listing.folders):
        notes.append(f"labels: {beside}")
        wnids, numbers = labelling.from_file(beside, listing, path, train_wnids, known, notes)
    elif listing.folders:  # images in folders: those are the classes
        _prepare_class_folders(listing, path, split, notes)
        wnids, numbers = labelling.from_folders(listing, path, train_wnids, known)
    elif class_of := labelling.from_names(listing):
        listing.leave_out(lambda file: file.name in class_of, "no class in its name")
        classes = [class_of[file.name] for file in listing.files]
        wnids, numbers = labelling.of_classes(classes, path, train_wnids)
    elif kit and listing.files:
        wnids, numbers = labelling.from_devkit(kit, listing, path, train_wnids, notes)
    elif listing.files:
        raise DataError(
            f"{path} has no class folders: give the labels with --labels FILE or --devkit {DEVKIT}.tar.gz"
        )
    else:
        raise DataError(f"{path} holds no images: give a folder that has one folder of images per class")
    if not listing.files:
        why = f" that can be used ({listing.rejected[0][1]})" if listing.rejected else ""
        raise DataError(f"{path} holds no images{why}: give a folder of class folders")
    images = listing.files
    for index, number in enumerate(numbers):  # in place: a second list would double the memory
        images[index] = images[index]._replace(label=number)
    return Source(root, split, images, wnids, known_names, sorted(listing.rejected), notes)


def _first_existing(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).exists()), None)


def _prepare_class_folders(listing: Listing, path: Path, split: str, notes: list[str]) -> None:
    """Leave out what is not in a class, and raise DataError if `path` does not hold the class folders itself."""
    if path.is_dir():
        if empty := listing.leave_out_folders_without_images(path):
            some = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            notes.append(f"folders without images in {path} are left out: {some}")
        if not listing.folders:
            raise DataError(f"{path} holds no images: give a folder that has one folder of images per class")
    listing.leave_out(lambda file: "/" in file.name, "not in a class")
    _refuse_wrong_level(listing, path)
    used = {file.name.partition("/")[0] for file in listing.files}
    if split == "train" and (missing := sorted(listing.folders - used)):  # such as a damaged tar of a class
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"class {missing[0]}{more} of {path} has no images: add some or remove its folder")


def _refuse_wrong_level(listing: Listing, path: Path) -> None:
    """Raise DataError if the class folders are deeper in the tree, such as in train/ and val/."""
    below: dict[str, set[str]] = defaultdict(set)  # folder -> the folders in it; "" is the source
    flat = set()  # folders with files of their own
    for file in listing.files:
        parts = file.name.split("/")[:-1]
        flat.add("/".join(parts))
        for depth in range(min(len(parts), 6)):
            below["/".join(parts[:depth])].add(parts[depth])
    where, found = "", None
    while len(below[where]) == 1 and where not in flat:
        where = "/".join(filter(None, (where, next(iter(below[where])))))
        if len(below[where]) > 1:
            found = where
    for folder in ("", *below[""]) if found is None else ():
        if len({name for name in below[folder] if name.lower() in SPLIT_NAMES}) > 1 and (
            folder or not path.is_dir()
        ):
            found = folder
    if found is None:
        return
    inner = ", ".join(sorted(below[found])[:3]) + (", ..." if len(below[found]) > 3 else "")
    if path.is_dir():
        raise DataError(
            f"{path} does not hold the class folders itself: give {path / found} instead, which holds {inner}"
        )
    raise DataError(
        f"{path} holds {inner} in {found or 'its top folder'}: unpack it, then give the folder of the classes"
    )


# --- validation images from the training images --------------------------------------------------------------


def split_source(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Split a source into (train, val): `fraction` of each class is for validation, at least one image, never all.

    A hash of the seed and the file name chooses the images, so the choice is stable when other images are added.
    """
    of_label: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for index, image in enumerate(source.images):
        digest = hashlib.sha256(f"{seed}/{image.name}".encode("utf-8", "surrogateescape")).digest()
        of_label[image.label].append((digest, index))
    chosen: set[int] = set()
    for label, images in of_label.items():
        if len(images) < 2:
            raise DataError(
                f"class {source.wnids[label]} of {source.path} has one image: --val-fraction needs two per class"
            )
        count = min(max(1, round(fraction * len(images))), len(images) - 1)
        chosen.update(index for _, index in sorted(images)[:count])
    train = [image for index, image in enumerate(source.images) if index not in chosen]
    val = [image for index, image in enumerate(source.images) if index in chosen]
    return (
        replace(source, split="train", images=train),
        replace(source, split="val", images=val, rejected=[], notes=[]),
    )


def missing_classes(source: Source, rejected: Iterable[str] = ()) -> list[str]:
    """Classes that have no image in this split, not counting the images named in `rejected`."""
    gone = set(rejected)
    used = {image.label for image in source.images if image.name not in gone}
    return [wnid for label, wnid in enumerate(source.wnids) if label not in used]
