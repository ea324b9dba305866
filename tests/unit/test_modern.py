"""Mixup, label smoothing and averaged weights against their formulas in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from model.training.ema import Ema
from model.training.mixup import cross_entropy, mix
from pipeline.load.plan import Plan


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_is_the_cross_entropy_with_the_soft_target(smoothing: float, mixed: bool) -> None:
    """-sum of target * log p; the target is the mixture of both one-hot labels, then smoothed."""
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(6, 4)), np.array([0, 1, 2, 3, 3, 3])
    lam = random.uniform(size=6)
    target = np.eye(4)[labels]
    if mixed:
        partner = np.eye(4)[labels[[1, 0, 3, 2, 5, 4]]]
        target = lam[:, None] * target + (1 - lam[:, None]) * partner
    target = (1 - smoothing) * target + smoothing / 4
    expected = -(target * log_softmax(logits)).sum(1).mean()
    given = torch.tensor(lam) if mixed else None
    found = cross_entropy(torch.tensor(logits), torch.tensor(labels), smoothing, given)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_mixup_blends_partners() -> None:
    images = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    lam = torch.tensor([1.0, 0.25, 0.5, 0.0])
    x = images.numpy()
    expected = np.stack([x[0], 0.25 * x[1] + 0.75 * x[0], 0.5 * x[2] + 0.5 * x[3], x[2]])
    before = images.clone()
    mixed = mix(images, lam)
    np.testing.assert_allclose(mixed.numpy(), expected, atol=1e-6)
    assert torch.equal(images, before) and mixed.is_contiguous(memory_format=torch.channels_last)


def test_lam_is_a_pure_function_of_their_place_and_follow_beta() -> None:
    plan, again = Plan(4096, 4096, seed=5), Plan(5000, 4096, seed=5)
    a = plan.mixup(3, 0, 0.2)
    assert a.dtype == np.float32 and a.shape == (4096,) and a.min() >= 0 and a.max() <= 1
    assert np.array_equal(a, again.mixup(3, 0, 0.2))
    assert not np.array_equal(a, plan.mixup(4, 0, 0.2))
    assert not np.array_equal(a, Plan(4096, 4096, seed=6).mixup(3, 0, 0.2))
    # Beta(alpha, alpha): mean 1/2, variance 1 / (4 (2 alpha + 1))
    assert a.mean() == pytest.approx(0.5, abs=0.03)
    assert a.var() == pytest.approx(1 / (4 * 1.4), rel=0.05)
    # other random streams do not depend on it
    views = plan.views(3, 0)
    assert all(np.array_equal(x, y) for x, y in zip(views, Plan(4096, 4096, seed=5).views(3, 0), strict=True))


def test_averaged_weights_follow_the_formula_and_go_on_from_a_checkpoint() -> None:
    norm = nn.BatchNorm1d(2)
    assert norm.running_mean is not None and norm.num_batches_tracked is not None
    network = nn.Sequential(nn.Linear(3, 2), norm)
    ema, decay = Ema(network, 0.5), 0.5
    expected: dict[str, np.ndarray] = {}
    for step in range(6):
        with torch.no_grad():
            for tensor in (*network.parameters(), norm.running_mean):
                tensor.normal_(generator=torch.Generator().manual_seed(step))
        norm.num_batches_tracked.fill_(step + 1)
        ema.update(network)
        new = {k: v.double().numpy() for k, v in network.state_dict().items()}
        rate = min(decay, (1 + step) / (10 + step)) if step else 0
        expected = {k: rate * expected[k] + (1 - rate) * new[k] if expected else new[k] for k in new}
        if step == 2:  # saved and loaded in between
            saved = ema.state_dict()
            ema = Ema(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), 0.5)
            ema.load_state_dict(saved)
    averaged = ema.network.state_dict()
    assert int(averaged.pop("1.num_batches_tracked")) == 6  # counts are not averaged
    for key, value in averaged.items():
        np.testing.assert_allclose(value.numpy(), expected[key], rtol=1e-5, atol=1e-7)
