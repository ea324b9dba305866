"""The import rules of docs/architecture.md: imports run in one direction, and some modules are light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

# package -> the packages that it may import besides itself; the longest matching package counts
ALLOWED: dict[str, set[str]] = {
    "base": set(),
    "native": {"base"},
    "pipeline": {"base"},  # shards.py and preprocess.py, which build/ and load/ share
    "pipeline.build": {"base", "native", "pipeline"},
    "pipeline.load": {"base", "native", "pipeline"},
    "model": {"base", "native"},
    "model.parallel": {"base", "native", "model"},
    # the state of a run has the data's preprocessing and the plan
    "model.training": {"base", "native", "model", "model.parallel", "pipeline", "pipeline.load"},
    "tools": {"base", "native", "pipeline", "pipeline.build", "pipeline.load", "model", "model.training",
              "model.parallel", "train"},
    "train": {"base", "native", "pipeline", "pipeline.load", "model", "model.training", "model.parallel", "tools"},
}  # fmt: skip
# every reader or builder process imports these
LIGHT = [
    "base.errors",
    "base.files",
    "base.machine",
    "pipeline.lmdb_pages",
    "pipeline.shards",
    "pipeline.load.plan",
    "pipeline.load.feed",
]
HEAVY = ["torch", "cv2", "nvidia.dali", "scipy", "matplotlib"]


def package_of(module: str) -> str | None:
    """The package of ALLOWED that a module belongs to; None for external modules."""
    found = [package for package in ALLOWED if module == package or module.startswith(package + ".")]
    return max(found, key=len, default=None)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of each import in a file, including those in functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports name the whole path here"
            assert node.module
            # `from model import lrn` imports a module, `from model.lrn import LRN` does not
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def sources() -> list[Path]:
    files = [path for package in ALLOWED for path in (ROOT / package.replace(".", "/")).rglob("*.py")]
    return sorted({*files, ROOT / "train.py"})


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    own = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    assert own is not None
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for line, module in imports(path)
        if (package := package_of(module)) not in (None, own) and package not in ALLOWED[own]
    ]
    assert not wrong


def test_light_modules_import_nothing_heavy() -> None:
    """In a new interpreter; reader and builder processes import these."""
    code = f"import sys, {', '.join(LIGHT)}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
