"""Files that survive a crash, locks between processes, and safe reading of untrusted files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, BinaryIO

from base.errors import UserError

_TEMPORARY = r"\.[0-9a-f]{16}\.tmp"  # the suffix that `temporary_path` adds


# --- reading -----------------------------------------------------------------------------------------------


def open_regular(path: Path, limit: int | None = None) -> BufferedReader:
    """Open a regular file for reading.

    Raises OSError for a pipe, a device or a folder, without waiting for it, and for a file of more than `limit`
    bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and (limit is None or status.st_size <= limit):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    raise OSError(errno.EFBIG, f"larger than {limit or 0:,} bytes", str(path))


def read_regular(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; see `open_regular`."""
    with open_regular(path, limit) as file:
        return file.read()


def check_stored(content: bytes) -> None:
    """Raise ValueError if a zip file is compressed or its members overlap, so that it could unpack to any size."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
        sum(member.file_size for member in members) > len(content)
    ):
        raise ValueError("it is compressed")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- writing -----------------------------------------------------------------------------------------------


def fsync_directory(path: Path) -> None:
    """Flush new names and renames in `path` to the disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create `path` and its missing parents, and flush them to the disk. `path` may exist."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        fsync_directory(folder.parent)


def temporary_path(path: Path) -> Path:
    """A new, unpredictable name beside `path`, where nobody can have placed a link."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def atomic_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `path` when the block ends, after a flush to the disk.

    After a crash or an error in the block, `path` is still the old file. The umask applies to `mode`.
    """
    temporary = temporary_path(path)
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_atomic(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write `content` to `path`; readers see either the old file or the complete new one."""
    with atomic_file(path, mode) as file:
        file.write(content)


def remove_temporary(folder: Path, names: str) -> None:
    """Remove temporary files left by killed processes, if the names match the regular expression `names`."""
    for path in folder.iterdir():
        if re.fullmatch(f"({names}){_TEMPORARY}", path.name) and stat.S_ISREG(path.lstat().st_mode):
            path.unlink(missing_ok=True)


# --- locks -------------------------------------------------------------------------------------------------


@contextmanager
def lock(path: Path, taken: str, wait: bool = False) -> Iterator[int]:
    """Lock a folder, or a file, which is created if it is missing; yields the open descriptor.

    If another process holds the lock, raises UserError with the message `taken`, or waits if `wait` is true. The
    kernel releases the lock when the process ends, however it ends. A child process that inherits the descriptor
    shares the lock. Does nothing on file systems without locks; NFS cannot lock folders.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another folder") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # EACCES: on CIFS
                raise UserError(taken) from None
        yield descriptor
    finally:
        os.close(descriptor)


class Inherited:
    """A descriptor for processes that multiprocessing spawns: they keep it and its lock until they end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return _inherit, (DupFd(self._descriptor),)


def _inherit(copy: Any) -> Inherited:
    return Inherited(copy.detach())
