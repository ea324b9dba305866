"""`make install` on machines with NVIDIA drivers, by a stand-in for nvidia-smi; nothing is installed."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

FAILED = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


def make(
    folder: Path, driver: str, *arguments: str, stack: str = "cuda13"
) -> subprocess.CompletedProcess[str]:
    """Runs make with the driver that nvidia-smi reports and an environment where `stack` is installed."""
    tool = folder / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "{driver}"\necho "{driver}"\n')
    tool.chmod(0o755)
    (folder / f".installed-{stack}").touch()
    command = ["make", "--no-print-directory", f"VENV={folder}", "PYTHON=false", *arguments]
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    for name in ("STACK", "VENV", "MAKEFLAGS", "MAKELEVEL"):  # these tests may run under make
        environment.pop(name, None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("driver", "stack", "advice"),
    [
        ("580.65.06", "cuda13", None),
        ("1000.1", "cuda13", None),
        ("570.86.15", "cuda13", "which needs 580 or later: type 'make install STACK=cuda12'"),
        ("570.86.15", "cuda12", None),
        ("525.60", "cuda13", "which needs 580 or later: type 'make install STACK=cuda12'"),
        ("470.1", "cuda13", "which needs 580 or later: update the driver"),
        ("470.1", "cuda12", "which needs 525 or later: update the driver"),
        (FAILED, "cuda13", None),
        ("", "cuda13", None),
    ],
)
def test_a_driver_that_does_not_fit_is_named_in_one_line(
    driver: str, stack: str, advice: str | None, tmp_path: Path
) -> None:
    done = make(tmp_path, driver, "install", stack=stack)
    expected = f"NVIDIA driver {driver} is too old for the stack {stack}, {advice}\n" if advice else ""
    assert done.returncode == 0 and done.stderr == expected


def test_another_stack_is_installed_with_its_own_pins(tmp_path: Path) -> None:
    done = make(tmp_path, "570.1", "install", "STACK=cuda12", "--dry-run")
    assert "cat - constraints-cuda12.txt" in done.stdout and ".installed-cuda12" in done.stdout
    assert "pip" not in make(tmp_path, "570.1", "install", "--dry-run").stdout  # cuda13, already there
    wrong = make(tmp_path, "570.1", "install", "STACK=cuda11")
    assert wrong.returncode == 2 and "STACK is cuda11: use cuda12 or cuda13" in wrong.stderr


def test_the_pins_of_cuda12_replace_the_same_names() -> None:
    def names(path: str) -> set[str]:
        lines = (ROOT / path).read_text().splitlines()
        return {line.partition("==")[0] for line in lines if line and not line.startswith("#")}

    assert names("constraints-cuda12.txt") == {"torch", "torchvision", "triton"} <= names("constraints.txt")
