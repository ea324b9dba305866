"""Loss, top-1 and top-5 over a whole set, every image counted once."""

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
    """Float32 convolutions and matrix products as such: GPUs would round their inputs to TF32's 10 bits."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def log_probabilities(network: nn.Module, images: Tensor, amp: torch.dtype | None = None) -> Tensor:
    """Log of the softmax, (N, classes) float32, of images (N, 3, H, W); `amp` is the autocast type, None float32.

    Of (N, K, 3, H, W): log of the softmax averaged over K crops (paper 4.1). Logs keep what would underflow.
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
    """Mean cross entropy, top-1 and top-5 accuracy in 0..1, and the count, over all ranks' batches.

    Batches are images as `log_probabilities` takes them and int64 labels (N,). Hits are counted, so the
    accuracies do not depend on ranks or batch size.
    """
    was_training = model.training
    model.eval()
    sums, count = torch.zeros(3, dtype=torch.float64, device=ranks.device), 0
    for images, labels in batches:
        logp = log_probabilities(model, images, amp)
        hits = logp.topk(min(5, logp.shape[1])).indices == labels[:, None]
        loss = F.nll_loss(logp, labels, reduction="sum")
        sums += torch.stack([loss.double(), hits[:, 0].sum().double(), hits.any(1).sum().double()])
        count += len(labels)
    model.train(was_training)
    loss, top1, top5, total = ranks.sum(torch.cat([sums, sums.new_tensor([count])])).tolist()
    return {"loss": loss / total, "top1": top1 / total, "top5": top5 / total, "count": int(total)}
