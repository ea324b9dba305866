"""Initial weights, the paper's update rule, LARS and the schedules."""

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from base.errors import ModelError
from model.alexnet import AlexNet
from model.training import recipe


def test_paper_initialisation() -> None:
    net = AlexNet(10)
    recipe.initialise(net, "paper", seed=1)
    layers = _layers(net)
    ones = [bool((m.bias == 1).all()) for m in layers]
    zeros = [bool((m.bias == 0).all()) for m in layers]
    # section 5: 1 in the second, fourth and fifth convolutions and the hidden fully connected layers
    assert ones == [False, True, False, True, True, True, True, False]
    assert zeros == [not one for one in ones]
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.03)
        assert abs(layer.weight.mean().item()) < 3e-4


def test_he_initialisation() -> None:
    net = AlexNet(10, "bn")
    recipe.initialise(net, "he", seed=1)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers[:-1]:
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.03)
    assert layers[-1].weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert not any(m.bias.any() for m in layers if m.bias is not None)


def _layers(net: nn.Module) -> list[Any]:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_cuda_convnet2_initialisation() -> None:
    """initW and initB of the author's layers-imagenet-1gpu.cfg."""
    net = AlexNet(10)
    recipe.initialise(net, "cuda-convnet2", seed=1)
    deviations = [layer.weight.std().item() for layer in _layers(net)]
    assert deviations == pytest.approx([0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], rel=0.03)
    assert [layer.bias.unique().tolist() for layer in _layers(net)] == [[b] for b in (0, 1, 0, 1, 1, 1, 1, 0)]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("cifar-80sec", [1e-4, 0.01, 0.01, 0.1, 0.1]), ("cifar-18pct", [1e-4, 0.01, 0.01, 0.01])],
)
def test_cuda_convnet_initialisation(variant: str, expected: list[float]) -> None:
    """initW of layers-80sec.cfg and layers-18pct.cfg; biases are zero."""
    net = AlexNet(10, variant, image_size=32)
    recipe.initialise(net, "cuda-convnet", seed=1)
    assert [layer.weight.std().item() for layer in _layers(net)] == pytest.approx(expected, rel=0.06)
    assert not any(layer.bias.any() for layer in _layers(net))


def test_torch_initialisation_is_torchs_own() -> None:
    net = AlexNet(10)
    recipe.initialise(net, "torch", seed=3)
    torch.manual_seed(3)
    for layer in _layers(net):
        ours = [p.clone() for p in layer.parameters()]
        layer.reset_parameters()
        assert all(torch.equal(a, b) for a, b in zip(ours, layer.parameters(), strict=True))


@pytest.mark.parametrize("scheme", set(recipe.INITS) - {"cuda-convnet"})
def test_initialisation_depends_on_the_seed_alone(scheme: str) -> None:
    torch.manual_seed(7)
    nets = [AlexNet(10) for _ in range(3)]
    before = torch.get_rng_state()
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        recipe.initialise(net, scheme, seed)
    assert torch.equal(before, torch.get_rng_state())
    a, b, c = ([p.clone() for p in net.parameters()] for net in nets)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])


def test_updates_follow_the_papers_rule_through_changes_of_the_rate() -> None:
    """v <- 0.9 v - 0.0005 e w - e g; w <- w + v (section 5), while e is divided by 10."""
    layer = nn.Linear(4, 3)
    optimizer = recipe.build_optimizer(layer, lr=0.1)
    w = layer.weight.detach().double().clone()
    b = layer.bias.detach().double().clone()
    vw, vb = torch.zeros_like(w), torch.zeros_like(b)
    random = torch.Generator().manual_seed(0)
    for step in range(30):
        e = 0.1 if step < 10 else 0.01 if step < 20 else 0.013
        recipe.set_lr(optimizer, e)
        gw, gb = torch.randn(3, 4, generator=random), torch.randn(3, generator=random)
        layer.weight.grad, layer.bias.grad = gw.clone(), gb.clone()
        optimizer.step()
        vw = 0.9 * vw - 0.0005 * e * w - e * gw.double()
        w = w + vw
        vb = 0.9 * vb - e * gb.double()  # no decay on biases
        b = b + vb
        torch.testing.assert_close(layer.weight.double(), w, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.bias.double(), b, atol=1e-5, rtol=1e-5)


