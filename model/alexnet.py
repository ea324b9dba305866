"""AlexNet and its variants (Krizhevsky, Sutskever, Hinton, NIPS 2012, section 3 and figure 2).

    paper   the network of the paper: local response normalisation, conv2, conv4 and conv5 in two groups
    owt     torchvision's `alexnet` (the single-column network of "One weird trick", 2014), state dicts included
    bn      the paper's widths in one column, batch normalisation after each convolution in place of LRN
    cifar   a four-layer network for 32x32 images, as in figure 1

Images go in as (N, 3, image_size, image_size) floating point, logits come out as (N, num_classes). All layers
keep the channels-last memory format, which is the fast one on CPUs and GPUs alike.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection
from itertools import count
from typing import Any, NamedTuple

from torch import Tensor, nn

from base.errors import ModelError
from model.dropout import KeyedDropout
from model.lrn import LRN


class Variant(NamedTuple):
    """What sets one network apart from another; `groups` and `lrn` are defaults."""

    widths: tuple[int, ...]  # of the convolutions, in channels
    groups: int
    lrn: bool
    batch_norm: bool


VARIANTS = {
    "paper": Variant(widths=(96, 256, 384, 384, 256), groups=2, lrn=True, batch_norm=False),
    "owt": Variant(widths=(64, 192, 384, 256, 256), groups=1, lrn=False, batch_norm=False),
    # AlexNet-BN, as large-batch work trains it (You et al., arXiv:1709.05011): batch normalisation takes the place
    # of LRN and of the convolutions' biases. In one column: the groups served to fit two GPUs of 3 GB.
    "bn": Variant(widths=(96, 256, 384, 384, 256), groups=1, lrn=False, batch_norm=True),
    # Figure 1 tells only "a four-layer convolutional neural network". This is the layout of cuda-convnet's
    # "layers-80sec" for CIFAR-10, of the same author: an assumption.
    "cifar": Variant(widths=(32, 32, 64), groups=1, lrn=False, batch_norm=False),
}
DROPPABLE = ("conv2", "conv3", "conv4", "conv5")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
HIDDEN = 4096


class AlexNet(nn.Module):
    """AlexNet as `features` (convolutions) and `classifier` (fully connected layers), two Sequentials.

    The layers are named after the paper (`features.conv1`, `classifier.fc6`), those of `owt` are numbered as
    torchvision numbers them. Weights have PyTorch's default initialisation; for the paper's see
    `model.training.recipe`.

    Args:
        num_classes: outputs of fc8.
        variant: "paper", "owt", "bn" or "cifar" (see the module). "cifar" has no dropout, and of the options below
            only `image_size` and `activation`.
        dropout: probability of dropping an output of fc6 and fc7 (section 4.2), or, in `owt`, an input.
        image_size: height and width of the images in pixels. The paper says 224; its 55x55 maps after conv1 take
            the 2 pixels of padding that conv1 has here.
        stride: of conv1 in pixels (section 3.5). 4 needs images of 63 pixels or more; 1 suits CIFAR's 24 to 32.
        activation: "relu", "tanh" or "sigmoid", after every layer but the last (section 3.1).
        groups: 1 or 2, of conv2, conv4 and conv5 (section 3.2); None for the variant's.
        lrn: local response normalisation after conv1 and conv2 (section 3.3); None for the variant's.
        pool: kernel and stride of the max pools in pixels (section 3.4: 3 and 2, overlapping).
        drop_layers: layers to leave out, of "conv2" to "conv5" (section 7), each with its activation and
            normalisation; the pools stay.

    Attributes:
        options: the options from `stride` on that differ from the variant's own, as plain values: with
            `num_classes`, `variant` and `image_size` they make this network again.

    Raises:
        ModelError: an option that makes no network, or images too small for it.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        variant: str = "paper",
        dropout: float = 0.5,
        *,
        image_size: int = 224,
        stride: int = 4,
        activation: str = "relu",
        groups: int | None = None,
        lrn: bool | None = None,
        pool: tuple[int, int] = (3, 2),
        drop_layers: Collection[str] = (),
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ModelError(f"no variant {variant!r}: choose one of {', '.join(VARIANTS)}")
        if activation not in ACTIVATIONS:
            raise ModelError(f"no activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if groups not in (None, 1, 2):
            raise ModelError(f"groups is {groups}: choose 1 or 2")
        if not set(drop_layers) <= set(DROPPABLE):
            wrong = ", ".join(sorted(set(drop_layers) - set(DROPPABLE)))
            raise ModelError(f"cannot drop {wrong}: only {', '.join(DROPPABLE)} can be left out")
        if min(num_classes, stride, *pool) < 1:
            raise ModelError(
                f"num_classes {num_classes}, stride {stride}, pool {pool}: all must be at least 1"
            )
        widths, default_groups, default_lrn, batch_norm = VARIANTS[variant]
        groups = default_groups if groups is None else groups
        lrn = default_lrn if lrn is None else lrn
        self.variant, self.image_size = variant, image_size
        defaults: dict[str, Any] = {"stride": 4, "activation": "relu", "groups": default_groups}
        defaults |= {"lrn": default_lrn, "pool": [3, 2], "drop_layers": []}
        given = {"stride": stride, "activation": activation, "groups": groups, "lrn": lrn, "pool": list(pool)}
        given["drop_layers"] = sorted(set(drop_layers))
        self.options = {name: value for name, value in given.items() if value != defaults[name]}
        if variant == "cifar":
            self._build_cifar(num_classes, ACTIVATIONS[activation])
            return
        if (side := _last_side(image_size, stride, pool)) < 1:
            enough = next(size for size in count(image_size) if _last_side(size, stride, pool) >= 1)
            raise ModelError(
                f"images of {image_size} pixels are too small for conv1's stride of {stride} and 3 pools {pool}: "
                f"use at least {enough} pixels, or a smaller stride"
            )

        self.convolutions = [n for n in range(1, 6) if f"conv{n}" not in drop_layers]
        features: dict[str, nn.Module] = {}
        channels = 3

        def convolution(layer: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
            nonlocal channels
            if layer not in self.convolutions:
                return
            width = widths[layer - 1]
            # conv1's padding makes 55x55 maps of 224x224 images; the others keep the size of their input.
            padding = 2 if layer == 1 else kernel // 2
            features[f"conv{layer}"] = nn.Conv2d(
                channels, width, kernel, stride, padding, groups=groups, bias=not batch_norm
            )
            if batch_norm:
                features[f"bn{layer}"] = nn.BatchNorm2d(width)
            features[f"act{layer}"] = ACTIVATIONS[activation]()
            channels = width

        convolution(1, kernel=11, stride=stride)
        if lrn:
            features["lrn1"] = LRN()
        features["pool1"] = nn.MaxPool2d(*pool)
        convolution(2, kernel=5, groups=groups)
        if lrn and 2 in self.convolutions:
            features["lrn2"] = LRN()
        features["pool2"] = nn.MaxPool2d(*pool)
        convolution(3, kernel=3)
        convolution(4, kernel=3, groups=groups)
        convolution(5, kernel=3, groups=groups)
        features["pool5"] = nn.MaxPool2d(*pool)

        # torchvision averages the last maps to 6x6, so that its fc6 takes images of any size.
        self.avgpool = nn.AdaptiveAvgPool2d(6) if variant == "owt" else nn.Identity()
        side = 6 if variant == "owt" else side
        drop6, drop7 = ((f"drop{layer}", KeyedDropout(dropout, salt=layer)) for layer in (6, 7))
        fc6, fc7 = ("fc6", nn.Linear(channels * side * side, HIDDEN)), ("fc7", nn.Linear(HIDDEN, HIDDEN))
        act6, act7 = ((f"act{layer}", ACTIVATIONS[activation]()) for layer in (6, 7))
        # Section 4.2 drops the outputs of the hidden layers, torchvision the inputs.
        hidden = (
            [drop6, fc6, act6, drop7, fc7, act7] if variant == "owt" else [fc6, act6, drop6, fc7, act7, drop7]
        )
        classifier = dict([*hidden, ("fc8", nn.Linear(HIDDEN, num_classes))])
        self.features, self.classifier = (
            nn.Sequential(*layers.values()) if variant == "owt" else nn.Sequential(OrderedDict(layers))
            for layers in (features, classifier)
        )

    def _build_cifar(self, num_classes: int, activation: Callable[[], nn.Module]) -> None:
        """conv1 and max pool, conv2 and conv3 with mean pools, fc4; pools of 3 and 2 that round sizes up."""
        if self.options.keys() - {"activation"}:
            raise ModelError(
                f"variant cifar has no {', '.join(sorted(self.options.keys() - {'activation'}))}: "
                "leave those options out, or take --variant paper with --stride 1"
            )
        features: dict[str, nn.Module] = {"scale": Scale(1 / 64)}
        channels, side = 3, self.image_size
        self.convolutions = [1, 2, 3]
        for layer, width in enumerate(VARIANTS["cifar"].widths, 1):
            features[f"conv{layer}"] = nn.Conv2d(channels, width, 5, padding=2)
            features[f"act{layer}"] = activation()
            pool = nn.MaxPool2d if layer == 1 else nn.AvgPool2d
            features[f"pool{layer}"] = pool(3, 2, ceil_mode=True)
            channels, side = width, max(0, -(-(side - 3) // 2)) + 1
        self.avgpool = nn.Identity()
        self.features = nn.Sequential(OrderedDict(features))
        self.classifier = nn.Sequential(OrderedDict(fc4=nn.Linear(channels * side * side, num_classes)))

    def forward_features(self, x: Tensor) -> Tensor:
        """What the last layer sees of images (N, 3, image_size, image_size).

        In all variants but `cifar` these are the activations of fc7 (N, 4096) (section 6.1).
        """
        if self.variant != "owt" and x.shape[2:] != (self.image_size, self.image_size):
            given = "x".join(str(side) for side in x.shape[2:])
            raise ModelError(
                f"the network takes images of {self.image_size} pixels, not {given}: set image_size"
            )
        x = self.avgpool(self.features(x)).flatten(1)
        for layer in list(self.classifier)[:-1]:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) for images (N, 3, image_size, image_size), in any memory format."""
        return self.classifier[-1](self.forward_features(x))

    def set_position(self, key: int, first_row: int) -> None:
        """Makes the dropout of the next forward pass a function of its place in training.

        Args:
            key: 0 .. 2**63 - 1, derived from (seed, epoch, step).
            first_row: the place in the global batch of the next input's first row.
        """
        for layer in self.modules():
            if isinstance(layer, KeyedDropout):
                layer.set_position(key, first_row)


class Scale(nn.Module):
    """Multiplies by a constant: pixels in levels saturate a tanh unless they are scaled down first."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


def _last_side(image_size: int, stride: int, pool: tuple[int, int]) -> int:
    """Height and width of pool5's maps: conv1 and the three pools shrink them, the other layers do not."""
    side = (image_size + 2 * 2 - 11) // stride + 1
    for _ in range(3):
        side = (side - pool[0]) // pool[1] + 1
    return side
