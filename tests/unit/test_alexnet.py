"""The network against references that use only torch's functions, torchvision, and the paper's numbers."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from base.errors import ModelError
from model.alexnet import AlexNet
from model.dropout import KeyedDropout
from model.lrn import LRN
from tools.bench.reference import import_torchvision


def images(count: int, size: int = 224, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def net() -> AlexNet:
    torch.manual_seed(0)
    return AlexNet().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def reference(w: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Figure 2 of the paper; returns (fc7, fc8). torch's LRN divides alpha by the window's size of 5."""

    def convolve(layer: int, x: torch.Tensor, **how: int) -> torch.Tensor:
        return F.relu(F.conv2d(x, w[f"features.conv{layer}.weight"], w[f"features.conv{layer}.bias"], **how))

    def shrink(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 3, stride=2)

    def normalise(x: torch.Tensor) -> torch.Tensor:
        return F.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)

    def connect(layer: int, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w[f"classifier.fc{layer}.weight"], w[f"classifier.fc{layer}.bias"])

    x = shrink(normalise(convolve(1, x, stride=4, padding=2)))
    x = shrink(normalise(convolve(2, x, padding=2, groups=2)))
    x = convolve(3, x, padding=1)
    x = convolve(4, x, padding=1, groups=2)
    x = shrink(convolve(5, x, padding=1, groups=2))
    fc7 = F.relu(connect(7, F.relu(connect(6, x.flatten(1)))))
    return fc7, connect(8, fc7)


def test_parameters_are_as_many_as_the_papers(net: AlexNet) -> None:
    count = {
        name: sum(p.numel() for p in layer.parameters()) for name, layer in net.features.named_children()
    }
    assert count["conv1"] == 96 * (11 * 11 * 3 + 1)
    assert count["conv2"] == 256 * (5 * 5 * 48 + 1)
    assert count["conv3"] == 384 * (3 * 3 * 256 + 1)
    assert count["conv4"] == 384 * (3 * 3 * 192 + 1)
    assert count["conv5"] == 256 * (3 * 3 * 192 + 1)
    assert sum(p.numel() for p in net.parameters()) == 60_965_224


def test_forward_is_the_papers_network(net: AlexNet) -> None:
    x = images(2) * 50  # large enough for normalisation to matter
    fc7, logits = reference(net.state_dict(), x)
    torch.testing.assert_close(net(x), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.forward_features(x), fc7, rtol=1e-4, atol=1e-4)
    assert net(x).shape == (2, 1000) and fc7.shape == (2, 4096)


def test_owt_is_torchvisions() -> None:
    theirs = import_torchvision().models.alexnet(weights=None, num_classes=10).eval()
    ours = AlexNet(10, variant="owt").eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        for size in (224, 256):  # both average the last maps to 6x6
            torch.testing.assert_close(ours(images(2, size)), theirs(images(2, size)))
    theirs.load_state_dict(AlexNet(10, variant="owt").state_dict(), strict=True)


def test_bn_normalises_batches_only() -> None:
    net = AlexNet(7, variant="bn")
    kinds = [type(layer) for layer in net.features]
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == 5 and "LRN" not in str(net)
    assert all(kinds[i + 1] is nn.BatchNorm2d for i, kind in enumerate(kinds) if kind is nn.Conv2d)
    assert all(layer.bias is None and layer.groups == 1 for layer in net.features if type(layer) is nn.Conv2d)
    assert net(images(2)).shape == (2, 7)


