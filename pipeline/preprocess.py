"""Turns stored records into the network's input without DALI: decoding, centre crop, mean, colour basis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from base.errors import DataError
from pipeline.shards import MAX_SIZE, Manifest, ShardReader

MEANS = ("pixel", "channel", "imagenet", "none")
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in 0..1, as used by torchvision's networks
_DECODE = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION


@dataclass(frozen=True)
class Preprocess:
    """Parameters that turn a stored record into the network's input; saved in every checkpoint.

    Args:
        size: height and width of the stored images in pixels.
        crop: height and width of the crops in pixels.
        mean_mode: one of MEANS.
        mean: (size, size, 3) float32 RGB, levels 0..255, subtracted from the stored image; the same at all
            positions for a mean per channel, and zero for "none".
        color_basis: (3, 3) float32 with columns 255 * p_i * lambda_i of the training set (paper 4.1; eigenvalues
            for pixels scaled to 0..1).
    """

    size: int
    crop: int
    mean_mode: str
    mean: np.ndarray
    color_basis: np.ndarray

    @classmethod
    def load(cls, train_dir: Path, crop: int = 224, mean_mode: str = "pixel") -> Preprocess:
        """Load from the statistics of a training split. Raises DataError if they are missing or damaged."""
        manifest = Manifest.load(train_dir)
        if mean_mode == "pixel":
            mean = manifest.load_mean(train_dir)
        elif mean_mode in MEANS:
            level = {"channel": manifest.channel_mean, "imagenet": 255 * np.array(IMAGENET_MEAN)}
            mean = np.tile(
                np.array(level.get(mean_mode, (0, 0, 0)), np.float32), (manifest.size, manifest.size, 1)
            )
        else:
            raise DataError(f"mean is {mean_mode!r}: use one of {', '.join(MEANS)}")
        basis = 255 * np.array(manifest.pca_eigenvectors) * np.array(manifest.pca_eigenvalues)
        return cls(manifest.size, crop, mean_mode, mean, basis.astype(np.float32))

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors that torch.load(weights_only=True) accepts."""
        state: dict[str, Any] = {"size": self.size, "crop": self.crop, "mean_mode": self.mean_mode}
        return state | {"mean": torch.tensor(self.mean), "color_basis": torch.tensor(self.color_basis)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Preprocess:
        """Load from a checkpoint's `preprocess`. Raises ValueError for anything that `state_dict` cannot return."""
        size, crop, mode = (state.get(name) for name in ("size", "crop", "mean_mode"))
        if not (isinstance(size, int) and isinstance(crop, int) and 0 < crop <= size <= MAX_SIZE):
            raise ValueError(f"its crop is {crop!r:.20} of {size!r:.20} pixels")
        if mode not in MEANS:
            raise ValueError(f"its mean is {mode!r:.20}")
        arrays = {}
        for name, shape in (("mean", (size, size, 3)), ("color_basis", (3, 3))):
            value = state.get(name)
            if not (torch.is_tensor(value) and value.dtype == torch.float32 and value.shape == shape):
                raise ValueError(f"its {name} is not float32 of {shape}")
            if not value.isfinite().all():
                raise ValueError(f"its {name} is not finite")
            arrays[name] = value.numpy()
        return cls(size, crop, mode, **arrays)


def decode(data: np.ndarray, size: int) -> np.ndarray | None:
    """Decode a record's JPEG or PNG bytes (1-d uint8) to (size, size, 3) uint8 RGB; None if that fails."""
    try:
        image = cv2.imdecode(data, _DECODE)
    except cv2.error:
        return None
    if image is None or image.shape != (size, size, 3):
        return None
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


def network_input(rgb: np.ndarray, preprocess: Preprocess) -> Tensor:
    """Turn stored images into the network's input for validation: centre crop, minus the mean.

    Args:
        rgb: (N, size, size, 3) uint8.
        preprocess: the parameters.

    Returns:
        (N, 3, crop, crop) float32 channels-last, bit-identical to the loader's output for the same pixels.
    """
    start = (preprocess.size - preprocess.crop) // 2
    window = slice(start, start + preprocess.crop)
    levels = rgb[:, window, window].astype(np.float32) - preprocess.mean[window, window]
    return torch.from_numpy(levels).movedim(-1, 1)


def stored_image(reader: ShardReader, index: int) -> np.ndarray:
    """Read the pixels of a record: (size, size, 3) uint8 RGB. Raises DataError if it does not decode."""
    data, _ = reader.read(index)
    image = data if data.ndim == 3 else decode(data, reader.manifest.size)
    if image is None:
        shard, key = reader.locate(index)
        raise DataError(
            f"shard {shard}, key {key.decode()} does not decode: check with "
            f"`python tools/verify_lmdb.py {reader.split_dir}`"
        )
    return image
