"""Where raw images come from: class folders, flat folders with a list of labels, the official ILSVRC tars.

Tars are read in place: an index of byte ranges is made once, then any process reads any image with `pread`.
Nothing is ever written under a name found in a tar.
A label is the position of the class's WordNet id (wnid) in sorted order, whatever the source. The devkit
numbers classes otherwise (its id 1 is n02119789): its ids are translated.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from base.errors import DataError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
NAME_FILES = ("LOC_synset_mapping.txt", "synset_words.txt")
# two of them in one folder are splits, whatever else a class may be called
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")
MAX_FILE_BYTES = 1 << 28  # one compressed image; a larger file is no photograph
_DEVKIT_MEMBERS = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
# What tarfile may raise for hostile bytes.
_TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError)

Tick = Callable[[int], object]  # told how many images have been found so far


class RawImage(NamedTuple):
    """One image: `name` is relative to the source; a byte range when the source is a tar."""

    name: str
    label: int
    offset: int = -1
    length: int = -1


@dataclass(frozen=True)
class Source:
    """All images of one split, sorted by name, so that a folder and a tar of it give the same data set."""

    path: Path  # a directory, or a tar
    split: str
    images: list[RawImage]
    wnids: list[str]  # sorted; the label is the position
    names: dict[str, str]  # wnid -> readable name, where known
    rejected: list[tuple[str, str]]  # (name, reason) of what cannot even be tried


class RawReader:
    """Reads the bytes of a source's images; one per process."""

    def __init__(self, path: str | Path) -> None:
        """`path` is `Source.path`."""
        self._path = os.fspath(path)
        self._tar = None if Path(path).is_dir() else os.open(path, os.O_RDONLY)

    def read(self, image: RawImage) -> bytes:
        """The whole file; OSError where it cannot be read, ValueError where it is too large or cut short."""
        if self._tar is not None:
            return self._read_at(self._tar, image.offset, image.length)
        descriptor = os.open(os.path.join(self._path, image.name), os.O_RDONLY)  # noqa: PTH118 - much faster
        try:
            return self._read_at(descriptor, 0, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)

    @staticmethod
    def _read_at(descriptor: int, offset: int, length: int) -> bytes:
        if length > MAX_FILE_BYTES:
            raise ValueError(f"{length:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")
        data = os.pread(descriptor, length, offset)
        if len(data) < length:
            raise ValueError("the file ends too early")
        return data

    def close(self) -> None:
        """Release the tar."""
        if self._tar is not None:
            os.close(self._tar)
            self._tar = None


# --- which splits a SOURCE holds ---------------------------------------------------------------------------


def find_splits(source: Path, split: str | None = None) -> dict[str, Path]:
    """{split: directory or tar} for what the user named, train first; DataError when there is nothing.

    A directory may hold the official tars, or train/ and val/, or be a class folder or flat folder itself
    (then it is "train" unless `split` says otherwise).
    """
    if not source.exists():
        raise DataError(f"{source} does not exist: name a folder of class folders or an ILSVRC2012 tar")
    if not source.is_dir():
        return {split or ("train" if _is_tar_of_tars(source) else "val"): source}
    found = {}
    for name, tar in (("train", TRAIN_TAR), ("val", VAL_TAR)):
        if (source / tar).is_file():
            found[name] = source / tar
        elif (source / name).is_dir():
            found[name] = source / name
    if not found:
        return {split or "train": source}
    if split is None:
        return found
    if split not in found:
        raise DataError(
            f"{source} has no {split} split, only {', '.join(found)}: name its folder or tar itself"
        )
    return {split: found[split]}


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


def not_read(source: Path, splits: dict[str, Path], known: Sequence[Path]) -> list[str]:
    """Names of folders beside the train/ and val/ that `find_splits` found, which may have been meant.

    Not the devkit, nor those on the way to `known` paths.
    """
    read = {path.name for path in splits.values() if path.parent == source and path.is_dir()}
    if not read:
        return []
    read.add(DEVKIT)
    read |= {parent.name for path in known for parent in (path.resolve(), *path.resolve().parents)}
    return [name for name in _folders(source) if name not in read]


def _folders(path: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    try:
        with os.scandir(path) as entries:  # asks nothing of each file, of which there may be many
            return sorted(
                entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
            )
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def open_source(
    path: Path,
    split: str,
    *,
    labels: Path | None = None,
    devkit: Path | None = None,
    names: Path | None = None,
    train_wnids: Sequence[str] | None = None,
    tick: Tick = lambda found: None,
) -> Source:
    """Index the images of one split.

    path: a folder or tar as `find_splits` gives it; labels: a file of `filename label` lines, the label being
    a wnid or a number; devkit: ILSVRC2012_devkit_t12, the tar.gz or the folder; names: a file of `wnid name`
    lines; train_wnids: the classes of the training set that validation labels have to follow.
    The last three are also looked for beside the images. DataError, one line, for whatever does not fit.
    """
    try:
        return _open_source(path, split, labels, devkit, names, train_wnids, tick)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror}") from None


