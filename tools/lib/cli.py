"""The tools' command line: common options, help, output files and text for any terminal.

Does not import torch, DALI, OpenCV or matplotlib, so that --help is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from base.errors import ModelError, printable
from model.training.config import Config

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
TOP = 5  # number of guesses that are counted and shown


def option(*names: str, **kwargs: Any) -> Callable[[Any], Any]:
    """click.option that shows its default."""
    return click.option(*names, show_default=kwargs.pop("show_default", True), **kwargs)


def examples(*lines: str) -> str:
    """The epilog of a command's help, with one command line per example."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def file_option(name: str, help: str) -> Callable[[Any], Any]:
    """An option for a file; its parameter ends in _path, so that --json does not shadow the module."""
    parameter = name.removeprefix("--").replace("-", "_") + "_path"
    return click.option(name, parameter, type=click.Path(dir_okay=False, path_type=Path), help=help)


def train_option(name: str, help: str, default: Any = None) -> Callable[[Any], Any]:
    """An option of train.py with its type and default; `default` replaces a default that train.py computes."""
    field = Config.__dataclass_fields__[name]
    default = field.default if default is None else default
    return option(f"--{name.replace('_', '-')}", type=field.metadata["type"], default=default, help=help)


def out_option(default: str) -> Callable[[Any], Any]:
    """--out, for a command that writes one file."""
    kind = click.Path(dir_okay=False, path_type=Path)
    return option("--out", type=kind, default=Path(default), help="The file to write.")


def run_argument(**kwargs: Any) -> Callable[[Any], Any]:
    """The argument RUN: a folder that train.py wrote, or a checkpoint."""
    return click.argument("run", type=click.Path(path_type=Path), **kwargs)


def data_option(help: str, whose: str = "RUN") -> Callable[[Any], Any]:
    """--data, None if it is not given: see `tools.lib.runs.data_of`."""
    return option(
        "--data",
        type=click.Path(path_type=Path),
        show_default=f"the one that {whose} was trained on",
        help=help,
    )


def device_option(many: bool = False) -> Callable[[Any], Any]:
    """--gpus; `many` if the command can use several."""
    return option(
        "--gpus",
        type=click.IntRange(0) if many else click.IntRange(0, 1),
        default=None,
        show_default="1 if there is one",
        help="Number of GPUs to use; 0 uses the CPU." if many else "1 uses the GPU, 0 the CPU.",
    )


def workers_option(what: str = "shards") -> Callable[[Any], Any]:
    """--workers: reader processes."""
    return option(
        "--workers",
        type=click.IntRange(0),
        default=1,
        help=f"Reader processes per device for {what}; 0 reads in the main process.",
    )


def progress_option() -> Callable[[Any], Any]:
    """--progress/--no-progress."""
    return option("--progress/--no-progress", default=True, help="Show a progress bar.")


# --- text ----------------------------------------------------------------------------------------------------


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def cell(text: str) -> str:
    """Text for a cell of a CSV file; an apostrophe keeps spreadsheets from running it as a formula.

    https://owasp.org/www-community/attacks/CSV_Injection
    """
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def echo(text: str, err: bool = False) -> None:
    """Print text; control characters and characters that the terminal's encoding lacks become escapes."""
    stream = sys.stderr if err else sys.stdout
    encoding = stream.encoding or "utf-8"
    text = "\n".join(map(printable, text.split("\n")))
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=err)


# --- files ---------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a text file and create its folder; "-" is the standard output. Raises ModelError if that fails."""
    if str(path) == "-":
        echo(text.removesuffix("\n"))
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> ModelError:
    return ModelError(f"cannot write {path}: {error.strerror or error}; give another file")
