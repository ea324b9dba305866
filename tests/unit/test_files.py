"""base/files.py: what survives a crash, a planted link, a pipe and a second process."""

import errno
import io
import os
import stat
import subprocess
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pytest

import base.files
from base.errors import UserError
from base.files import (
    atomic_file,
    check_stored,
    file_sha256,
    lock,
    make_directory,
    open_regular,
    read_regular,
    remove_temporary,
    temporary_path,
    write_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_atomic(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half of the ")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and names(tmp_path) == ["config.json"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["config.json"]


def test_links_are_replaced_and_never_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "run"
    folder.mkdir()
    victim.write_bytes(b"precious")
    path = folder / "config.json"
    for name in ("config.json", "config.json.tmp", ".config.json.tmp"):
        (folder / name).symlink_to(victim)
    write_atomic(path, b"ours")
    assert path.read_bytes() == b"ours" and not path.is_symlink() and victim.read_bytes() == b"precious"
    # even a name that was foreseen is refused, and the link that lies there is left alone
    monkeypatch.setattr(base.files.secrets, "token_hex", lambda _: "0" * 16)
    planted = temporary_path(path)
    planted.symlink_to(tmp_path / "not there yet")
    with pytest.raises(FileExistsError):
        write_atomic(path, b"again")
    assert path.read_bytes() == b"ours" and planted.is_symlink() and not (tmp_path / "not there yet").exists()


def test_file_folder_and_new_parents_are_flushed_in_that_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, list[str]]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        flushed.append((path.name.split(".")[0], names(path) if path.is_dir() else []))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    make_directory(tmp_path / "a/b/c")
    assert flushed == [(tmp_path.name, ["a"]), ("a", ["b"]), ("b", ["c"])]
    flushed.clear()
    make_directory(tmp_path / "a/b/c")
    assert not flushed
    write_atomic(tmp_path / "a/x", b"1")
    assert flushed == [("x", []), ("a", ["b", "x"])]


def test_files_are_made_for_everybody_unless_they_are_not_to_be(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_atomic(tmp_path / "public", b"")
        write_atomic(tmp_path / "private", b"", mode=0o600)
    finally:
        os.umask(umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"public": 0o644, "private": 0o600}


def test_only_our_own_leftovers_are_removed(tmp_path: Path) -> None:
    ours = temporary_path(tmp_path / "best.pt")
    ours.write_bytes(b"left by a kill")
    others = [
        *(".notes.tmp", "best.pt.tmp", "thesis.pt.0123456789abcdef.tmp", "best.pt.tmp.0123456789abcdef"),
        *("Xbest.pt.0123456789abcdef.tmp", "best.pt.0123456789ABCDEF.tmp"),
    ]
    for other in others:
        (tmp_path / other).write_bytes(b"")
    folder, link = temporary_path(tmp_path / "best.pt"), temporary_path(tmp_path / "best.pt")
    folder.mkdir()
    link.symlink_to(tmp_path / ".notes.tmp")
    remove_temporary(tmp_path, r"best\.pt|config\.json")
    assert names(tmp_path) == sorted([*others, folder.name, link.name])


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path, Path("/dev/zero")):
        for read in (lambda path: read_regular(path, 1 << 20), open_regular, file_sha256):
            with pytest.raises(OSError, match="not a regular file"):
                read(path)
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(OSError, match="larger than 1,048,576 bytes"):
        read_regular(sparse, 1 << 20)
    assert read_regular(sparse, (1 << 20) + 1) == bytes((1 << 20) + 1)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nothing", 9)


def test_a_zip_that_unfolds_is_told_from_one_that_is_stored() -> None:
    plain, deflated = io.BytesIO(), io.BytesIO()
    for buffer, kind in ((plain, ZIP_STORED), (deflated, ZIP_DEFLATED)):
        with ZipFile(buffer, "w", kind) as archive:
            archive.writestr("a", bytes(1000))
    check_stored(plain.getvalue())
    with pytest.raises(ValueError, match="compressed"):
        check_stored(deflated.getvalue())


@pytest.mark.parametrize("name", ["", "lock"])
def test_a_lock_keeps_another_process_out_and_goes_with_its_holder(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    code = (
        "import sys; from pathlib import Path; from base.files import lock\n"
        "with lock(Path(sys.argv[1]), ''): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="somebody is here"), lock(path, "somebody is here"):
            pass
        holder.kill()
        holder.wait()
        with (
            lock(path, "somebody is here"),
            pytest.raises(UserError, match="nor twice"),
            lock(path, "nor twice in one process"),
        ):
            pass
    with lock(path, "", wait=True) as descriptor:
        assert os.path.samestat(os.fstat(descriptor), path.stat())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EIO])
def test_without_locks_in_the_file_system_there_is_none_to_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(number, "")

    monkeypatch.setattr(base.files.fcntl, "flock", flock)
    with lock(tmp_path / "lock", "taken"), lock(tmp_path / "lock", "taken"):
        pass
    number = errno.EACCES  # a lock of another client on CIFS
    with pytest.raises(UserError, match="taken"), lock(tmp_path / "lock", "taken"):
        pass


def test_a_planted_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with (
        pytest.raises(UserError, match=r"cannot write .*[Ll]evels of symbolic links"),
        lock(tmp_path / "lock", ""),
    ):
        pass
    assert not (tmp_path / "victim").exists()
