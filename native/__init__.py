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

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-pthread")


@functools.cache
def library(name: str, otherwise: str, *defines: str) -> ctypes.CDLL | None:
    """The library of `name`.cpp, built unless it is in the cache; None, with a warning, where that fails.

    `otherwise` is what the caller then does, for the warning. `defines`: macros for the compiler, as "SIZE=5".
    """
    if os.environ.get("ALEXNET_NATIVE") == "0":
        return None
    source = Path(__file__).with_name(f"{name}.cpp").read_bytes()
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"
    flags = [*_FLAGS, *(f"-D{define}" for define in defines)]
    try:
        # The predefined macros tell the compiler's version and the instruction sets of this CPU, so that a
        # home shared by unlike machines holds a library for each.
        describe = [compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
        macros = subprocess.run(describe, capture_output=True, check=True).stdout
        key = hashlib.sha256(macros + " ".join(flags).encode() + source).hexdigest()[:16]
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cached = Path(home, "alexnet-dali", f"{name}-{key}.so")
        if cached.exists():
            return ctypes.CDLL(str(cached))
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch, f"{name}.so")
            build = [compiler, *flags, "-x", "c++", "-", "-o", str(built)]
            subprocess.run(build, input=source, capture_output=True, check=True)
            # Ranks may build at once: each moves a whole file into place. If the home cannot be written, the
            # next process builds again.
            with suppress(OSError):
                cached.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(built, part := cached.with_name(uuid.uuid4().hex))
                part.replace(cached)
            return ctypes.CDLL(str(built))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        warnings.warn(f"{otherwise}: {error}", stacklevel=2)
        return None
