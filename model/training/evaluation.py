"""Loss, top-1 and top-5 accuracy over a whole data set; every image counts once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.parallel.ranks import Ranks


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute convolutions and matrix products in float32, without rounding inputs to TF32's 10 bits on GPUs."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def log_probabilities(network: nn.Module, images: Tensor, amp: torch.dtype | None = None) -> Tensor:
    """Log of the softmax, which unlike the softmax does not underflow.

    Args:
        network: in evaluation mode.
        images: (N, 3, H, W); or (N, K, 3, H, W) to average the softmax over K crops (paper, section 4.1).
        amp: the autocast type; None computes in float32.

    Returns:
        (N, classes) float32.
    """
    precision = torch.autocast(images.device.type, amp) if amp else full_float32()
    with precision:
        logits = network(images.flatten(0, 1) if images.ndim == 5 else images).float()
    logp = F.log_softmax(logits, dim=1)
    if images.ndim == 5:
        crops = images.shape[1]
        logp = logp.unflatten(0, (-1, crops)).logsumexp(1) - math.log(crops)
    return logp


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    ranks: Ranks,
    amp: torch.dtype | None = None,
) -> dict[str, float]:
    """Mean cross entropy, top-1 and top-5 accuracy in 0..1, and the number of images, over all ranks.

    Args:
        model: returned to its mode (training or evaluation) at the end.
        batches: images as `log_probabilities` takes them, and int64 labels (N,).
        ranks: this process's rank.
        amp: the autocast type; None computes in float32.
    """
    was_training = model.training
    model.eval()
    sums, count = torch.zeros(3, dtype=torch.float64, device=ranks.device), 0
    for images, labels in batches:
        logp = log_probabilities(model, images, amp)
        correct = logp.topk(min(5, logp.shape[1])).indices == labels[:, None]
        loss = F.nll_loss(logp, labels, reduction="sum")
        sums += torch.stack([loss.double(), correct[:, 0].sum().double(), correct.any(1).sum().double()])
        count += len(labels)
    model.train(was_training)
    loss, top1, top5, total = ranks.sum(torch.cat([sums, sums.new_tensor([count])])).tolist()
    return {"loss": loss / total, "top1": top1 / total, "top5": top5 / total, "count": int(total)}
