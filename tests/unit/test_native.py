"""The cache of the C++ kernels: what is in it runs in this process, so what may be loaded from it."""

import os
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import needs_compiler

import native

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a source that compiles in no time."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "answer.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(native, "__file__", str(source / "__init__.py"))
    monkeypatch.setattr(native, "_FLAGS", ("-fPIC", "-shared"))
    monkeypatch.delenv("ALEXNET_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new/cache"))
    native._load.cache_clear()
    yield tmp_path / "new/cache/alexnet-dali"
    native._load.cache_clear()


def answer() -> int:
    """As in a new process, and without a warning."""
    native._load.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library = native.library("answer", "slower")
    assert library is not None
    return int(library.answer())


def library_of(cache: Path) -> Path:
    (library,) = cache.iterdir()
    return library


def test_the_cache_is_the_users_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    umask = os.umask(0)
    try:
        assert answer() == 42
    finally:
        os.umask(umask)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(library_of(cache).stat().st_mode) == 0o600
    made = library_of(cache).stat().st_ino
    assert answer() == 42 and library_of(cache).stat().st_ino == made  # loaded, not built again


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\0" * 16384])
def test_a_library_that_does_not_load_is_built_again(cache: Path, content: bytes) -> None:
    assert answer() == 42
    whole = library_of(cache).stat().st_size
    # under a new inode, as after a power cut: the loader knows the old one
    broken = library_of(cache)
    broken.unlink()
    broken.write_bytes(content)
    broken.chmod(0o600)
    assert answer() == 42
    assert library_of(cache).stat().st_size == whole


def planted(cache: Path) -> Path:
    """Replace the cached library with one that gives another answer."""
    source = Path(native.__file__).parent / "answer.cpp"
    good = source.read_text()
    assert answer() == 42
    library = library_of(cache)
    name = library.name
    library.unlink()
    source.write_text(good.replace("42", "666"))
    assert answer() == 666
    library_of(cache).rename(cache / name)
    source.write_text(good)
    assert answer() == 666  # it is loaded, because only this user can write to it
    return cache / name


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_library_that_others_can_write_to_is_not_loaded(cache: Path, mode: int) -> None:
    planted(cache).chmod(mode)
    assert answer() == 42
    assert stat.S_IMODE(library_of(cache).stat().st_mode) == 0o600  # ours has taken its place


def test_a_folder_that_others_can_write_to_is_not_used(cache: Path) -> None:
    library = planted(cache)
    cache.chmod(0o777)
    before = library.stat().st_ino
    assert answer() == 42
    assert library.stat().st_ino == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("whose", ["folder", "library"])
def test_what_another_user_owns_is_not_loaded(cache: Path, whose: str) -> None:
    library = planted(cache)
    os.chown(cache if whose == "folder" else library, 12345, -1)
    assert answer() == 42


def test_a_link_is_not_followed(cache: Path, tmp_path: Path) -> None:
    library = planted(cache)
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    assert answer() == 42


def test_a_relative_cache_is_ignored(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert answer() == 42
    assert not (tmp_path / "here").exists() and library_of(tmp_path / "home/.cache/alexnet-dali").is_file()


def test_a_cache_that_cannot_be_written_is_done_without(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert answer() == 42


def test_the_compiler_may_have_arguments(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "CXX", f"{sys.executable} -c 'import os, sys; os.execvp(sys.argv[1], sys.argv[1:])' c++"
    )
    assert answer() == 42
    monkeypatch.setenv("CXX", "g++ 'without an end")
    native._load.cache_clear()
    with pytest.warns(UserWarning, match="slower: No closing quotation"):
        assert native.library("answer", "slower") is None
