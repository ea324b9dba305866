"""What current recipes add to the paper's: mixup, label smoothing, averaged weights. All off by default."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mix(images: Tensor, keep: Tensor) -> Tensor:
    """Each image blended with its neighbour (rows 0 and 1, 2 and 3, ...): mixup (Zhang et al., arXiv:1710.09412).

    images: (N, 3, H, W), N even; keep: (N,) in 0..1, how much of itself each image keeps. Returns a new tensor
    of the same dtype and memory format.
    """
    return torch.lerp(
        images[neighbours(len(images), images.device)], images, keep.to(images)[:, None, None, None]
    )


def cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, keep: Tensor | None = None
) -> Tensor:
    """Mean cross entropy of logits (N, classes) with labels (N,); after `mix`, with both images' labels.

    `smoothing` gives that share of the target to all classes alike (Szegedy et al., arXiv:1512.00567).
    """
    if keep is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    own = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    other = labels[neighbours(len(labels), labels.device)]
    others = F.cross_entropy(logits, other, label_smoothing=smoothing, reduction="none")
    return torch.lerp(others, own, keep.to(own)).mean()


def neighbours(n: int, device: torch.device) -> Tensor:
    """1, 0, 3, 2, ...: whom each of n rows is mixed with."""
    return torch.arange(n, device=device) ^ 1
