"""The folders of a build that is not finished: OUT/<split>.partial, its lock, and what may be deleted."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from base.errors import DataError
from base.files import read_regular, write_atomic
from pipeline.shards import MANIFEST, Manifest, foreign


def claim(
    final: Path, partial: Path, fingerprint: str, stamp: Callable[[], str], resume: bool, overwrite: bool
) -> tuple[int, str]:
    """Make or take over `partial`; returns the descriptor of its lock and the token of the build.

    `stamp` looks at every image: it is called after the refusals only.
    Jobs of a cluster can outlive the build that sent them, and its directory: they know files of other names.
    """
    refuse_taken(final, resume, overwrite)
    started = started_of(partial)
    work = started.parent
    if partial.exists():
        lock = lock_folder(partial)
        if overwrite:
            _remove_tree(partial)
            os.close(lock)
        else:
            try:
                known = _checked(json.loads(read_regular(started, 1 << 20)))
            except (FileNotFoundError, ValueError, RecursionError):
                known = {"fingerprint": None, "overwrite": True}
                if (partial / MANIFEST).exists():
                    known["fingerprint"] = Manifest.load(partial).fingerprint
                elif not any(partial.glob("shard-*")):
                    known["fingerprint"] = fingerprint  # killed before it had begun
            if known["fingerprint"] != fingerprint:
                os.close(lock)
                raise DataError(
                    f"{partial} was begun from other images or with other options: "
                    "repeat those, or start afresh with --overwrite"
                )
            if "stamp" in known and known["stamp"] != stamp():
                os.close(lock)
                raise DataError(
                    f"images have changed since {partial} was begun: start afresh with --overwrite"
                )
            if final.exists() and not known["overwrite"]:
                os.close(lock)
                raise DataError(f"{final} already exists beside {partial}: replace both with --overwrite")
            work.mkdir(exist_ok=True)
            for place in work.glob("*.at"):
                place.unlink()  # jobs that a killed build left on a cluster stop when they miss it
            if "token" not in known:
                known.update(fingerprint=fingerprint, stamp=stamp(), token=uuid.uuid4().hex)
                write_atomic(started, json.dumps(known).encode())
            return lock, known["token"]
    token = uuid.uuid4().hex
    content = {"fingerprint": fingerprint, "stamp": stamp(), "overwrite": overwrite, "token": token}
    partial.mkdir(parents=True)
    lock = lock_folder(partial)
    work.mkdir()
    write_atomic(started, json.dumps(content).encode())
    return lock, token


def _checked(known: Any) -> dict[str, Any]:
    """What build.json says; ValueError unless it is as `claim` writes it: the token becomes part of file names."""
    if (
        not isinstance(known, dict)
        or not isinstance(known.get("overwrite"), bool)
        or not isinstance(known.get("fingerprint"), str)
        or ("token" in known and not re.fullmatch(r"[0-9a-f]{32}", str(known["token"])))
    ):
        raise ValueError("not written by this program")
    return known


def refuse_taken(final: Path, resume: bool, overwrite: bool) -> None:
    """DataError where OUT/<split> is not to be built: it is there, or begun, or what no build has made is.

    Names of files tell that, so that it can be known before a million images are listed.
    """
    try:
        _refuse_taken(final_of(final.parent, final.name), resume, overwrite)
    except OSError as error:
        raise disk_error(error, final.parent) from None


def _refuse_taken(final: Path, resume: bool, overwrite: bool) -> None:
    partial = partial_of(final)
    ours = started_of(partial).exists() and not overwrite  # it is resumed, and nothing in it is deleted
    for directory in (final, replaced_of(final), *([] if ours else [partial])):
        refuse_foreign(directory)
    if not (resume or overwrite):
        if partial.exists():
            os.close(lock_folder(partial))  # another build that is at work is no unfinished one
            raise DataError(
                f"{partial} is an unfinished build: continue it with --resume, or use --overwrite"
            )
        if final.exists():
            raise DataError(f"{final} already exists: replace it with --overwrite, or name another OUT")


def final_of(out: Path, split: str) -> Path:
    """OUT/<split>; where that is a link to another disk, the folder there, so that all renames stay on one disk."""
    final = out / split
    return final.resolve() if final.is_symlink() else final


def partial_of(final: Path) -> Path:
    return final.with_name(f"{final.name}.partial")


def started_of(partial: Path) -> Path:
    return partial / "work" / "build.json"


def refuse_foreign(directory: Path) -> None:
    """DataError instead of deleting what no build has made."""
    if other := foreign(directory):
        raise DataError(f"{directory} {other}, which no build made: move it away, or name another OUT")


def _remove_tree(directory: Path) -> None:
    """rmtree, also while a job that is about to stop still makes or renames something in there."""
    for _ in range(20):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)
    shutil.rmtree(directory)


def lock_folder(directory: Path, name: str = "", wait: bool = False) -> int:
    """Keep others out of `directory`, or of the file `name` in it, until the descriptor is closed or a kill."""
    flags = os.O_RDWR | os.O_CREAT if name else os.O_RDONLY
    descriptor = os.open(directory / name, flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"another build is at work in {directory}: wait for it, or stop it") from None
    except OSError:
        pass  # a file system without locks: better to build than to refuse
    return descriptor


def remove_unfinished(partial: Path, all_of_it: bool = False) -> None:
    """What stopped workers were writing: useless, and on a full disk in the way.

    Where a worker of a cluster may be at it still, that worker or --resume removes it, unless `all_of_it` is to go.
    """
    for path in [*partial.glob("*.tmp"), *partial.glob("work/*.tmp")]:
        lock = None
        try:
            if not all_of_it and path.name.startswith("shard-"):
                lock = lock_folder(partial / "work", f"{path.name.partition('.')[0]}.lock")
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except (DataError, OSError):  # at work there, or the disk is read-only
            continue
        finally:
            if lock is not None:
                os.close(lock)


def disk_error(error: OSError, out: Path) -> DataError:
    if error.errno == errno.ENOSPC or error.errno == errno.EDQUOT:
        return DataError(f"the disk of {out} is full: make room, then continue with --resume")
    if error.errno == errno.EROFS or error.errno == errno.EACCES:
        return DataError(f"cannot write to {error.filename or out}: {error.strerror}; name another OUT")
    return DataError(
        f"{error.filename or out}: {error.strerror or error}; continue with --resume when that is solved"
    )


def replaced_of(final: Path) -> Path:
    """Where --overwrite puts the old data set for the moment between two renames."""
    return final.with_name(final.name + ".replaced")


def remove_replaced(final: Path) -> None:
    if replaced_of(final).exists():
        refuse_foreign(replaced_of(final))
        shutil.rmtree(replaced_of(final))