@pytest.mark.parametrize("variant", ["paper", "owt", "bn"])
def test_every_map_stays_channels_last(variant: str) -> None:
    net = AlexNet(3, variant=variant).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    net.set_position(1, 0)
    maps: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []

    def record(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        maps.append(output)
        output.register_hook(gradients.append)

    for layer in net.features:
        layer.register_forward_hook(record)
    with torch.autocast("cpu", torch.bfloat16):
        net(images(2)).float().sum().backward()
    assert len(maps) == len(gradients) == len(net.features)
    gradients.pop(0)  # the 6x6 maps of pool5 are flattened in the order that torchvision's fc6 expects
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps + gradients)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"groups": 1}, 256 * 25 * 48 + 384 * 9 * 192 + 256 * 9 * 192),
        ({"lrn": False}, 0),
        ({"activation": "tanh"}, 0),
        ({"activation": "sigmoid"}, 0),
        ({"pool": (2, 2)}, 0),
        ({"drop_layers": ("conv3",)}, -384 * (3 * 3 * 256 + 1) - 384 * 3 * 3 * (192 - 128)),
        (
            {"drop_layers": ("conv3", "conv4")},
            -384 * (9 * 256 + 1) - 384 * (9 * 192 + 1) - 256 * 9 * (192 - 128),
        ),
    ],
)
def test_switches(options: dict[str, Any], difference: int) -> None:
    net = AlexNet(**options)
    assert sum(p.numel() for p in net.parameters()) == 60_965_224 + difference
    assert net(images(1)).shape == (1, 1000)
    kinds = str(net)
    assert ("LRN" in kinds) == options.get("lrn", True)
    assert ("relu=True" in kinds) == (options.get("lrn", True) and "activation" not in options)
    assert {"relu": "ReLU", "tanh": "Tanh", "sigmoid": "Sigmoid"}[options.get("activation", "relu")] in kinds


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lrn": False},
        {"activation": "tanh"},
        {"variant": "bn"},
        {"variant": "owt"},
        {"variant": "cifar-80sec"},
        {"variant": "cifar-18pct"},
    ],
)
def test_layers_computed_together_or_in_another_order_give_the_papers_order(options: dict[str, Any]) -> None:
    """Logits and gradients equal bit for bit those of separate layers: convolution, activation, LRN, pooling."""
    torch.manual_seed(0)
    net = AlexNet(5, image_size=96, **options).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.set_position(1, 0)
    x, plain, layers = images(2, 96) * 50, copy.deepcopy(net), []
    activation = nn.Tanh() if options.get("activation") == "tanh" else nn.ReLU()
    for layer in plain.features:
        if not isinstance(layer, type(activation)):
            layers.append(layer)
        if isinstance(layer, nn.BatchNorm2d if options.get("variant") == "bn" else nn.Conv2d):
            layers.append(activation)
        if isinstance(layer, LRN) and layer.pool:
            layers.append(nn.MaxPool2d(*layer.pool))
            layer.relu, layer.pool = False, None
    plain.features = nn.Sequential(*layers)
    logits, expected = net(x), plain(x)
    assert torch.equal(logits, expected)
    for out in (logits, expected):
        F.cross_entropy(out, torch.tensor([0, 1])).backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert ours.grad.abs().max() > 0 and torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(("size", "stride"), [(63, 4), (227, 4), (32, 1), (28, 1), (24, 1)])
@pytest.mark.parametrize("variant", ["paper", "owt", "bn"])
def test_other_image_sizes(variant: str, size: int, stride: int) -> None:
    net = AlexNet(10, variant=variant, image_size=size, stride=stride).eval()
    assert net(images(2, size)).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"image_size": 62}, "images of 62 pixels are too small .* use at least 63 pixels"),
        ({"image_size": 32}, "images of 32 pixels are too small"),
        ({"variant": "vgg"}, "no variant 'vgg': choose one of paper, owt, bn, cifar-80sec, cifar-18pct"),
        ({"activation": "gelu"}, "choose one of relu, tanh, sigmoid"),
        ({"groups": 3}, "groups is 3"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"drop_layers": ("conv1", "conv3")}, "cannot omit conv1: choose from conv2"),
        ({"variant": "cifar-18pct", "groups": 2}, "variant cifar-18pct has no groups"),
        ({"num_classes": 0}, "num_classes 0"),
        ({"pool": (3, 0)}, "at least 1"),
    ],
)
def test_unusable_options_are_refused_in_one_line(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint) as error:
        AlexNet(**options)
    assert "\n" not in error.value.message


def test_images_of_another_size_are_refused(net: AlexNet) -> None:
    with pytest.raises(ModelError, match="takes images of 224 pixels, not 200x224"):
        net(torch.zeros(1, 3, 200, 224))


# --- dropout -----------------------------------------------------------------------------------------------

KEY = 0x1234_5678_9ABC_DEF


