"""The wheel, installed without the repository: all commands and a training run."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*arguments: object, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, arguments)),
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},  # not the repository
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a virtual environment with the wheel and this environment's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    # from the files in git, because setuptools would include files of an earlier build
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs the repository to build a wheel")
    for name in listed.stdout.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder / "dist", folder / "source", cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    # site-packages of this environment, without the repository that it may be installed from (a .pth file there
    # would not be read)
    here = sysconfig.get_path("purelib", vars={"base": folder / "venv", "platbase": folder / "venv"})
    others = [path for path in sys.path if path.endswith("site-packages")]
    (Path(here) / "others.pth").write_text("".join(path + "\n" for path in others))
    run(*pip, "--python", folder / "venv/bin/python", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "venv/bin"


def test_the_wheel_holds_the_kernels(installed: Path) -> None:
    """Without the .cpp files, an installed trainer would warn and be much slower."""
    (native,) = installed.parent.glob("lib/python*/site-packages/native")
    sources = {path.name for path in (ROOT / "native").iterdir() if path.suffix in (".cpp", ".h")}
    assert sources and sources <= {path.name for path in native.iterdir()}


def test_the_wheel_is_what_runs_and_names_its_license(installed: Path, tmp_path: Path) -> None:
    code = (
        "import train, importlib.metadata as m; about = m.metadata('alexnet-dali')\n"
        "print(train.__file__, about['License-Expression'], about['License-File'])"
    )
    file, *license = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed.parent) and license == ["Apache-2.0", "LICENSE"]


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_every_command_answers(installed: Path, tmp_path: Path, command: str) -> None:
    assert "Usage:" in run(installed / command, "--help", cwd=tmp_path)


def test_a_recipe_trains_from_another_folder(installed: Path, dataset: Path, tmp_path: Path) -> None:
    small = ["--gpus", 0, "--crop", 67, "--global-batch", 48, "--epochs", 1, "--workers", 1, "--no-progress"]
    options = ["--recipe", "paper", "--data", dataset, "--out", "run", *small, "--warmup-epochs", 0]
    output = run(installed / "alexnet-train", *options, cwd=tmp_path)
    assert "epoch 1: train loss" in output
    assert (tmp_path / "run/checkpoint-000000002.pt").exists()
    scores = run(installed / "alexnet-evaluate", "run", "--gpus", 0, "--no-progress", cwd=tmp_path)
    assert "run/best.pt" in scores
