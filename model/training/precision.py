"""Mixed precision: which type of number a step is computed in, and when float16 has failed."""

from __future__ import annotations

from pathlib import Path

import torch

from base.errors import ModelError


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The autocast type: bfloat16 where the device computes it, float16 on older GPUs, None on older CPUs."""
    if choice == "auto":
        if device.type == "cuda":
            choice = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            choice = "bf16" if has_bf16 else "off"
    if choice == "fp16" and device.type == "cpu":
        raise ModelError("--amp fp16 needs a GPU: use --amp bf16 or --amp off on the CPU")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]


def input_dtype(amp: torch.dtype | None, device: torch.device, mixup: float = 0) -> torch.dtype:
    """The type of the loader's images: on a GPU float16 (DALI has no bfloat16), on the CPU that of autocast."""
    if amp is None:
        return torch.float32
    if device.type == "cuda":
        return torch.float16
    return torch.float32 if mixup else amp  # mixed images are rounded once, after the mixing


def check_scale(scaler: torch.amp.GradScaler, out: Path) -> None:
    """Float16 skips a step whose gradients overflow and halves the loss scale; raises ModelError below 1.

    From the first scale, 65,536, that is 17 steps skipped in a row (seen at the next log line).
    """
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise diverged("float16 gradients overflow at any loss scale", out)


def diverged(what: str, out: Path) -> ModelError:
    return ModelError(
        f"{what}: training has diverged; the checkpoints in {out} are from before: "
        "resume with --amp off, or begin again with a lower --lr"
    )
