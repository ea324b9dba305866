"""The class of each image: from folders, file names, lists and the ILSVRC development kit.

A label is the position of the class's WordNet id (wnid) in sorted order, for every kind of source. The devkit
numbers the classes in another order (its id 1 is n02119789), so its ids are translated. Folders named 0, 1, ..., 10
are sorted by number.
"""

from __future__ import annotations

import gzip
import io
import re
import struct
import sys
import tarfile
import unicodedata
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from base.errors import DataError
from base.files import open_regular, read_regular
from pipeline.build.listing import TAR_ERRORS, Listing, looks_like_image

DEVKIT = "ILSVRC2012_devkit_t12"
MAX_LIST_BYTES = 1 << 30  # of a list of names or labels
MAX_DEVKIT_BYTES = 1 << 26  # uncompressed, for the tar and for meta.mat alone; the real one has 5 million
_DEVKIT_MEMBERS = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})[._]")
_CLASS_IN_NAME = re.compile(r"_(n\d{8})\.[^./]+$|(?:^|/|\d_)(n\d{8})_\d+\.[^./]+$")

Labels = tuple[list[str], list[int]]  # the wnids; the label of each image, in order


def readable(name: str) -> str:
    """The class name for a folder name: composed Unicode (NFC); a name that is not UTF-8 is read as Latin-1."""
    try:
        name.encode()
    except UnicodeEncodeError:
        name = name.encode("utf-8", "surrogateescape").decode("latin-1")
    return unicodedata.normalize("NFC", name)


def in_order(classes: Iterable[str]) -> list[str]:
    """Sort class names; by value if all of them are numbers."""
    names = set(classes)
    if all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def of_classes(classes: Collection[str], where: object, train_wnids: Sequence[str] | None) -> Labels:
    """Labels from the class of each image. The classes are those of the training set, if there is one."""
    names = {name: readable(name) for name in set(classes)}
    used = set(names.values())
    wnids = list(train_wnids) if train_wnids else in_order(used)
    number = {readable(wnid): label for label, wnid in enumerate(wnids)}
    if unknown := sorted(used - number.keys()):
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise DataError(
            f"class {unknown[0]}{more} of {where} is not in the training set: "
            "use the same classes, or build the training set again"
        )
    return wnids, [number[names[name]] for name in classes]


def of_numbers(
    numbers: Iterable[int], where: object, train_wnids: Sequence[str] | None, known: Sequence[str]
) -> Labels:
    """Labels from the number of each image. `known`: the wnids in order, empty if they are not known."""
    labels = list(numbers)
    used = set(labels)
    wnids = list(train_wnids or known)
    if not wnids:
        if used == set(range(1, len(used) + 1)):
            raise DataError(f"{where} numbers its classes from 1: subtract 1 from each, labels start at 0")
        # The number is the name, padded so that sorting keeps the order.
        width = max(4, len(str(max(used))))
        wnids = [f"{label:0{width}d}" for label in range(max(used) + 1)]
    if bad := [label for label in used if not 0 <= label < len(wnids)]:
        raise DataError(
            f"{where} has label {bad[0]}, but there are only {len(wnids)} classes, numbered from 0"
        )
    return wnids, labels


def from_folders(
    listing: Listing, where: object, train_wnids: Sequence[str] | None, known: Sequence[str]
) -> Labels:
    """Labels from class folders. They may be numbers (ImageNetV2) even if the training classes have names."""
    classes = [sys.intern(file.name.partition("/")[0]) for file in listing.files]
    used = set(classes)
    numbers = all(name.isascii() and name.isdecimal() for name in used)
    if numbers and train_wnids and not used <= set(train_wnids):
        return of_numbers(map(int, classes), where, train_wnids, [])
    if numbers and not train_wnids and len(used) == len(known):
        return of_numbers(map(int, classes), where, None, known)
    return of_classes(classes, where, train_wnids)


def from_names(listing: Listing) -> dict[str, str]:
    """{file name: wnid in it}, for the files that have one."""
    found = {}
    for file in listing.files:
        if match := _CLASS_IN_NAME.search(file.name):
            found[file.name] = match[1] or match[2]
    return found


