"""Lists the images of a source, before they are labelled: files in folders, members of tars, rows of parquet files.

Tars are not unpacked: they are indexed once, and then any process reads any image as a byte range. A name from a
tar is never used to write a file.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from base.errors import DataError
from pipeline.build.headers import MAX_FILE_BYTES, is_image
from pipeline.build.parquet import ParquetReader

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp")
# Files and folders that operating systems create; hidden files are left out as well.
LITTER = ("@eadir", "__macosx", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin")
MAX_HEADER_BYTES = 1 << 20  # of a tar member's header (a long name, for example), which can claim any length
MAX_LABEL_BYTES = 256  # of a .cls file in a WebDataset tar
TRIED_FOR_IMAGES = 20  # files per folder without an image suffix whose first bytes are checked
# What tarfile can raise for damaged or hostile files.
TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, MemoryError)

Tick = Callable[[int], object]  # called with the number of images found so far


class RawImage(NamedTuple):
    """One image: `name` is relative to the source.

    In a tar, `offset` and `length` are the image's byte range. In a parquet file they are the row within the row
    group and the number of the row group. `file` names the tar or parquet file if the source is a folder of them.
    """

    name: str
    label: int
    offset: int = -1
    length: int = -1
    file: str = ""


class RawReader:
    """Reads the image files of a source. Each process needs its own."""

    def __init__(self, path: str | Path) -> None:
        """`path` is `Source.path`."""
        self._path = os.fspath(path)
        self._tar = None if Path(path).is_dir() else os.open(path, os.O_RDONLY)
        self._rows = ParquetReader(Path(path))

    def read(self, image: RawImage) -> bytes:
        """Return the whole file; OSError if it cannot be read, ValueError if it is too large or truncated."""
        if image.file.endswith(".parquet"):
            return self._rows.read(image.file, image.length, image.offset)
        if self._tar is not None:
            return self._read_at(self._tar, image.offset, image.length)
        # Without O_NONBLOCK, opening a FIFO would wait for a writer forever.
        where = os.path.join(self._path, image.file or image.name)  # noqa: PTH118 - much faster
        descriptor = os.open(where, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("not a regular file")
            if image.file:
                return self._read_at(descriptor, image.offset, image.length)
            return self._read_at(descriptor, 0, status.st_size)
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
        """Close the open files."""
        self._rows.close()
        if self._tar is not None:
            os.close(self._tar)
            self._tar = None


@dataclass
class Listing:
    """The files of a source, not yet labelled (label -1)."""

    tick: Tick = lambda found: None
    files: list[RawImage] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)  # the first components of names, also of empty folders
    rejected: list[tuple[str, str]] = field(default_factory=list)
    # name -> class, for archives that contain the classes
    given: dict[str, str] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)  # name of each number in `given`, if known

    def all_names(self) -> list[str]:
        """Sorted names of all files, including rejected ones, which a list of labels can contain as well."""
        return sorted([file.name for file in self.files] + [name for name, _ in self.rejected])

    def walk(self, root: Path, ignore: Iterable[Path] = ()) -> None:
        """List every file below `root` except hidden files, LITTER, and `ignore` (labels, devkit, OUT).

        Links to files and links to class folders are followed. Deeper links to folders are not: they could form a
        cycle.
        """
        ignored = _relative(root, ignore)
        pending = [(os.fspath(root), "")]
        while pending:
            directory, prefix = pending.pop()
            with os.scandir(directory) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    if is_litter(entry.name) or name in ignored:
                        continue
                    if entry.is_dir(follow_symlinks=not prefix):
                        pending.append((entry.path, name + "/"))
                        if not prefix:
                            self.folders.add(name)
                    elif entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists()):
                        self.add(RawImage(name, -1))  # reading a broken link fails later, with its reason
                    elif entry.is_symlink() and entry.is_dir():
                        self.rejected.append((name, "a link to a folder below a class folder"))
                    else:
                        self.rejected.append((name, "not a regular file"))
        # A folder that holds only OUT may or may not exist yet: never count it as a class.
        used = {file.name.partition("/")[0] for file in self.files}
        self.folders -= {name.partition("/")[0] for name in ignored if "/" in name} - used

    def index_tar(self, path: Path) -> None:
        """List the images of a tar, or of a tar that holds one tar per class, with their byte ranges."""
        with _Window(path, 0, path.stat().st_size) as outer:
            for name, offset, length in self._members(outer, ""):
                if name.endswith(".tar"):
                    self.folders.add(name.removesuffix(".tar"))
                    with _Window(path, offset, length) as inner:
                        for inner_name, start, size in self._members(inner, name.removesuffix(".tar") + "/"):
                            self.add(RawImage(inner_name, -1, start, size))
                else:
                    if "/" in name:
                        self.folders.add(name.partition("/")[0])
                    self.add(RawImage(name, -1, offset, length))

    def index_webdataset(self, root: Path, names: list[str]) -> None:
        """List the images of tars that hold pairs `key.jpg` and `key.cls`; the latter contains the class."""
        for tar in names:
            images: dict[str, RawImage] = {}
            classes: dict[str, str] = {}
            with _Window(root / tar, 0, (root / tar).stat().st_size) as window:
                for name, offset, length in self._members(window, ""):
                    folder, _, base = name.rpartition("/")
                    key, _, kind = base.partition(".")
                    key = f"{folder}/{key}"
                    if kind.lower() == "cls":
                        if length > MAX_LABEL_BYTES:
                            self.rejected.append((f"{tar}/{name}", f"a class label of {length:,} bytes"))
                            continue
                        window.seek(offset)
                        classes[key] = window.read(length).decode("utf-8", "surrogateescape").strip()
                    elif looks_like_image(base):
                        if key in images:
                            self.rejected.append((f"{tar}/{name}", "a second image with the same key"))
                            continue
                        images[key] = RawImage(f"{tar}/{name}", -1, offset, length, tar)
            for key, image in images.items():
                if not classes.get(key):
                    self.rejected.append((image.name, "no class (.cls) beside it in the tar"))
                    continue
                self.given[image.name] = classes[key]
                self.add(image)

    def leave_out(self, keep: Callable[[RawImage], bool], reason: str) -> None:
        """Reject the files for which `keep` is false."""
        self.rejected += [(file.name, reason) for file in self.files if not keep(file)]
        self.files = [file for file in self.files if keep(file)]

    def leave_out_folders_without_images(self, root: Path) -> list[str]:
        """Reject the top folders in which no file looks like an image, one entry per folder; return their names."""
        of_folder: dict[str, list[str]] = {folder: [] for folder in self.folders}
        fine = set()
        for file in self.files:
            folder, slash, _ = file.name.partition("/")
            if slash and folder not in fine:
                if file.name.lower().endswith(IMAGE_SUFFIXES):
                    fine.add(folder)
                elif len(of_folder[folder]) < TRIED_FOR_IMAGES:
                    of_folder[folder].append(file.name)
        empty = sorted(
            folder
            for folder, names in of_folder.items()
            if folder not in fine and not any(_starts_like_image(root / name) for name in names)
        )
        self.folders -= set(empty)
        self.rejected += [(f"{folder}/", "a folder without images") for folder in empty]
        if empty:
            gone = set(empty)
            self.files = [f for f in self.files if "/" not in f.name or f.name.partition("/")[0] not in gone]
        return empty

    def add(self, image: RawImage) -> None:
        """Add an image to the list."""
        self.files.append(image)
        self.tick(len(self.files))

    def _members(self, window: _Window, prefix: str) -> Iterator[tuple[str, int, int]]:
        """Yield (prefix + name, offset in the file, length) of the tar's regular files; reject the others.

        A truncated outer tar raises DataError. A truncated inner tar loses its last images and is added to
        `rejected`.
        """
        seen: set[str] = set()
        try:
            with tarfile.open(fileobj=window, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else a million headers stay in memory
                    name = prefix + member.name.removeprefix("./")
                    if member.isdir() or is_litter(name.rpartition("/")[2]):
                        continue
                    if reason := _why_not(member, name, seen):
                        self.rejected.append((name, reason))
                        continue
                    if member.size < 0 or member.offset_data + member.size > window.length:
                        raise tarfile.ReadError(f"it ends inside {member.name}")
                    seen.add(name)
                    yield name, window.start + member.offset_data, member.size
                # tarfile stops silently at a damaged header; only a block of zeros is a real end.
                window.seek(tar.offset)
                if window.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it has no end mark")
        except TAR_ERRORS as error:
            if prefix:
                self.rejected.append(
                    (prefix[:-1] + ".tar", f"damaged or truncated, the rest is lost: {error}")
                )
            elif not seen:
                raise DataError(f"{window.path} is neither a folder nor an uncompressed tar") from None
            else:
                raise DataError(
                    f"{window.path} is damaged or truncated ({error}): download it again and compare its MD5"
                ) from None


class _Window(io.RawIOBase):
    """A byte range of a file as a file object, such as an inner tar inside the outer one."""

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

    def read(self, size: int = -1) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return super().read(size) or b""

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
    """Why a tar member is rejected, or None."""
    if member.issym() or member.islnk():
        return "a link in a tar"
    if member.issparse():
        return "a sparse file in a tar"
    if not member.isreg():
        return "not a regular file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name points outside the tar"
    if name in seen:
        return "its name occurs twice in the tar"
    return None


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or one that operating systems create."""
    return name.startswith(".") or name.lower() in LITTER


