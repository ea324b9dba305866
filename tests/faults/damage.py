"""Changed bits in checkpoints and data sets, which must be detected."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from base.errors import DataError
from faults.inputs import make_data
from faults.processes import Lost, Progress


def checkpoints(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """A truncated checkpoint, or one with a changed bit, is refused by name; --fall-back uses the previous one."""
    import torch

    from base.errors import ModelError
    from model.training.checkpoint import Checkpoints
    from model.training.config import checkpoint_paths

    run = Checkpoints(work / "checkpoints")
    run.out.mkdir()
    for step in (1, 2):
        run.save({"model": {"w": torch.arange(4096.0)}, "step": step})
    newest, passed = checkpoint_paths(run.out)[0], 0
    content = newest.read_bytes()
    for number in range(tries):
        damaged = bytearray(content)
        if number % 2:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        newest.write_bytes(damaged)
        try:
            run.newest()
            raise Lost("a damaged checkpoint was loaded")
        except ModelError as error:
            if newest.name not in error.message:
                raise Lost(f"the checkpoint is not named: {error.message}") from None
        if run.newest(fall_back=True)["step"] != 1:
            raise Lost("the previous checkpoint was not used")
        passed += 1
        tick()
    return passed, ""


def flips(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """One changed bit in a data set: verification names the file, and the key if the bit is in a record."""
    from pipeline.build.verify import verify_split
    from pipeline.shards import ShardReader

    split = make_data(work) / "train"
    reader = ShardReader(split)
    records = []  # (file, start, end, key)
    for index in range(len(reader)):
        shard, key = reader.locate(index)
        file = split / shard / "data.mdb"
        data = reader.read(index)[0].tobytes()
        start = file.read_bytes().find(data)
        records.append((file, start, start + len(data), key.decode()))
    reader.close()
    files = sorted(path for path in split.rglob("*") if path.is_file())
    sizes, passed, named = [path.stat().st_size for path in files], 0, 0
    for number in range(tries):
        # three quarters of the flips by file size, so mostly in the shards; a quarter in any file
        path = draw.choices(files, sizes)[0] if number % 4 else draw.choice(files)
        content = path.read_bytes()
        position = draw.randrange(len(content))
        damaged = bytearray(content)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            problems = _problems(split, verify_split)
        finally:
            path.write_bytes(content)
        damaged_key = next((k for f, start, end, k in records if f == path and start <= position < end), None)
        where = path.parent.name if path.parent != split else path.name
        if where not in problems or (damaged_key and f"key {damaged_key}" not in problems):
            raise Lost(f"{path.relative_to(split)} byte {position}, key {damaged_key}: {problems[:200]!r}")
        named += damaged_key is not None
        passed += 1
        tick()
    return passed, f"{named} in a record, named by its key"


def _problems(split: Path, verify_split: Callable[..., Any]) -> str:
    """All problems that verification reports for a split."""
    try:
        _, reports, problems = verify_split(split, 1)
    except DataError as error:
        return error.message
    return "\n".join(problems + [f"{r.name}: {problem}" for r in reports for problem in r.problems])