def from_given(
    listing: Listing, where: object, train_wnids: Sequence[str] | None, known: Sequence[str]
) -> tuple[Labels, dict[str, str]]:
    """Labels that archives contain, as numbers or class names; and {wnid: readable name}, if known."""
    given = [listing.given[file.name] for file in listing.files]
    if not all(label.isdecimal() for label in set(given)):
        return of_classes(given, where, train_wnids), {}
    numbers = [int(label) for label in given]
    wnid_of = from_names(listing)
    pairs = {
        (number, wnid_of.get(file.name, "")) for number, file in zip(numbers, listing.files, strict=True)
    }
    wnids = {wnid for _, wnid in pairs}
    if "" not in wnids and len(pairs) == len({number for number, _ in pairs}) == len(wnids):
        names = {wnid: listing.class_names[n] for n, wnid in pairs if n < len(listing.class_names)}
        if not train_wnids or wnids <= set(train_wnids):
            return of_classes([wnid_of[file.name] for file in listing.files], where, train_wnids), names
    if len(listing.class_names) and not train_wnids and len(known) != len(listing.class_names):
        known = [f"{number:04d}" for number in range(len(listing.class_names))]
        return of_numbers(numbers, where, None, known), dict(zip(known, listing.class_names, strict=True))
    return of_numbers(numbers, where, train_wnids, known), {}


def from_devkit(
    kit: Devkit, listing: Listing, where: object, train_wnids: Sequence[str] | None, notes: list[str]
) -> Labels:
    """Labels of flat validation images: line i of the devkit belongs to ILSVRC2012_val_0000000i.JPEG."""
    truth = kit.ground_truth()
    line_of = {file.name: int(match[1]) for file in listing.files if (match := _VAL_IMAGE.search(file.name))}
    if not line_of:
        raise DataError(
            f"{where} holds no images named like ILSVRC2012_val_00000001.JPEG, which {kit.path} needs: "
            "give --labels FILE"
        )
    listing.leave_out(lambda file: file.name in line_of, "not one of ILSVRC's validation images")
    if max(line_of.values()) > len(truth) or min(line_of.values()) < 1:
        raise DataError(
            f"{where} has image number {max(line_of.values())}, but {kit.path} labels only {len(truth)}"
        )
    if missing := sorted(set(range(1, len(truth) + 1)) - set(line_of.values())):
        names = [f"ILSVRC2012_val_{line:08d}.JPEG" for line in missing]
        notes.append(_note_of_missing(names, len(truth), where, kit.path))
    classes = [kit.wnid_of_id[truth[line_of[file.name] - 1]] for file in listing.files]
    return of_classes(classes, where, train_wnids or sorted(kit.wnid_of_id.values()))


def from_file(
    path: Path,
    listing: Listing,
    root: Path,
    train_wnids: Sequence[str] | None,
    known: Sequence[str],
    notes: list[str] | None = None,
) -> Labels:
    """Labels from lines `filename label`; a label is a wnid or a position in the sorted list of wnids.

    A line without its image is an error, or is reported in `notes` if that is given.
    """
    listed, missing = _matched(path, listing, root)
    if missing and notes is None:
        raise DataError(
            f"{path} lists {missing[0]} ({len(missing)} such files), which does not exist: delete the line, or "
            "add the image"
        )
    if missing and notes is not None:
        notes.append(_note_of_missing(missing, len(listed) + len(missing), root, path))
    # Other files, such as Thumbs.db, have no line; an image without one is a mistake.
    listing.leave_out(
        lambda file: file.name in listed or looks_like_image(file.name), f"no line in {path.name}"
    )
    if unlisted := [file.name for file in listing.files if file.name not in listed]:
        raise DataError(
            f"{path} has no line for {unlisted[0]} ({len(unlisted)} such images): add one for every image"
        )
    # Rejected files with a line count too: a class keeps its place even if none of its images can be used.
    used = set(listed.values())
    numeric = all(label.isascii() and label.isdecimal() for label in used)
    if not numeric or (train_wnids and used <= set(train_wnids)):
        wnids, labels = of_classes(listed.values(), path, train_wnids)
    else:
        numbers = list(map(int, listed.values()))
        # in a list of Caffe's, the folders are the classes
        if not known and all("/" in name for name in listed):
            pairs = sorted(set(zip(numbers, (name.partition("/")[0] for name in listed), strict=True)))
            if [number for number, _ in pairs] == list(range(len({folder for _, folder in pairs}))):
                known = [readable(folder) for _, folder in pairs]
        wnids, labels = of_numbers(numbers, path, train_wnids, known)
    label_of = dict(zip(listed, labels, strict=True))
    return wnids, [label_of[file.name] for file in listing.files]


