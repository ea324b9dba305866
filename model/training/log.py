"""log.jsonl, the record of a run: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from base.errors import ModelError


def read_log(run: Path) -> list[dict[str, Any]]:
    """The entries of RUN/log.jsonl; `run` may also be a checkpoint in that folder.

    Leaves out a partial last line, which a run that is still writing or was killed may have. Raises ModelError if
    there is no entry, or if another line is damaged.
    """
    path = (run.parent if run.is_file() else run) / "log.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ModelError(
            f"cannot read {path} ({error.strerror}): give a folder that train.py wrote"
        ) from None
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not an object")
        except ValueError:  # also bytes that are not UTF-8
            if number < len(lines):
                raise ModelError(f"line {number} of {path} is damaged: delete it") from None
        else:
            entries.append(entry)
    if not entries:
        raise ModelError(f"{path} is empty: train for --log-every steps first")
    return entries