def mask(
    key: int = KEY, first_row: int = 0, rows: int = 128, units: int = 4096, p: float = 0.5, salt: int = 6
) -> torch.Tensor:
    layer = KeyedDropout(p, salt)
    layer.set_position(key, first_row)
    return layer.keep(rows, units)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_rate(p: float) -> None:
    kept = mask(p=p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / kept.numel() ** 0.5
    # also for each row and each unit, within five standard deviations
    assert (kept.mean(1) - (1 - p)).abs().max() < 5 * deviation / 4096**0.5
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * deviation / 128**0.5


@pytest.mark.parametrize(
    "other",
    [
        {"key": KEY + 1},
        {"key": KEY + 2**32},
        {"key": KEY ^ 2**62},
        {"salt": 7},
        {"first_row": 128},
        {"key": KEY + 1, "salt": 5},
    ],
)
def test_dropout_masks_of_other_steps_layers_and_rows_are_independent(other: dict[str, int]) -> None:
    a, b = mask(), mask(**other)
    assert abs((a == b).double().mean() - 0.5) < 5 * 0.5 / a.numel() ** 0.5


def test_dropout_rows_and_units_are_independent() -> None:
    kept = mask(rows=256, units=256).double() * 2 - 1
    for products in (kept @ kept.T, kept.T @ kept):
        # sums of 256 signs have deviation 16; the largest of 32,640 pairs is below 5.5 deviations
        assert (products - torch.diag(products.diag())).abs().max() < 5.5 * 16
    # neighbours, for which a weak hash is correlated first
    for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
        assert (a * b).mean().abs() < 5 / a.numel() ** 0.5


@pytest.mark.parametrize("parts", [2, 4])
def test_dropout_does_not_depend_on_how_the_batch_is_split(parts: int) -> None:
    whole = mask(first_row=256, rows=64)
    rows = 64 // parts
    split = [mask(first_row=256 + i * rows, rows=rows) for i in range(parts)]
    assert torch.equal(whole, torch.cat(split))


def test_dropout_mask_is_pinned() -> None:
    """Masks must not change between versions, because runs could not be resumed bit for bit."""
    assert ["".join(map(str, row)) for row in mask(rows=2, units=32).int().tolist()] == [
        "00110001100111000001010000000111",
        "11000010011111011010101110111110",
    ]


def test_dropout_of_the_network_over_split_batches() -> None:
    torch.manual_seed(0)
    net = AlexNet(10, image_size=63).train()
    x = images(8, 63)

    def run(parts: int) -> torch.Tensor:
        outputs = []
        for i, part in enumerate(x.chunk(parts)):
            net.set_position(KEY, 40 + i * len(part))
            outputs.append(net(part))
        return torch.cat(outputs)

    with torch.no_grad():
        whole = run(1)
        torch.testing.assert_close(run(2), whole)
        torch.testing.assert_close(run(4), whole)
        net.set_position(KEY + 1, 40)
        assert not torch.allclose(net(x), whole)


def test_dropout_scales_in_training_and_does_nothing_in_evaluation() -> None:
    layer = KeyedDropout(0.25, salt=6)
    layer.set_position(KEY, 0)
    x = torch.rand(8, 40, requires_grad=True) + 0.5
    x.retain_grad()
    y = layer(x)
    kept = layer.keep(8, 40)
    torch.testing.assert_close(y, x * kept / 0.75)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.75)
    assert layer.eval()(x) is x
    assert KeyedDropout(0.0, salt=6)(x) is x
    assert layer.train()(x.bfloat16()).dtype == torch.bfloat16
    assert not layer.state_dict()


def test_dropout_without_a_position_is_torchs() -> None:
    layer, x = KeyedDropout(0.5, salt=6), torch.ones(4, 100)
    torch.manual_seed(3)
    ours = layer(x)
    torch.manual_seed(3)
    assert torch.equal(ours, F.dropout(x))


@pytest.mark.skipif(
    torch.__version__ < "2.10", reason="Inductor of torch 2.9 multiplies torch.arange without wrapping around"
)
def test_dropout_under_torch_compile_is_the_same_and_compiled_once() -> None:
    layer = KeyedDropout(0.5, salt=6)
    layer.set_position(KEY, 0)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.rand(16, 1000)
    with torch.compiler.set_stance("default"):
        assert torch.equal(compiled(x), layer(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        for key, row in ((KEY + 1, 0), (2**63 - 1, 16), (0, 1_000_000)):
            layer.set_position(key, row)
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_dropout_is_the_same_on_the_gpu() -> None:
    layer = KeyedDropout(0.5, salt=6).cuda()
    layer.set_position(KEY, 3)
    assert torch.equal(layer.keep(64, 4096).cpu(), mask(first_row=3, rows=64))


def test_a_pool_larger_than_all_images_is_refused_at_once() -> None:
    """A malicious checkpoint may have such a pool; no image size is large enough."""
    with pytest.raises(ModelError, match="use a smaller stride"):
        AlexNet(2, pool=(3, 10**9))
