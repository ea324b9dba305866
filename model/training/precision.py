"""Mixed precision: the number formats of a step, and when float16 has failed."""

from __future__ import annotations

from pathlib import Path

import torch

from base.errors import ModelError


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for --amp; None is float32.

    "auto" is bfloat16 if the device supports it, else float16 on GPUs and float32 on CPUs.
    """
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
    """The type of the loader's images: that of autocast, but float16 on GPUs because DALI has no bfloat16."""
    if amp is None:
        return torch.float32
    if device.type == "cuda":
        return torch.float16
    return torch.float32 if mixup else amp  # with mixup, images are rounded once, after mixing


def check_scale(scaler: torch.amp.GradScaler, out: Path) -> None:
    """Raises ModelError if the loss scale of float16 has fallen below 1.

    Each step whose gradients overflow is skipped and halves the scale, which starts at 65,536: this takes 17
    skipped steps in a row.
    """
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise diverged("float16 gradients overflow at any loss scale", out)


def diverged(what: str, out: Path) -> ModelError:
    """The error for a training that has diverged."""
    return ModelError(
        f"{what}: training has diverged; resume from the last checkpoint in {out} with --amp off, "
        "or start again with a lower --lr"
    )
