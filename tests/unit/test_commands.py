"""All commands of tools/: quick help, help for each option, imports, text for terminals."""

import importlib
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from helpers import ROOT, make_run

from base.errors import DataError
from tools.lib import cli

COMMANDS = ("ablate", "benchmark", "evaluate", "export", "predict", "show")
HEAVY = ("torch", "nvidia", "matplotlib", "cv2", "lmdb", "scipy")


def commands() -> dict[str, click.Command]:
    """Each command and subcommand by name."""
    found: dict[str, click.Command] = {}
    for name in COMMANDS:
        main = importlib.import_module(f"tools.{name}").main
        subcommands = main.commands.items() if isinstance(main, click.Group) else ()
        found |= {name: main, **{f"{name} {sub}": command for sub, command in subcommands}}
    return found


def python(code: str, *arguments: object) -> str:
    """Run code in a new interpreter; returns its output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import importlib, sys
from click.testing import CliRunner
for name in {COMMANDS}:
    main = importlib.import_module("tools." + name).main
    done = CliRunner().invoke(main, ["--help"])
    assert done.exit_code == 0 and "Examples:" in done.output, name
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert python(code) == "[]\n"


@pytest.mark.parametrize("name", commands())
def test_every_option_has_a_sentence_and_every_command_two_examples(name: str) -> None:
    command = commands()[name]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            text = parameter.help or ""
            assert text.endswith(".") and len(text) > 10, (name, parameter.name, text)
    file = name.split()[0]
    shown = CliRunner().invoke(command, ["--help"]).output.partition("Examples:\n")[2]
    assert shown.count(f"python tools/{file}.py") == 2, shown


@pytest.mark.parametrize("name", commands())
def test_examples_are_valid_command_lines(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The options exist and accept these values; the files are not read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs").mkdir()
    (tmp_path / ".venv-peers/bin").mkdir(parents=True)
    (tmp_path / ".venv-peers/bin/python").touch()
    file, *rest = name.split()
    command = commands()[name]
    for line in (command.epilog or "").splitlines()[2:]:
        words = line.partition(f"python tools/{file}.py ")[2].replace("'", "").split()
        if isinstance(command, click.Group):
            assert words[0] in command.commands
        else:
            assert words[: len(rest)] == rest
            command.make_context(name, words[len(rest) :]).close()


def test_literal_choices_are_those_of_the_modules_that_help_must_not_import() -> None:
    from tools.bench.stages import STAGES
    from tools.benchmark import STAGES as named
    from tools.evaluate import main
    from tools.lib.scores import AMP

    assert tuple(STAGES) == named
    (amp,) = (p for p in main.params if p.name == "amp")
    assert isinstance(amp.type, click.Choice) and list(amp.type.choices) == list(AMP)


def test_predict_and_export_work_without_dali(dataset: Path, class_folders: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dataset)
    code = """
import sys
sys.modules["nvidia.dali"] = None  # importing it now fails
import tools.lib.figures
from click.testing import CliRunner
from tools import export, predict
run, photo, out = sys.argv[1:]
for main, arguments in (
    (predict.main, [run, photo, "--gpus", "0", "--sheet", out + "/sheet.png"]),
    (export.main, [run, "--torchvision", out + "/x.pth"]),
):
    done = CliRunner().invoke(main, arguments)
    print(done.exit_code, done.output.splitlines()[-1])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
"""
    photo = next((class_folders / "val" / "coffee").iterdir())
    predicted, exported = python(code, run, photo, tmp_path).splitlines()
    assert predicted.startswith("0 ") and (tmp_path / "sheet.png").exists()
    assert exported.startswith("1 ") and "--variant owt" in exported  # after it has loaded the network


def test_text_for_terminals_and_spreadsheets() -> None:
    assert (
        cli.printable("caf\udce9 \x1b[31m\u202e\x9b ok 猫\u3000")
        == "caf\\xe9 \\x1b[31m\\u202e\\x9b ok 猫\u3000"
    )
    for text in ("=1+1", "+1", "-1", "@sum"):
        assert cli.cell(text) == f"'{text}"
    assert cli.cell("tench") == "tench"
    assert cli.cell("\t=1") == "\\t=1"


def test_escape_sequences_of_names_reach_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    DataError("no images of \x1b]0;x\x07caf\udce9\r 猫\nError: more").show()
    cli.echo("a\x1b[2J\nb")
    output = capsys.readouterr()
    assert output.err == "Error: no images of \\x1b]0;x\\x07caf\\xe9\\r 猫\\nError: more\n"
    assert output.out == "a\\x1b[2J\nb\n"