def _open_source(
    path: Path,
    split: str,
    labels: Path | None,
    devkit: Path | None,
    names: Path | None,
    train_wnids: Sequence[str] | None,
    tick: Tick,
) -> Source:
    nearby = [path] * path.is_dir() + [path.parent, path.parent.parent]
    devkit = devkit or _first_existing(nearby, (f"{DEVKIT}.tar.gz", DEVKIT))
    names = names or _first_existing(nearby, NAME_FILES)
    kit = _Devkit(devkit) if devkit else None
    known_names = {**(kit.names if kit else {}), **(_read_names(names) if names else {})}

    listing = _Listing(tick)
    if path.is_dir():
        listing.walk(path, ignore={file.resolve() for file in (labels, devkit, names) if file})
    else:
        listing.index_tar(path)
    listing.files.sort()

    if labels:
        wnids, label_of = _labels_from_file(labels, listing, train_wnids, sorted(known_names))
    elif listing.folders:
        listing.drop_files_outside_folders(path)
        wnids, label_of = _labels_from_folders(listing, path, split, train_wnids)
    elif kit and listing.files:
        wnids, label_of = _labels_from_devkit(kit, listing, path, train_wnids)
    elif listing.files:
        raise DataError(
            f"{path} has no class folders: give the labels with --labels FILE or --devkit {DEVKIT}.tar.gz"
        )
    else:
        raise DataError(f"{path} holds no images: it should hold one folder per class with images in it")
    if not listing.files:
        raise DataError(f"{path} holds no images that can be tried: {listing.rejected[0][1]}")
    images = [file._replace(label=label_of[file.name]) for file in listing.files]
    return Source(path, split, images, list(wnids), known_names, sorted(listing.rejected))


# --- files and tar members ---------------------------------------------------------------------------------


@dataclass
class _Listing:
    """What a source holds, before anything is labelled (label -1)."""

    tick: Tick
    files: list[RawImage] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)  # the first components of names, also of empty folders
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def all_names(self) -> list[str]:
        """Sorted, with the rejected ones: those still have their place in a list of labels."""
        return sorted([file.name for file in self.files] + [name for name, _ in self.rejected])

    def walk(self, root: Path, ignore: set[Path]) -> None:
        """Every file below `root`, but for hidden ones and those in `ignore` (labels, devkit).

        Links to files are followed, as are links in the place of class folders; links to folders further down
        are not: they may lead round in circles.
        """
        pending = [(os.fspath(root), "")]
        while pending:
            directory, prefix = pending.pop()
            with os.scandir(directory) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    if entry.name.startswith("."):
                        continue
                    if not prefix and (entry.name in NAME_FILES or Path(entry.path).resolve() in ignore):
                        continue
                    if entry.is_dir(follow_symlinks=not prefix):
                        pending.append((entry.path, name + "/"))
                        if not prefix:
                            self.folders.add(name)
                    elif entry.is_file() or entry.is_symlink():  # a broken link is reported when it is read
                        self._found(RawImage(name, -1))
                    else:
                        self.rejected.append((name, "not a regular file"))

    def index_tar(self, path: Path) -> None:
        """Byte ranges of all images in a tar of images or in a tar of one tar per class."""
        with _Window(path, 0, path.stat().st_size) as outer:
            for name, offset, length in self._members(outer, ""):
                if name.endswith(".tar"):
                    self.folders.add(name.removesuffix(".tar"))
                    with _Window(path, offset, length) as inner:
                        for inner_name, start, size in self._members(inner, name.removesuffix(".tar") + "/"):
                            self._found(RawImage(inner_name, -1, start, size))
                else:
                    if "/" in name:
                        self.folders.add(name.partition("/")[0])
                    self._found(RawImage(name, -1, offset, length))

    def drop_files_outside_folders(self, path: Path) -> None:
        """In a folder of class folders lie read-me files; in a tar of class tars nothing else should."""
        if not path.is_dir():
            self.rejected += [(file.name, "not in a class") for file in self.files if "/" not in file.name]
        self.files = [file for file in self.files if "/" in file.name]

    def _found(self, image: RawImage) -> None:
        self.files.append(image)
        self.tick(len(self.files))

    def _members(self, window: _Window, prefix: str) -> Iterator[tuple[str, int, int]]:
        """(prefix + name, offset in the file, length) of the tar's regular files; others are rejected.

        An outer tar cut short is a DataError: fetch it again. An inner one loses its last images, with a
        reason in `rejected`.
        """
        seen: set[str] = set()
        try:
            with tarfile.open(fileobj=window, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # or the headers of a million images stay in memory
                    name = prefix + member.name.removeprefix("./")
                    if member.isdir() or os.path.basename(name).startswith("."):  # noqa: PTH119 - no path
                        continue
                    if reason := _why_not(member, name, seen):
                        self.rejected.append((name, reason))
                        continue
                    if member.size < 0 or member.offset_data + member.size > window.length:
                        raise tarfile.ReadError(f"it ends inside {member.name}")
                    seen.add(name)
                    yield name, window.start + member.offset_data, member.size
                # tarfile takes a damaged header for the end: only a block of zeros is one.
                window.seek(tar.offset)
                if window.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it has no end mark")
        except _TAR_ERRORS as error:
            if prefix:
                self.rejected.append(
                    (prefix[:-1] + ".tar", f"damaged or cut short, the rest is lost: {error}")
                )
            elif not seen:
                raise DataError(f"{window.path} is neither a folder nor an uncompressed tar") from None
            else:
                raise DataError(
                    f"{window.path} is damaged or cut short ({error}): fetch it again and compare its MD5"
                ) from None


class _Window(io.RawIOBase):
    """Part of a file as a file of its own: an inner tar inside the outer one."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        super().__init__()
        self.path, self.start, self.length = path, start, length
        self._position = 0
        self._descriptor = os.open(path, os.O_RDONLY)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError("seek before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.length - self._position))
        data = os.pread(self._descriptor, wanted, self.start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _why_not(member: tarfile.TarInfo, name: str, seen: set[str]) -> str | None:
    """Why a tar member is no image to try, None when it is."""
    if member.issym() or member.islnk():
        return "a link in a tar"
    if member.issparse():
        return "a sparse file in a tar"
    if not member.isreg():
        return "not a regular file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads outside the tar"
    if name in seen:
        return "its name occurs twice in the tar"
    return None


def _is_tar_of_tars(path: Path) -> bool:
    """True for a tar whose first regular file is a tar: the official training set."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                if member.isreg():
                    return member.name.endswith(".tar") or "/" in member.name.removeprefix("./")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except _TAR_ERRORS:
        pass
    return False


def _first_existing(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).exists()), None)


