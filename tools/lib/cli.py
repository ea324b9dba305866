"""Command line of the tools: options, help, results that are written, and text that every terminal can show.

Building a command must stay quick: nothing here imports torch, DALI, OpenCV or matplotlib.
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
TOP = 5  # guesses that are counted and shown


def option(*names: str, **kwargs: Any) -> Callable[[Any], Any]:
    """click.option that shows its default."""
    return click.option(*names, show_default=kwargs.pop("show_default", True), **kwargs)


def examples(*lines: str) -> str:
    """The epilog of a command's help: one command line each."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def file_option(name: str, help: str) -> Callable[[Any], Any]:
    """An optional file to write; its parameter ends in _path, so that `--json` hides no module."""
    parameter = name.removeprefix("--").replace("-", "_") + "_path"
    return click.option(name, parameter, type=click.Path(dir_okay=False, path_type=Path), help=help)


def train_option(name: str, help: str, default: Any = None) -> Callable[[Any], Any]:
    """An option of train.py, with its type and its default, or `default` where that depends on other options."""
    field = Config.__dataclass_fields__[name]
    default = field.default if default is None else default
    return option(f"--{name.replace('_', '-')}", type=field.metadata["type"], default=default, help=help)


def out_option(default: str) -> Callable[[Any], Any]:
    """--out of a command that always writes one file."""
    kind = click.Path(dir_okay=False, path_type=Path)
    return option("--out", type=kind, default=Path(default), help="The file to write.")


def run_argument(**kwargs: Any) -> Callable[[Any], Any]:
    """RUN: a folder that train.py wrote, or a checkpoint."""
    return click.argument("run", type=click.Path(path_type=Path), **kwargs)


def data_option(help: str, whose: str = "RUN") -> Callable[[Any], Any]:
    """--data, None where it is not given: see `tools.lib.runs.data_of`."""
    return option(
        "--data",
        type=click.Path(path_type=Path),
        show_default=f"what {whose} was trained on",
        help=help,
    )


def device_option(many: bool = False) -> Callable[[Any], Any]:
    """--gpus; `many` where a command can use more than one."""
    return option(
        "--gpus",
        type=click.IntRange(0) if many else click.IntRange(0, 1),
        default=None,
        show_default="1 if there is one",
        help="How many GPUs to use; 0 is the CPU." if many else "0 uses the CPU, 1 a GPU.",
    )


def workers_option(what: str = "shards") -> Callable[[Any], Any]:
    """--workers: reader processes."""
    return option(
        "--workers",
        type=click.IntRange(0),
        default=1,
        help=f"Processes for each device that read {what}; 0 reads in the main process.",
    )


def progress_option() -> Callable[[Any], Any]:
    """--progress/--no-progress."""
    return option("--progress/--no-progress", default=True, help="Show a progress bar.")


# --- text ----------------------------------------------------------------------------------------------------


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def cell(text: str) -> str:
    """A name as a cell of a CSV file: no spreadsheet takes it for a formula (an apostrophe goes in front).

    https://owasp.org/www-community/attacks/CSV_Injection
    """
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def echo(text: str, err: bool = False) -> None:
    """Print to any terminal: what its encoding lacks becomes an escape, as do control characters of names."""
    stream = sys.stderr if err else sys.stdout
    encoding = stream.encoding or "utf-8"
    text = "\n".join(map(printable, text.split("\n")))
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=err)


# --- files ---------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a result, making its folder; "-" is the standard output. Raises ModelError if that fails."""
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