def test_biases_have_their_own_rate_and_layers_their_own_decay() -> None:
    """epsB = 2 epsW and the weight decay of one layer, as in cuda-convnet's files, against NumPy."""
    net = AlexNet(10, "cifar-18pct", image_size=32)
    optimizer = recipe.build_optimizer(net, 0.1, 0.9, 0.004, bias_lr=2, layer_decay={"fc10": 1.0})
    rate = {"weight": 1, "bias": 2}
    decay = {name: 1.0 if "fc10" in name else 0.004 for name, p in net.named_parameters() if p.ndim > 1}
    w = {name: p.detach().double().numpy().copy() for name, p in net.named_parameters()}
    v = {name: np.zeros_like(value) for name, value in w.items()}
    random = np.random.default_rng(0)
    for e in (0.1, 0.1, 0.01, 0.01):
        recipe.set_lr(optimizer, e)
        for name, p in net.named_parameters():
            g = random.standard_normal(p.shape)
            p.grad = torch.tensor(g, dtype=torch.float32).to(memory_format=torch.preserve_format)
            step = e * rate[name.rsplit(".")[-1]]
            v[name] = 0.9 * v[name] - step * (decay.get(name, 0) * w[name] + g)
            w[name] += v[name]
        optimizer.step()
        for name, p in net.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), w[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="no layer fc8 to decay"):
        recipe.build_optimizer(net, layer_decay={"fc8": 1.0})


def test_lars_follows_its_papers_rule_through_changes_of_the_rate_and_a_resumed_run() -> None:
    """Algorithm 1 of arXiv:1708.03888 in NumPy: v <- m v + lr l (g + b w), l = 0.001 |w| / (|g| + b |w|)."""
    layer, decay, momentum = nn.Linear(4, 3), 0.05, 0.9
    optimizer = recipe.build_optimizer(layer, 4.0, momentum, decay, "lars")
    w, bias = (p.detach().double().numpy().copy() for p in (layer.weight, layer.bias))
    vw, vb = np.zeros_like(w), np.zeros_like(bias)
    random = np.random.default_rng(0)
    for step in range(30):
        lr = 4.0 if step < 10 else 40.0 if step < 20 else 13.0
        if step == 15:  # a resumed run
            saved, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(layer)
            layer, optimizer = other, recipe.build_optimizer(other, 4.0, momentum, decay, "lars")
            optimizer.load_state_dict(saved)
        recipe.set_lr(optimizer, lr)
        gw, gb = random.standard_normal((3, 4)), random.standard_normal(3) * 1e-3
        layer.weight.grad, layer.bias.grad = (torch.tensor(g, dtype=torch.float32) for g in (gw, gb))
        optimizer.step()
        norm = np.sqrt((w**2).sum())
        local = 0.001 * norm / (np.sqrt((gw**2).sum()) + decay * norm)
        vw = momentum * vw + lr * local * (gw + decay * w)
        vb = momentum * vb + lr * gb  # biases have neither decay nor an adaptive rate
        w, bias = w - vw, bias - vb
        np.testing.assert_allclose(layer.weight.detach().numpy(), w, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-4, atol=1e-5)


def test_lars_moves_a_layer_of_zeros_and_keeps_one_without_gradient() -> None:
    layer = nn.Linear(2, 2)
    optimizer = recipe.build_optimizer(layer, 0.1, 0.0, 0.0, "lars")
    for weight, gradient, moved in ((0.0, 1.0, -0.1), (1.0, 0.0, 0.0)):
        with torch.no_grad():
            layer.weight.fill_(weight)
        layer.weight.grad, layer.bias.grad = torch.full((2, 2), gradient), torch.zeros(2)
        optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), torch.full((2, 2), weight + moved))


