"""The training step, which train.py runs and tools/benchmark.py times."""

from __future__ import annotations

import torch
from torch import Tensor

from model.parallel.ranks import reduces
from model.training import recipe
from model.training.mixup import cross_entropy, mix
from model.training.state import TrainState


def train_step(state: TrainState, images: Tensor, labels: Tensor) -> None:
    """Forward pass, backward pass and update for one global batch; does not wait for the device.

    Adds to `state.loss_sum`, `state.label_counts`, `state.step` and, with --train-error, `state.correct`.

    Args:
        state: after `TrainState.start`.
        images: (N, 3, crop, crop) channels-last: this rank's part of the batch, or all of it with --layout towers.
        labels: (N,) int64.
    """
    config, layout, device = state.config, state.layout, state.ranks.device.type
    epoch, step_in_epoch = divmod(state.step, state.plan.steps_per_epoch)
    dropout_key = state.plan.dropout_key(epoch, step_in_epoch)
    recipe.set_lr(state.optimizer, state.schedule.lr(state.step))
    state.optimizer.zero_grad(set_to_none=True)
    lam = None
    if config.mixup:
        local = slice(layout.first_row, layout.first_row + layout.batch)
        lam = torch.from_numpy(state.plan.mixup(epoch, step_in_epoch, config.mixup)[local])
        if state.ranks.gpu:  # pinned memory is copied without waiting for earlier steps
            lam = lam.pin_memory().to(state.ranks.device, non_blocking=True)
        images = mix(images, lam)
    part = layout.batch // config.accumulate
    for first in range(0, layout.batch, part):
        rows = slice(first, first + part)
        state.network.set_position(dropout_key, layout.first_row + first)
        with reduces(state.forward, last=rows.stop == layout.batch):
            with torch.autocast(device, state.amp or torch.bfloat16, enabled=state.amp is not None):
                logits = state.forward(images[rows]).float()
                part_lam = None if lam is None else lam[rows]
                loss = (
                    cross_entropy(logits, labels[rows], config.label_smoothing, part_lam) / config.accumulate
                )
            state.scaler.scale(loss).backward()
        state.loss_sum += loss.detach()
        if config.train_error:
            state.correct += (logits.detach().argmax(1) == labels[rows]).sum()
    state.label_counts.index_add_(0, labels, torch.ones_like(labels))
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema:
        state.ema.update(state.network)
    state.step += 1
