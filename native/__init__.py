"""C++ kernels for the CPU, which need one pass over memory where operators of torch or DALI need many.

Each .cpp file here becomes one shared library with C functions. The machine's compiler ($CXX, c++ or g++) builds it
on first use, in about a second. Later processes load it in milliseconds from $XDG_CACHE_HOME/alexnet-dali (default:
~/.cache/alexnet-dali). Every caller has a slower fallback without the kernel. ALEXNET_NATIVE=0 disables all
kernels.

A cached library that another user owns or can write to is not loaded, because it is code, but built again. So is
one that does not load.
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

SECONDS_TO_BUILD = 120.0  # an idle machine needs one; a compiler that hangs counts as missing
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared")


def library(name: str, otherwise: str, *flags: str) -> ctypes.CDLL | None:
    """Load the library of `name`.cpp from the cache, or build it with the additional `flags`; None if that fails.

    In that case a warning gives the reason, and `otherwise`, which describes the caller's fallback.
    ALEXNET_NATIVE=0 gives no warning.
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
    """Return the library, or the reason why there is none."""
    here = Path(__file__).parent
    source = (here / f"{name}.cpp").read_bytes()
    headers = b"".join(path.read_bytes() for path in sorted(here.glob("*.h")))
    how: dict[str, Any] = {"capture_output": True, "check": True, "text": True, "errors": "replace"}
    run = functools.partial(subprocess.run, timeout=SECONDS_TO_BUILD, **how)
    try:
        command = [*compiler(), *_FLAGS, *flags, f"-I{here}", "-x", "c++"]
        # The predefined macros contain the compiler's version and the CPU's instruction sets, so a home directory
        # that different machines share holds one library for each.
        macros = run([*command, "-dM", "-E", os.devnull]).stdout
        key = hashlib.sha256(f"{macros} {_FLAGS} {flags}".encode() + headers + source).hexdigest()[:16]
        cached = _cache() / f"{name}-{key}.so"
        with suppress(OSError):  # it is missing or does not load: build it
            if _is_private(cached.parent.lstat()) and _is_private(cached.lstat()):
                return ctypes.CDLL(str(cached))
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch, f"{name}.so")
            run([*command, "-", "-o", str(built)], input=source.decode())
            # Ranks can build at the same time, because each moves a complete file into place. If the cache cannot
            # be written, or belongs to another user, the next process builds again.
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
    """The C++ compiler: $CXX, which can have arguments ("ccache g++"), or else the installed one."""
    return shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]


def _cache() -> Path:
    """The folder of the libraries. A relative $XDG_CACHE_HOME is ignored, as its specification requires."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "alexnet-dali"


def _is_private(status: os.stat_result) -> bool:
    """Whether only this user or root can have written a file or folder; False for links."""
    kind = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return kind and status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