# --- labels ------------------------------------------------------------------------------------------------

_Labels = tuple[Sequence[str], dict[str, int]]  # wnids, and the label of every name


def _labels_from_folders(
    listing: _Listing, path: Path, split: str, train_wnids: Sequence[str] | None
) -> _Labels:
    wnids = train_wnids or sorted(listing.folders)
    number = {wnid: label for label, wnid in enumerate(wnids)}
    class_of = {file.name: file.name.partition("/")[0] for file in listing.files}
    used = set(class_of.values())
    if split == "train" and (empty := sorted(listing.folders - used)):
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise DataError(f"class {empty[0]}{more} of {path} has no images: add some or remove its folder")
    _check_known(used, number, path)
    return wnids, {name: number[wnid] for name, wnid in class_of.items()}


def _check_known(used: set[str], number: dict[str, int], path: Path) -> None:
    if unknown := sorted(used - number.keys()):
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise DataError(
            f"class {unknown[0]}{more} of {path} is not in the training set: "
            "use the same classes, or build the training set again"
        )


def _labels_from_devkit(
    kit: _Devkit, listing: _Listing, path: Path, train_wnids: Sequence[str] | None
) -> _Labels:
    names, truth = listing.all_names(), kit.ground_truth()
    # Line i belongs to ILSVRC2012_val_0000000i.JPEG; other names count in sorted order.
    matches = [re.search(r"ILSVRC2012_val_(\d{8})\.", name) for name in names]
    lines = [int(match[1]) for match in matches if match]
    if len(lines) < len(names):
        lines = list(range(1, len(names) + 1))
        if len(names) != len(truth):
            raise DataError(
                f"{path} has {len(names)} images, but {kit.path} labels {len(truth)}: one is incomplete"
            )
    if not all(1 <= line <= len(truth) for line in lines):
        raise DataError(f"{path} has image number {max(lines)}, but {kit.path} labels only {len(truth)}")
    class_of = {name: kit.wnid_of_id[truth[line - 1]] for name, line in zip(names, lines, strict=True)}
    wnids = train_wnids or sorted(kit.wnid_of_id.values())
    number = {wnid: label for label, wnid in enumerate(wnids)}
    _check_known(set(class_of.values()), number, path)
    return wnids, {name: number[wnid] for name, wnid in class_of.items()}


