"""Checkpoints: written atomically, refused if damaged."""

import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from base.errors import ModelError
from base.files import temporary_path
from model.training.checkpoint import Checkpoints, find, load, save

STATE: dict[str, Any] = {"model": {"w": torch.arange(1000.0)}, "step": 7, "variant": "paper", "lr": 0.1}


def test_round_trip_and_still_an_ordinary_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save(path, STATE)
    for back in (load(path), torch.load(path, weights_only=True)):
        assert torch.equal(back["model"]["w"], STATE["model"]["w"]) and back["step"] == 7
    assert zipfile.ZipFile(path).testzip() is None
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_tensors_are_saved_from_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CUDA tensors show this without a GPU."""
    saved: list[dict[str, Any]] = []
    write = torch.save

    def record(state: dict[str, Any], file: IO[bytes]) -> None:
        saved.append(state)
        write({}, file)

    monkeypatch.setattr(torch, "save", record)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.empty(3, device="cuda")
        optimizer = {"state": {0: {"momentum_buffer": weight}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        save(tmp_path / "c.pt", {"model": {"w": weight}, "optimizer": optimizer, "step": 7})
    assert saved[0]["model"]["w"].device.type == "cpu" and saved[0]["step"] == 7
    assert saved[0]["optimizer"]["state"][0]["momentum_buffer"].device.type == "cpu"
    assert saved[0]["optimizer"]["param_groups"] == optimizer["param_groups"]


def test_every_flipped_byte_and_every_truncation_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save(path, STATE)
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(ModelError, match=r"c\.pt is damaged"):
            load(path)
    for length in [0, 1, 63, 64, 65, *range(100, len(good), 501)]:
        path.write_bytes(good[:length])
        with pytest.raises(ModelError, match=r"c\.pt is damaged"):
            load(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    save(path, STATE)
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelError, match="No space left"):
        save(path, {**STATE, "step": 8})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    temporary_path(tmp_path / "checkpoint-000000001.pt").write_bytes(b"left by a kill")
    (tmp_path / ".thesis.tmp").write_bytes(b"the user's")
    (tmp_path / ".folder.tmp").mkdir()
    for step in (1, 2, 3, 4):
        checkpoints.save({**STATE, "step": step}, best=step == 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".folder.tmp",
        ".thesis.tmp",
        "best.pt",
        "checkpoint-000000003.pt",
        "checkpoint-000000004.pt",
    ]
    assert load(tmp_path / "best.pt")["step"] == 2
    assert checkpoints.newest()["step"] == 4
    assert find(tmp_path) == tmp_path / "best.pt"
    assert find(tmp_path / "checkpoint-000000003.pt").name == "checkpoint-000000003.pt"


def test_a_later_checkpoint_that_was_passed_over_does_not_count_as_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (4, 8, 12):
        checkpoints.save({**STATE, "step": step})
    (tmp_path / "checkpoint-000000012.pt").write_bytes(b"damaged")
    assert checkpoints.newest(fall_back=True)["step"] == 8
    Checkpoints(tmp_path, keep=1).save({**STATE, "step": 10})
    assert [p.name for p in tmp_path.glob("*.pt")] == ["checkpoint-000000010.pt"]
    assert checkpoints.newest()["step"] == 10


def test_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no checkpoint"):
        Checkpoints(tmp_path).newest()
    with pytest.raises(ModelError, match="no run at"):
        find(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="holds no checkpoint"):
        find(tmp_path)
    with pytest.raises(ModelError, match="cannot read the checkpoint"):
        load(tmp_path / "nothing.pt")


def test_only_a_run_that_goes_on_is_told_how(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(STATE, best=True)
    path.write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"is damaged \([^)]*\): start again with another --out"):
        checkpoints.newest()
    later = checkpoints.save({**STATE, "step": STATE["step"] + 1})
    later.write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"is damaged \([^)]*\): .* previous one, use --resume --fall-back"):
        checkpoints.newest()
    with pytest.raises(ModelError, match=r"best\.pt is damaged \([^)]*\): give another file$"):
        load(find(tmp_path))


def signed(path: Path, content: bytes) -> None:
    """Write a malicious file: any zip, with a valid checksum."""
    content = content[:-2] + (64).to_bytes(2, "little")
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())


def test_deflated_storages_are_refused_before_they_unfold(tmp_path: Path) -> None:
    buffer, packed = io.BytesIO(), io.BytesIO()
    torch.save({**STATE, "model": {"w": torch.zeros(1 << 20)}}, buffer)
    with (
        zipfile.ZipFile(buffer) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert len(packed.getvalue()) < 1 << 14
    signed(tmp_path / "c.pt", packed.getvalue())
    with pytest.raises(ModelError, match=r"c\.pt is not a checkpoint .*\(it is compressed\)"):
        load(tmp_path / "c.pt")


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/harm",)


@pytest.mark.parametrize(
    "change",
    [
        {"step": None},
        {"step": -1},
        {"epoch": "9"},
        {"model": [1]},
        {"model": {"w": 1}},
        {"classes": 10},
        {"classes": [{"wnid": "a", "name": 1}]},
        {"classes": [None]},
        {"preprocess": None},
        {"preprocess": {"size": 256, "crop": 224, "mean_mode": "none", "mean": torch.zeros(4, 4, 3)}},
        {"lr": Harm()},
    ],
    ids=lambda change: next(iter(change.items()))[0],
)
def test_what_train_py_does_not_write_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save({**STATE, **change}, buffer)
    signed(tmp_path / "c.pt", buffer.getvalue())
    with pytest.raises(ModelError, match=r"c\.pt is not a checkpoint") as caught:
        load(tmp_path / "c.pt")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", [b"PK\x05\x06" + bytes(18), pickle.dumps(STATE["lr"]) + bytes(99)])
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    signed(tmp_path / "c.pt", content)
    with pytest.raises(ModelError, match=r"c\.pt is not a checkpoint") as caught:
        load(tmp_path / "c.pt")
    assert "\n" not in caught.value.message


def test_a_pipe_or_a_folder_in_place_of_a_checkpoint_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "best.pt")
    with pytest.raises(ModelError, match="not a regular file"):
        load(find(tmp_path))
    (tmp_path / "checkpoint-000000001.pt").mkdir()
    with pytest.raises(ModelError, match="not a regular file"):
        Checkpoints(tmp_path).newest()


def test_a_planted_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "best.pt").symlink_to(tmp_path / "victim")
    Checkpoints(tmp_path).save(STATE, best=True)
    assert (tmp_path / "victim").read_bytes() == b"precious" and load(tmp_path / "best.pt")["step"] == 7
