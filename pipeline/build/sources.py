"""Where raw images come from: folders, the official tars and their copies from Kaggle and Hugging Face.

docs/data.md lists what is read. `find_splits` says which splits a SOURCE holds, `open_source` lists and labels one.
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
KAGGLE = Path("ILSVRC/Data/CLS-LOC")  # below the root of Kaggle's download
KAGGLE_LABELS, TINY_LABELS = "LOC_val_solution.csv", "val_annotations.txt"
# two of them in one folder are splits, whatever else a class may be called
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")
_SPLIT_IN_NAME = re.compile(r"(?:^|[-_.])(train|val|test)(?:ing|id|idation)?(?=[-_.]|$)")


@dataclass(frozen=True)
class Source:
    """All images of one split, sorted by name, so that a folder and a tar of it give the same data set."""

    path: Path  # a directory, or a tar
    split: str
    images: list[RawImage]
    wnids: list[str]  # sorted; the label is the position
    names: dict[str, str]  # wnid -> readable name, where known
    rejected: list[tuple[str, str]]  # (name, reason) of what cannot even be tried
    notes: list[str] = field(
        default_factory=list
    )  # for the user: files that were used, folders that were not


# --- which splits a SOURCE holds ---------------------------------------------------------------------------


def find_splits(source: Path, split: str | None = None) -> dict[str, Path]:
    """{split: directory or archive} for what the user named, train first; DataError when there is nothing.

    A directory may hold the official tars, or train/ and val/, or parquet files or WebDataset tars of both, or be a
    class folder or flat folder itself (then it is "train" unless `split` says otherwise).
    """
    if not source.exists():
        raise DataError(f"{source} does not exist: name a folder of class folders or an ILSVRC2012 tar")
    if not source.is_dir():
        if not source.is_file():
            raise DataError(f"{source} is not a regular file: name a folder of class folders or an archive")
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
            f"{source} has no {split} split, only {', '.join(found)}: name its folder or tar itself"
        )
    return {split: found[split]}


def _split_of_archive(path: Path) -> str:
    if path.suffix == ".parquet" or is_webdataset(path):
        return "val" if _split_in(path.name) == "val" else "train"
    return "train" if is_tar_of_tars(path) else "val"


def _split_in(name: str) -> str | None:
    """train, val, test or None: what an archive's name says."""
    match = _SPLIT_IN_NAME.search(Path(name).stem.lower())
    return match[1] if match else None


def _archives(folder: Path, split: str | None = None) -> list[str]:
    """Names of the parquet files, else of the WebDataset tars in a folder; of one split where names say it."""
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
    """Whether a folder called train or val is one of several class folders: it holds images, and so do others."""

    def is_flat(path: Path) -> bool:
        return not _folders(path) and any(looks_like_image(file.name) for file in path.iterdir())

    others = [name for name in _folders(folder.parent) if name.lower() not in SPLIT_NAMES]
    return is_flat(folder) and any(is_flat(folder.parent / name) for name in others)


def refuse_splits_as_classes(source: Path, splits: dict[str, Path]) -> None:
    """DataError where what `find_splits` takes for class folders are splits by other names."""
    if list(splits.values()) != [source] or not source.is_dir():
        return
    called = [name for name in _folders(source) if name.lower() in SPLIT_NAMES]
    if len(called) > 1:
        raise DataError(
            f"{source} holds {' and '.join(called)}, which are hardly classes: call them train and val, or build "
            f"them one by one, as {source / called[0]} with --split train; if they are classes, say --split as well"
        )


def not_read(source: Path, splits: dict[str, Path], known: Sequence[Path]) -> tuple[Path, list[str]]:
    """(folder, names of folders beside the train/ and val/ in it, which may have been meant).

    Not the devkit, nor those on the way to `known` paths.
    """
    folder = next(iter(splits.values())).parent
    read = {path.name for name, path in splits.items() if path.parent == folder and path.name == name}
    if not read or not folder.is_relative_to(source):
        return folder, []
    read.add(DEVKIT)
    read |= {parent.name for path in known for parent in (path.resolve(), *path.resolve().parents)}
    return folder, [name for name in _folders(folder) if name not in read]


def _folders(path: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
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

    path: a folder or tar as `find_splits` gives it; labels: a file of `filename label` lines, the label being
    a wnid or a number; devkit: ILSVRC2012_devkit_t12, the tar.gz or the folder; names: a file of `wnid name`
    lines; train_wnids: the classes of the training set that validation labels have to follow; exclude: what is
    not a part of the source though it lies in it.
    Labels, devkit and names are also looked for beside the images. DataError, one line, for whatever does not fit.
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
    elif beside and (beside.name == TINY_LABELS or not _class_folders(listing)):
        notes.append(f"labels: {beside}")
        wnids, numbers = labelling.from_file(beside, listing, path, train_wnids, known, notes)
    elif _class_folders(listing):
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
        raise DataError(f"{path} holds no images: it should hold one folder per class with images in it")
    if not listing.files:
        why = f" that can be tried: {listing.rejected[0][1]}" if listing.rejected else ""
        raise DataError(f"{path} holds no images{why}; name a folder of class folders")
    images = listing.files
    for index, number in enumerate(numbers):  # in place: a second list would double the memory
        images[index] = images[index]._replace(label=number)
    return Source(root, split, images, wnids, known_names, sorted(listing.rejected), notes)


def _first_existing(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).exists()), None)


def _class_folders(listing: Listing) -> bool:
    """Whether images lie in folders: then those are the classes, and what lies beside them is not an image."""
    return bool(listing.folders)


def _prepare_class_folders(listing: Listing, path: Path, split: str, notes: list[str]) -> None:
    """Leave out what is no class, and refuse a folder that is not the one of the class folders."""
    if path.is_dir():
        if empty := listing.leave_out_folders_without_images(path):
            some = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            notes.append(f"left out, for they hold no images: {some} in {path}")
        if not listing.folders:
            raise DataError(f"{path} holds no images: it should hold one folder per class with images in it")
    listing.leave_out(lambda file: "/" in file.name, "not in a class")
    _refuse_wrong_level(listing, path)
    used = {file.name.partition("/")[0] for file in listing.files}
    if split == "train" and (missing := sorted(listing.folders - used)):  # damaged tars of classes
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"class {missing[0]}{more} of {path} has no images: add some or remove its folder")


def _refuse_wrong_level(listing: Listing, path: Path) -> None:
    """DataError where the class folders lie further down, as below train/ and val/."""
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
            f"{path} has its classes further down: name {path / found} instead, which holds {inner}"
        )
    raise DataError(
        f"{path} holds {inner} in {found or 'it'}: unpack it, then name the folder with the classes"
    )


# --- validation images from the training images --------------------------------------------------------------


def split_source(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """(train, val): of each class so large a part of the images for validation, at least one and never all.

    A hash of the seed and the name decides: the same images for the same seed, whatever else is added.
    """
    of_label: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for index, image in enumerate(source.images):
        digest = hashlib.sha256(f"{seed}/{image.name}".encode("utf-8", "surrogateescape")).digest()
        of_label[image.label].append((digest, index))
    chosen: set[int] = set()
    for label, images in of_label.items():
        if len(images) < 2:
            raise DataError(
                f"class {source.wnids[label]} of {source.path} has one image: --val-fraction needs two a class"
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
    """Classes without an image in this split, apart from the images called `rejected`."""
    gone = set(rejected)
    used = {image.label for image in source.images if image.name not in gone}
    return [wnid for label, wnid in enumerate(source.wnids) if label not in used]