def _labels_from_file(
    path: Path, listing: _Listing, train_wnids: Sequence[str] | None, known: Sequence[str]
) -> _Labels:
    """Labels from lines `filename label`; a label is a wnid or a position in the sorted list of wnids."""
    listed = _read_labels(path)
    names = listing.all_names()
    if missing := sorted(listed.keys() - set(names)):
        raise DataError(f"{path} lists {missing[0]} ({len(missing)} such), which is not among the images")
    if unlisted := [name for name in names if name not in listed]:
        raise DataError(
            f"{path} has no line for {unlisted[0]} ({len(unlisted)} such): every image needs a label"
        )
    used = set(listed.values())
    if train_wnids and used <= set(train_wnids):
        wnids = train_wnids
    elif all(label.isdecimal() for label in used):
        # Classes without a name are called by their number, padded so that sorting keeps the order.
        wnids = train_wnids or known or [f"{label:04d}" for label in range(max(map(int, used)) + 1)]
        if bad := [label for label in used if int(label) >= len(wnids)]:
            raise DataError(f"{path} has label {bad[0]}, but there are only {len(wnids)} classes, from 0")
        return wnids, {name: int(label) for name, label in listed.items()}
    else:
        wnids = train_wnids or sorted(used)
    number = {wnid: label for label, wnid in enumerate(wnids)}
    _check_known(used, number, path)
    return wnids, {name: number[label] for name, label in listed.items()}


def _read_labels(path: Path) -> dict[str, str]:
    lines = _read_lines(path)
    listed = {}
    if lines and lines[0].startswith("ImageId,PredictionString"):  # Kaggle's LOC_val_solution.csv
        lines = [
            f"{image}.JPEG {boxes.split()[0]}" for image, _, boxes in (s.partition(",") for s in lines[1:])
        ]
    for line_number, line in enumerate(lines, 1):
        name, _, label = line.strip().rpartition(" ")
        if not name:
            raise DataError(f"{path}, line {line_number}: expected `filename label`, found {line[:80]!r}")
        listed[name.strip()] = label
    return listed


def _read_names(path: Path) -> dict[str, str]:
    """wnid -> readable name, from lines `wnid name`."""
    split = (line.strip().partition(" ") for line in _read_lines(path))
    return {wnid: name.strip() for wnid, _, name in split}


def _read_lines(path: Path) -> list[str]:
    try:
        # File names may hold any bytes: the same escapes as os.scandir uses.
        text = path.read_text("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return [line.replace("\t", " ") for line in text.splitlines() if line.strip()]


class _Devkit:
    """The development kit of ILSVRC 2012, tasks 1 and 2: class names and the labels of the validation set."""

    def __init__(self, path: Path) -> None:
        """`path` is the tar.gz or the unpacked folder."""
        self.path = path
        self._files = self._load()
        # id -> wnid of the 1,000 classes; the tree's inner nodes have children and larger ids.
        self.wnid_of_id: dict[int, str] = {}
        self.names: dict[str, str] = {}
        try:
            import scipy.io  # takes a moment to import, and only the devkit needs it

            synsets = scipy.io.loadmat(io.BytesIO(self._files[_DEVKIT_MEMBERS[0]]), squeeze_me=True)[
                "synsets"
            ]
            for synset in synsets.reshape(-1):
                if int(synset["num_children"]) == 0:
                    wnid = str(synset["WNID"])
                    self.wnid_of_id[int(synset["ILSVRC2012_ID"])] = wnid
                    self.names[wnid] = str(synset["words"])
        except Exception as error:  # scipy raises nearly anything for a damaged file
            raise DataError(
                f"{path} has an unreadable data/meta.mat ({error}): fetch the devkit again"
            ) from None

    def ground_truth(self) -> list[int]:
        """The class id of every validation image, in order of their numbers."""
        try:
            truth = [int(line) for line in self._files[_DEVKIT_MEMBERS[1]].split()]
        except ValueError as error:
            raise DataError(
                f"{self.path} has a damaged ground truth ({error}): fetch the devkit again"
            ) from None
        if unknown := set(truth) - self.wnid_of_id.keys():
            raise DataError(f"{self.path} labels images with the unknown id {min(unknown)}: fetch it again")
        return truth

    def _load(self) -> dict[str, bytes]:
        found = {}
        try:
            if self.path.is_dir():
                found = {name: (self.path / name).read_bytes() for name in _DEVKIT_MEMBERS}
            else:
                with tarfile.open(self.path) as tar:
                    for member in tar:
                        for name in _DEVKIT_MEMBERS:
                            if member.isreg() and f"/{member.name}".endswith(f"/{name}"):
                                file = tar.extractfile(member)
                                assert file is not None
                                found[name] = file.read()
        except (*_TAR_ERRORS, OSError, zlib.error) as error:
            raise DataError(f"cannot read the devkit {self.path}: {error}") from None
        for name in _DEVKIT_MEMBERS:
            if name not in found:
                raise DataError(
                    f"{self.path} has no {name}: name {DEVKIT}.tar.gz or the folder it unpacks to"
                )
        return found
