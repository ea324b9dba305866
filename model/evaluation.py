"""Loss, top-1 and top-5 over a whole set, every image counted once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from model.parallel import Ranks


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    ranks: Ranks,
    amp: torch.dtype | None = None,
) -> dict[str, float]:
    """Mean cross entropy, top-1 and top-5 accuracy in 0..1, and the count, over all ranks' batches.

    Images are (N, 3, H, W), or (N, K, 3, H, W): then the softmax is averaged over the K crops (paper 4.1).
    Counts are summed as integers, so the accuracies do not depend on ranks or batch size.
    """
    was_training = model.training
    model.eval()
    sums, count = torch.zeros(3, dtype=torch.float64, device=ranks.device), 0
    for images, labels in batches:
        crops = images.shape[1] if images.ndim == 5 else 1
        with torch.autocast(ranks.device.type, amp or torch.bfloat16, enabled=amp is not None):
            logits = model(images.flatten(0, 1) if crops > 1 else images).float()
        logp = F.log_softmax(logits, dim=1)
        if crops > 1:
            logp = logp.unflatten(0, (-1, crops)).exp().mean(1).clamp_min(1e-45).log()
        hits = logp.topk(min(5, logp.shape[1])).indices == labels[:, None]
        sums += torch.stack(
            [
                F.nll_loss(logp, labels, reduction="sum").double(),
                hits[:, 0].sum().double(),
                hits.any(1).sum().double(),
            ]
        )
        count += len(labels)
    model.train(was_training)
    loss, top1, top5, total = ranks.sum(torch.cat([sums, sums.new_tensor([count])])).tolist()
    return {"loss": loss / total, "top1": top1 / total, "top5": top5 / total, "count": int(total)}