def test_an_overflow_in_the_very_first_step_leaves_no_trace() -> None:
    """The overflow is reported as GradScaler does; the step is skipped, and momentum starts at zero."""
    weight = nn.Linear(64, 64)
    expected = weight.weight.detach().clone()
    torch.full((64, 64), 1e30).clone()  # an uninitialised buffer may contain this
    optimizer = recipe.build_optimizer(weight, lr=0.1, weight_decay=0.0)
    for found, gradient in ((1.0, math.inf), (0.0, 0.0)):
        weight.weight.grad = torch.full((64, 64), gradient)
        weight.bias.grad = torch.full((64,), gradient)
        vars(optimizer).update(grad_scale=torch.tensor(1.0), found_inf=torch.tensor(found))
        optimizer.step()
    assert torch.equal(weight.weight, expected)


def test_plateau_divides_by_ten_when_validation_stops_improving() -> None:
    schedule = recipe.Schedule("plateau", 0.01, epochs=20, steps_per_epoch=10, patience=2)
    rates = []
    for error in [0.9, 0.8, 0.8, 0.85, 0.7, 0.7, 0.7, 0.6]:
        rates.append(schedule.lr(0))
        schedule.validated(error)
    assert rates == pytest.approx([0.01] * 4 + [0.001] * 3 + [0.0001])
    for _ in range(9):  # epochs of a network that only guesses do not count
        schedule.validated(0.9, guessing=True)
    assert schedule.lr(0) == pytest.approx(0.0001)
    other = recipe.Schedule("plateau", 0.01, epochs=20, steps_per_epoch=10, patience=2)
    other.load_state_dict(schedule.state_dict())
    assert other.lr(5) == schedule.lr(5)


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(recipe.SCHEDULES),
    epochs=st.integers(1, 50),
    steps=st.integers(1, 40),
    warmup=st.floats(0, 3),
)
def test_every_schedule_stays_within_zero_and_the_base_rate(
    kind: str, epochs: int, steps: int, warmup: float
) -> None:
    schedule = recipe.Schedule(kind, 0.1, epochs, steps, warmup)
    rates = [schedule.lr(step) for step in range(epochs * steps)]
    assert all(0 < rate <= 0.1 for rate in rates)
    rise = rates[: schedule.warmup]
    assert all(x < y for x, y in pairwise(rise))
    assert all(x >= y for x, y in pairwise(rates[schedule.warmup :]))


def test_cosine_and_step_reach_what_they_say() -> None:
    cosine = recipe.Schedule("cosine", 0.1, 10, 10, warmup_epochs=1)
    assert cosine.lr(0) == pytest.approx(0.01) and cosine.lr(9) == pytest.approx(0.1)
    assert cosine.lr(55) == pytest.approx(0.05) and cosine.lr(99) < 1e-4
    his = recipe.Schedule("step", 0.1, 140, 10, milestones=(120, 130))
    assert [round(math.log10(his.lr(s))) for s in (0, 1199, 1200, 1299, 1300)] == [-1, -1, -2, -2, -3]
    step = recipe.Schedule("step", 0.1, 9, 10)
    assert [round(math.log10(step.lr(s))) for s in (0, 29, 30, 59, 60, 89)] == [-1, -1, -2, -2, -3, -3]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ModelError, match="use one of"):
        recipe.initialise(AlexNet(2), "xavier")
    with pytest.raises(ModelError, match="use one of"):
        recipe.Schedule("linear", 0.1, 1, 1)
    with pytest.raises(ModelError, match="use one of"):
        recipe.build_optimizer(AlexNet(2), kind="adam")