def looks_like_image(name: str) -> bool:
    """Whether the name has the suffix of an image format."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _starts_like_image(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return is_image(os.read(descriptor, 16))
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _relative(root: Path, paths: Iterable[Path]) -> set[str]:
    """Those of `paths` that are inside `root`, relative to it."""
    found = set()
    for path in paths:
        for base, target in ((root.absolute(), path.absolute()), (root.resolve(), path.resolve())):
            if target != base and target.is_relative_to(base):
                found.add(str(target.relative_to(base)))
    return found


def is_tar_of_tars(path: Path) -> bool:
    """Whether a tar is like the official training set: its first file is a tar, or is in a folder."""
    return any(name.endswith(".tar") or "/" in name for name in _first_members(path, 1))


def is_webdataset(path: Path) -> bool:
    """Whether one of the first files in a tar is a `.cls` file."""
    return any(name.endswith(".cls") for name in _first_members(path, 10))


def _first_members(path: Path, count: int) -> list[str]:
    """Names of the first regular files of a tar; empty if the file is not a tar."""
    names: list[str] = []
    try:
        with _Window(path, 0, path.stat().st_size) as window, tarfile.open(fileobj=window, mode="r:") as tar:
            while len(names) < count and (member := tar.next()) is not None:
                if member.isreg():
                    names.append(member.name.removeprefix("./"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except TAR_ERRORS:
        pass
    return names
