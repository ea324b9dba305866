"""The benchmark's result as one block for an issue."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from base.machine import cpu_threads
from model.parallel.ranks import DRIVER_VERSION
from tools.bench.core import ROOT, Row, table

TEST_LINES = 40  # of the tests' output, from its end


def machine(device: torch.device) -> dict[str, str]:
    """What a reader needs to know to compare rates: name to value."""
    facts = {"device": f"CPU, {cpu_threads()} cores"}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts["device"] = (
            f"{torch.cuda.device_count()} x {card.name}" if torch.cuda.device_count() > 1 else card.name
        )
        facts["card"] = f"sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB"
        facts["driver"] = DRIVER_VERSION.read_text().strip() if DRIVER_VERSION.exists() else "unknown"
    facts["processor"] = f"{_processor()}, {cpu_threads()} of {os.cpu_count()} cores"
    facts["python"] = platform.python_version()
    facts["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    for package in ("nvidia-dali-cuda120", "triton"):
        facts[package] = _version(package)
    facts["commit"] = _commit()
    return facts


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def issue(facts: dict[str, str], rows: list[Row], failed: list[str], json: str, tests: str) -> str:
    """Markdown that can be pasted into an issue.

    Args:
        facts: see `machine`.
        failed: a line for each stage that failed.
        json: the rows and facts as JSON.
        tests: the output of the tests, of which the end is shown.
    """
    return "\n".join(
        [
            "----- copy from here -----",
            f"### Benchmark on {facts['device']}",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
            table(rows),
            "",
            *(f"- {line}" for line in failed),
            "",
            "```text",
            *tests.rstrip().splitlines()[-TEST_LINES:],
            "```",
            "",
            "<details><summary>JSON</summary>",
            "",
            "```json",
            json,
            "```",
            "",
            "</details>",
            "----- to here -----",
        ]
    )
