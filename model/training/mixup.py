"""Mixup (Zhang et al., arXiv:1710.09412) and label smoothing (Szegedy et al., arXiv:1512.00567)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mix(images: Tensor, lam: Tensor) -> Tensor:
    """Blend each image with its partner: lam * image + (1 - lam) * partner.

    Args:
        images: (N, 3, H, W), N even. Rows 0 and 1, 2 and 3, ... are partners.
        lam: (N,) in 0..1.

    Returns:
        A new tensor of the same dtype and memory format.
    """
    return torch.lerp(
        images[partners(len(images), images.device)], images, lam.to(images)[:, None, None, None]
    )


def cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, lam: Tensor | None = None
) -> Tensor:
    """Mean cross entropy with the labels, or after `mix` with the labels of both partners.

    Args:
        logits: (N, classes).
        labels: (N,) int64.
        smoothing: label smoothing, the share of the target that is spread evenly over all classes.
        lam: (N,) as given to `mix`; None without mixup.
    """
    if lam is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    partner_labels = labels[partners(len(labels), labels.device)]
    partner_loss = F.cross_entropy(logits, partner_labels, label_smoothing=smoothing, reduction="none")
    return torch.lerp(partner_loss, loss, lam.to(loss)).mean()


def partners(n: int, device: torch.device) -> Tensor:
    """Row numbers 1, 0, 3, 2, ...: the partner of each of n rows."""
    return torch.arange(n, device=device) ^ 1
