"""The folder of an unfinished build, OUT/<split>.partial: its lock, and which files can be deleted."""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from base.errors import DataError, UserError
from base.files import lock, read_regular, write_atomic
from pipeline.shards import MANIFEST, Manifest, find_foreign_entry, shard_name


@contextmanager
def claim(
    final: Path, partial: Path, fingerprint: str, stamp: Callable[[], str], resume: bool, overwrite: bool
) -> Iterator[str]:
    """Create or take over `partial`, and lock it; yields the token of the build.

    `stamp` looks at every image, so it is called only when nothing else refuses the build. The token is part of
    the names of the files that jobs write. Jobs on a cluster can outlive their build and even its folder; a later
    build has another token.
    """
    refuse_taken(final, resume, overwrite)
    if overwrite and partial.exists():
        with _lock(partial):
            _remove_tree(partial)
    existed = partial.exists()
    partial.mkdir(parents=True, exist_ok=True)
    with _lock(partial):
        if existed:
            yield _take_over(final, partial, fingerprint, stamp)
            return
        token = uuid.uuid4().hex
        content = {"fingerprint": fingerprint, "stamp": stamp(), "overwrite": overwrite, "token": token}
        started_of(partial).parent.mkdir()
        write_atomic(started_of(partial), json.dumps(content).encode())
        yield token


def _lock(partial: Path) -> AbstractContextManager[int]:
    return lock(partial, f"another build is running in {partial}: wait for it, or stop it")


def _take_over(final: Path, partial: Path, fingerprint: str, stamp: Callable[[], str]) -> str:
    """The token of the unfinished build in `partial`; DataError if it cannot be resumed."""
    started = started_of(partial)
    try:
        known = _checked(json.loads(read_regular(started, 1 << 20)))
    except (FileNotFoundError, ValueError, RecursionError):
        known = {"fingerprint": None, "overwrite": True}
        if (partial / MANIFEST).exists():
            known["fingerprint"] = Manifest.load(partial).fingerprint
        elif not any(partial.glob("shard-*")):
            known["fingerprint"] = fingerprint  # killed before it wrote anything
    if known["fingerprint"] != fingerprint:
        raise DataError(
            f"{partial} was started from other images or with other options: "
            "repeat those, or start again with --overwrite"
        )
    if "stamp" in known and known["stamp"] != stamp():
        raise DataError(f"images have changed since {partial} was started: start again with --overwrite")
    if final.exists() and not known["overwrite"]:
        raise DataError(f"{final} already exists beside {partial}: replace both with --overwrite")
    started.parent.mkdir(exist_ok=True)
    for place in started.parent.glob("*.at"):
        place.unlink()  # jobs that a killed build left on a cluster stop when this file is gone
    if "token" not in known:
        known.update(fingerprint=fingerprint, stamp=stamp(), token=uuid.uuid4().hex)
        write_atomic(started, json.dumps(known).encode())
    return str(known["token"])


def _checked(known: Any) -> dict[str, Any]:
    """Check the content of build.json, whose token becomes part of file names; ValueError if it is not valid."""
    if (
        not isinstance(known, dict)
        or not isinstance(known.get("overwrite"), bool)
        or not isinstance(known.get("fingerprint"), str)
        or ("token" in known and not re.fullmatch(r"[0-9a-f]{32}", str(known["token"])))
    ):
        raise ValueError("not written by this program")
    return known


def refuse_taken(final: Path, resume: bool, overwrite: bool) -> None:
    """Raise an error if OUT/<split> exists, was started, or holds files that no build made.

    This looks only at file names, so that it can be called before a million images are listed.
    """
    try:
        _refuse_taken(final_of(final.parent, final.name), resume, overwrite)
    except OSError as error:
        raise disk_error(error, final.parent) from None


def _refuse_taken(final: Path, resume: bool, overwrite: bool) -> None:
    partial = partial_of(final)
    ours = started_of(partial).exists() and not overwrite  # a resumed build deletes no other files
    for directory in (final, replaced_of(final), *([] if ours else [partial])):
        refuse_foreign(directory)
    if not (resume or overwrite):
        if partial.exists():
            with _lock(partial):  # another build may be running
                pass
            raise DataError(
                f"{partial} is an unfinished build: continue it with --resume, or replace it with --overwrite"
            )
        if final.exists():
            raise DataError(f"{final} already exists: replace it with --overwrite, or give another OUT")


def final_of(out: Path, split: str) -> Path:
    """OUT/<split>, or its target if that is a link, so that all renames stay on one disk."""
    final = out / split
    return final.resolve() if final.is_symlink() else final


def partial_of(final: Path) -> Path:
    return final.with_name(f"{final.name}.partial")


def started_of(partial: Path) -> Path:
    return partial / "work" / "build.json"


def refuse_foreign(directory: Path) -> None:
    """Raise DataError if `directory` holds anything that no build made, so that it is never deleted."""
    if other := find_foreign_entry(directory):
        raise DataError(f"{directory} {other}, which no build made: move it away, or give another OUT")


def _remove_tree(directory: Path) -> None:
    """Remove a folder in which a job that is about to stop may still create or rename files."""
    for _ in range(20):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)
    shutil.rmtree(directory)


def lock_shard(partial: Path, number: int, wait: bool = False) -> AbstractContextManager[int]:
    """Lock one shard of an unfinished build, so that only one process writes or removes its files."""
    path = partial / "work" / f"{shard_name(number)}.lock"
    path.touch()  # on a full disk this is an OSError like any other
    return lock(path, f"{path} is locked", wait)


def remove_unfinished(partial: Path, everything: bool = False) -> None:
    """Remove what stopped workers were writing: it is useless, and takes room on a full disk.

    Shards that a worker of a cluster may still be writing are left to that worker or to --resume, unless
    `everything` is true.
    """
    for path in [*partial.glob("*.tmp"), *partial.glob("work/*.tmp")]:
        number = re.match(r"shard-(\d+)\.", path.name)
        # skip a shard that is being written, and everything on a read-only disk
        with suppress(UserError, OSError), ExitStack() as stack:
            if number and not everything:
                stack.enter_context(lock_shard(partial, int(number[1])))
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def disk_error(error: OSError, out: Path) -> DataError:
    """The one-line error for a failed write."""
    if error.errno == errno.ENOSPC or error.errno == errno.EDQUOT:
        return DataError(f"the disk of {out} is full: free some space, then continue with --resume")
    if error.errno == errno.EROFS or error.errno == errno.EACCES:
        return DataError(f"cannot write to {error.filename or out}: {error.strerror}; give another OUT")
    return DataError(
        f"{error.filename or out}: {error.strerror or error}; continue with --resume when it is fixed"
    )


def replaced_of(final: Path) -> Path:
    """Where --overwrite keeps the old data set between two renames."""
    return final.with_name(final.name + ".replaced")


def remove_replaced(final: Path) -> None:
    if replaced_of(final).exists():
        refuse_foreign(replaced_of(final))
        shutil.rmtree(replaced_of(final))