def _note_of_missing(names: Sequence[str], total: int, where: object, source: Path) -> str:
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{where} lacks {len(names):,} of the {total:,} images that {source} labels: {some}"


def _matched(path: Path, listing: Listing, root: Path) -> tuple[dict[str, str], list[str]]:
    """Return ({image name: label}, names in the list that have no image)."""
    names = set(listing.all_names())
    bases: dict[str, str | None] = {}  # None: images in different folders have that name
    for name in names:
        base = name.rpartition("/")[2]
        bases[base] = None if base in bases else name
    listed: dict[str, str] = {}
    missing: list[str] = []
    for wanted, label in _read_labels(path):
        image = _match(wanted, names, bases)
        if image is None:
            missing.append(wanted)
        elif listed.setdefault(image, label) != label:
            raise DataError(f"{path} gives {wanted} two labels, {listed[image]} and {label}: delete one line")
    return listed, sorted(missing)


def _match(wanted: str, names: set[str], bases: Mapping[str, str | None]) -> str | None:
    """The image for a path in a list. The list's path can have additional leading folders, or no folder at all."""
    if wanted in names:
        return wanted
    parts = [part for part in wanted.split("/") if part not in ("", ".")]
    for start in range(len(parts)):
        if (tail := "/".join(parts[start:])) in names:
            return tail
    return bases.get(wanted) if "/" not in wanted else None


def _read_labels(path: Path) -> list[tuple[str, str]]:
    lines = _read_lines(path)
    if lines and lines[0].startswith("ImageId,PredictionString"):  # Kaggle's LOC_val_solution.csv
        rows = [line.partition(",") for line in lines[1:]]
        return [(f"{image}.JPEG", boxes.split()[0]) for image, _, boxes in rows if boxes.split()]
    listed = []
    for number, line in enumerate(lines, 1):
        columns = line.strip().split("\t")
        if len(columns) == 6:  # Tiny ImageNet's val_annotations.txt: name, class and a box
            listed.append((columns[0], columns[1]))
            continue
        name, _, label = line.strip().replace("\t", " ").rpartition(" ")
        if not name:
            raise DataError(f"{path}, line {number}: expected `filename label`, found {line[:80]!r}")
        listed.append((name.strip(), label))
    return listed


def read_names(path: Path) -> dict[str, str]:
    """{wnid: readable name} from lines `wnid name`; from Tiny ImageNet's words.txt, only the wnids in wnids.txt."""
    split = (line.strip().replace("\t", " ").partition(" ") for line in _read_lines(path))
    names = {wnid: name.strip() for wnid, _, name in split}
    wnids = path.with_name("wnids.txt")
    if path.name == "words.txt" and wnids.is_file():
        return {wnid: names.get(wnid, wnid) for line in _read_lines(wnids) if (wnid := line.strip())}
    return names


def _read_lines(path: Path) -> list[str]:
    try:
        # File names can contain any bytes; os.scandir escapes them in the same way.
        text = read_regular(path, MAX_LIST_BYTES).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return [line for line in text.splitlines() if line.strip()]


