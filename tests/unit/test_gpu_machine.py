"""A driver, a card or a number of ranks that torch cannot use is reported in one line before anything starts."""

import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from base.errors import ModelError
from model.parallel import ranks
from model.parallel.ranks import count_gpus
from tools.evaluate import main as evaluate
from tools.lib.runs import one_device

TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 12080). Please update your "
    "GPU driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two working sm_89 cards."""
    (tmp_path / "version").write_text("570.86.15\n")
    monkeypatch.setattr(ranks, "DRIVER_VERSION", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ARCHITECTURES)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def refusal(wanted: int | None) -> str:
    with pytest.raises(ModelError) as error:
        count_gpus(wanted)
    assert "\n" not in error.value.message
    return error.value.message


def test_all_the_wanted_or_none() -> None:
    assert [count_gpus(None), count_gpus(1), count_gpus(0)] == [2, 1, 0]
    assert refusal(3) == "--gpus 3 asked for, 2 found: use --gpus 2"


def test_without_gpus_nothing_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert count_gpus(None) == 0
    assert refusal(1) == "--gpus 1 asked for, 0 found: use --gpus 0 (the CPU)"


def test_a_driver_that_is_too_old(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> bool:
        warnings.warn(TOO_OLD, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    message = refusal(None)
    for part in (
        torch.__version__,
        "570.86.15",
        "too old (found version 12080)",
        "580",
        "constraints-cuda12.txt",
    ):
        assert part in message
    assert count_gpus(0) == 0  # the CPU needs no driver
    with pytest.raises(ModelError, match="too old"):
        one_device(None)
    evaluation = CliRunner().invoke(evaluate, [str(dataset), "--data", str(dataset)])
    assert evaluation.exit_code == 1 and "580" in evaluation.output and "Traceback" not in evaluation.output


@pytest.mark.parametrize(
    ("capability", "built", "fits"),
    [
        ((8, 9), ARCHITECTURES, True),  # runs the code of sm_86
        ((7, 0), ARCHITECTURES, False),
        ((12, 1), ARCHITECTURES, True),
        ((13, 0), ARCHITECTURES, False),
        ((13, 0), [*ARCHITECTURES, "compute_120"], True),
        ((9, 0), ["sm_80", "sm_90a"], True),
    ],
)
def test_a_card_that_torch_has_no_code_for(
    capability: tuple[int, int], built: list[str], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability if index else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    assert count_gpus(1) == 1
    if fits:
        assert count_gpus(2) == 2
    else:
        message = refusal(2)
        assert "Card 1" in message and "sm_{}{}".format(*capability) in message and "sm_75, sm_80" in message


def test_more_ranks_than_gpus_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    message = refusal(None)
    assert "starts 4 ranks on this machine, which has 2 GPUs: use --nproc-per-node 2" in message
    assert count_gpus(0) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert count_gpus(None) == count_gpus(2) == 1  # the number of ranks; another card may be unfit
