"""C++ kernels for the CPU: what would take many passes over memory in torch's or DALI's operators, in one.

Each .cpp file here is one shared library with plain C functions. The machine's compiler ($CXX, c++ or g++) builds
it when it is first used, in about a second; later processes load it in milliseconds from
$XDG_CACHE_HOME/alexnet-dali (~/.cache/alexnet-dali). Whoever asks for a kernel can do without it, only slower.
ALEXNET_NATIVE=0 forbids them all.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import uuid
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

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
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"
    command = [compiler, *_FLAGS, *flags, f"-I{here}", "-x", "c++"]
    how: dict[str, Any] = {"capture_output": True, "check": True, "text": True, "errors": "replace"}
    run = functools.partial(subprocess.run, timeout=SECONDS_TO_BUILD, **how)
    try:
        # The predefined macros tell the compiler's version and the instruction sets of this CPU, so that a
        # home shared by unlike machines holds a library for each.
        macros = run([*command, "-dM", "-E", os.devnull]).stdout
        key = hashlib.sha256(f"{macros} {_FLAGS} {flags}".encode() + headers + source).hexdigest()[:16]
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cached = Path(home, "alexnet-dali", f"{name}-{key}.so")
        if cached.exists():
            return ctypes.CDLL(str(cached))
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch, f"{name}.so")
            run([*command, "-", "-o", str(built)], input=source.decode())
            # Ranks may build at once: each moves a whole file into place. If the home cannot be written, the
            # next process builds again.
            with suppress(OSError):
                cached.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(built, part := cached.with_name(uuid.uuid4().hex))
                part.replace(cached)
            return ctypes.CDLL(str(built))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines()
        return next((line for line in lines if "error" in line), str(error))
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return str(error)