class Devkit:
    """The development kit of ILSVRC 2012, tasks 1 and 2: class names and validation labels."""

    def __init__(self, path: Path) -> None:
        """`path` is the tar.gz or the unpacked folder."""
        self.path = path
        self._files = self._load()
        # id -> wnid of the 1,000 classes, which are the leaves of the tree; inner nodes have larger ids.
        self.wnid_of_id: dict[int, str] = {}
        self.names: dict[str, str] = {}
        try:
            import scipy.io  # slow to import, and only needed here

            mat = self._files[_DEVKIT_MEMBERS[0]]
            _check_uncompressed_size(mat)
            synsets = scipy.io.loadmat(io.BytesIO(mat), squeeze_me=True)["synsets"]
            for synset in synsets.reshape(-1):
                if int(synset["num_children"]) == 0:
                    wnid = str(synset["WNID"])
                    self.wnid_of_id[int(synset["ILSVRC2012_ID"])] = wnid
                    self.names[wnid] = str(synset["words"])
        except Exception as error:  # scipy raises many types for a damaged file
            raise DataError(
                f"{path} has an unreadable data/meta.mat ({error}): download the devkit again"
            ) from None

    def ground_truth(self) -> list[int]:
        """The class id of each validation image, in the order of the image numbers."""
        try:
            truth = [int(line) for line in self._files[_DEVKIT_MEMBERS[1]].split()]
        except ValueError as error:
            raise DataError(
                f"{self.path} has a damaged ground truth ({error}): download the devkit again"
            ) from None
        if unknown := set(truth) - self.wnid_of_id.keys():
            raise DataError(
                f"{self.path} labels images with the unknown id {min(unknown)}: download the devkit again"
            )
        return truth

    def _load(self) -> dict[str, bytes]:
        found = {}
        try:
            if self.path.is_dir():
                found = {name: _read_bounded(self.path / name) for name in _DEVKIT_MEMBERS}
            else:
                with tarfile.open(fileobj=_bounded_stream(self.path), mode="r:") as tar:
                    for member in tar:
                        for name in _DEVKIT_MEMBERS:
                            if member.isreg() and f"/{member.name}".endswith(f"/{name}"):
                                file = tar.extractfile(member)
                                assert file is not None
                                found[name] = file.read()
        except (*TAR_ERRORS, OSError, zlib.error) as error:
            raise DataError(f"cannot read the devkit {self.path}: {error}") from None
        for name in _DEVKIT_MEMBERS:
            if name not in found:
                raise DataError(
                    f"{self.path} has no {name}: give {DEVKIT}.tar.gz or the folder it unpacks to"
                )
        return found


def _read_bounded(path: Path) -> bytes:
    with open_regular(path) as file:
        content = file.read(MAX_DEVKIT_BYTES + 1)
    if len(content) > MAX_DEVKIT_BYTES:
        raise ValueError(f"more than {MAX_DEVKIT_BYTES:,} bytes in {path.name}")
    return content


def _bounded_stream(path: Path) -> io.BytesIO:
    """The devkit's tar, decompressed if necessary."""
    with open_regular(path) as file:
        zipped = file.peek(2).startswith(b"\x1f\x8b")
        with gzip.open(file) if zipped else file as stream:
            content = stream.read(MAX_DEVKIT_BYTES + 1)
    if len(content) > MAX_DEVKIT_BYTES:
        raise ValueError(f"more than {MAX_DEVKIT_BYTES:,} bytes in it")
    return io.BytesIO(content)


def _check_uncompressed_size(mat: bytes) -> None:
    """Raise ValueError if the compressed elements of a .mat file (version 5) exceed MAX_DEVKIT_BYTES."""
    position, total = 128, 0
    while position + 8 <= len(mat):
        kind, length = struct.unpack_from("<II", mat, position)
        if kind == 15:  # miCOMPRESSED
            unzip = zlib.decompressobj()
            content = unzip.decompress(mat[position + 8 : position + 8 + length], MAX_DEVKIT_BYTES + 1)
            total += len(content)
            if total > MAX_DEVKIT_BYTES:
                raise ValueError(f"more than {MAX_DEVKIT_BYTES:,} bytes in it")
        position += 8 + length
