"""C++ kernels for the CPU: what would take many passes over memory in torch's or DALI's operators, in one.

Each .cpp file here is one shared library with plain C functions. The machine's compiler ($CXX, c++ or g++) builds
it when it is first used, in about a second; later processes load it in milliseconds from
$XDG_CACHE_HOME/alexnet-dali (~/.cache/alexnet-dali). Whoever asks for a kernel can do without it, only slower.
ALEXNET_NATIVE=0 forbids them all.

A library is code: one that another user owns or could write to is not loaded but built again, as is one that does
not load.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from base.files import make_directory, write_atomic

SECONDS_TO_BUILD = 120.0  # a second on an idle machine; a compiler that hangs is done without
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared")


def library(name: str, otherwise: str, *flags: str) -> ctypes.CDLL | None:
    """The library of `name`.cpp, built with `flags` too unless it is in the cache; None where that fails.

    A warning then says why, and `otherwise`, what the caller does instead. ALEXNET_NATIVE=0 needs no warning.
    """
    if os.environ.get("ALEXNET_NATIVE") == "0":
        return None
    found = _load(name, *flags)
    if isinstance(found, str):
        warnings.warn(f"{otherwise}: {found}", stacklevel=3)
        return None
    return found


@functools.cache
def _load(name: str, *flags: str) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    here = Path(__file__).parent
    source = (here / f"{name}.cpp").read_bytes()
    headers = b"".join(path.read_bytes() for path in sorted(here.glob("*.h")))
    how: dict[str, Any] = {"capture_output": True, "check": True, "text": True, "errors": "replace"}
    run = functools.partial(subprocess.run, timeout=SECONDS_TO_BUILD, **how)
    try:
        command = [*compiler(), *_FLAGS, *flags, f"-I{here}", "-x", "c++"]
        # The predefined macros tell the compiler's version and the instruction sets of this CPU, so that a
        # home shared by unlike machines holds a library for each.
        macros = run([*command, "-dM", "-E", os.devnull]).stdout
        key = hashlib.sha256(f"{macros} {_FLAGS} {flags}".encode() + headers + source).hexdigest()[:16]
        cached = _cache() / f"{name}-{key}.so"
        with suppress(OSError):  # there is none, or it does not load: build it
            if _is_private(cached.parent.lstat()) and _is_private(cached.lstat()):
                return ctypes.CDLL(str(cached))
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch, f"{name}.so")
            run([*command, "-", "-o", str(built)], input=source.decode())
            # Ranks may build at once: each moves a whole file into place. Where the cache cannot be written, or
            # is another user's, the next process builds again.
            with suppress(OSError):
                make_directory(cached.parent.parent)
                cached.parent.mkdir(0o700, exist_ok=True)
                if _is_private(cached.parent.lstat()):
                    write_atomic(cached, built.read_bytes(), mode=0o600)
            return ctypes.CDLL(str(built))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines()
        return next((line for line in lines if "error" in line), str(error))
    except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        return str(error)


def compiler() -> list[str]:
    """The command that compiles C++: $CXX, which may have arguments ("ccache g++"), else what is installed."""
    return shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]


def _cache() -> Path:
    """The folder of the libraries; a relative $XDG_CACHE_HOME is ignored, as its specification says."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "alexnet-dali"


def _is_private(status: os.stat_result) -> bool:
    """Whether only this user, or root, can have made a file or folder what it is; links are not."""
    kind = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return kind and status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
