"""AlexNet and its variants (Krizhevsky, Sutskever, Hinton, NIPS 2012, section 3 and figure 2).

    paper         the network of the paper: response normalisation; conv2, conv4 and conv5 in two groups
    owt           torchvision's `alexnet` (the single column of "One weird trick", 2014), with the same state dict
    bn            the paper's widths in one column, with batch normalisation after each convolution instead of LRN
    cifar-80sec   the author's networks for CIFAR-10, from layers-80sec.cfg and layers-18pct.cfg of cuda-convnet
    cifar-18pct   (https://github.com/dnouri/cuda-convnet/tree/master/example-layers)

Inputs are images (N, 3, image_size, image_size) in floating point, outputs are logits (N, num_classes). All layers
preserve the channels-last memory format, which is the fastest on CPUs and GPUs. LRN also computes the ReLU before
it and the max pool after it, and elsewhere a ReLU comes after the max pool: fewer values pass through memory, and
the results are the same bit for bit, except that gradients in bfloat16 are rounded once less.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import ModelError
from model.dropout import KeyedDropout
from model.lrn import LRN

DROPPABLE = ("conv2", "conv3", "conv4", "conv5")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
HIDDEN = 4096


# --- one function per variant, one line per layer, with the size of its output ---------------------------------


def _paper(net: "_Builder") -> None:
    """Figure 2 of the paper, both towers. Sizes are for images of 224x224."""
    net.conv(1, 96, kernel=11, stride=net.stride, padding=2)  #  96 x 55 x 55
    net.lrn(1)
    net.max_pool(1)  #                                            96 x 27 x 27
    net.conv(2, 256, kernel=5, groups=net.groups)  #             256 x 27 x 27
    net.lrn(2)
    net.max_pool(2)  #                                           256 x 13 x 13
    net.conv(3, 384, kernel=3)  #                                384 x 13 x 13
    net.conv(4, 384, kernel=3, groups=net.groups)  #             384 x 13 x 13
    net.conv(5, 256, kernel=3, groups=net.groups)  #             256 x 13 x 13
    net.max_pool(5)  #                                           256 x  6 x  6
    net.linear(6, HIDDEN)
    net.dropout(6)
    net.linear(7, HIDDEN)
    net.dropout(7)
    net.linear(8)


def _owt(net: "_Builder") -> None:
    """torchvision.models.alexnet: one column, dropout before the hidden layers, average pooling to 6x6."""
    net.conv(1, 64, kernel=11, stride=net.stride, padding=2)  #   64 x 55 x 55
    net.lrn(1)
    net.max_pool(1)  #                                            64 x 27 x 27
    net.conv(2, 192, kernel=5, groups=net.groups)  #             192 x 27 x 27
    net.lrn(2)
    net.max_pool(2)  #                                           192 x 13 x 13
    net.conv(3, 384, kernel=3)  #                                384 x 13 x 13
    net.conv(4, 256, kernel=3, groups=net.groups)  #             256 x 13 x 13
    net.conv(5, 256, kernel=3, groups=net.groups)  #             256 x 13 x 13
    net.max_pool(5)  #                                           256 x  6 x  6
    net.average_to(6)  #                                         256 x  6 x  6
    net.dropout(6)
    net.linear(6, HIDDEN)
    net.dropout(7)
    net.linear(7, HIDDEN)
    net.linear(8)


def _cifar(net: "_Builder") -> None:
    """layers-80sec.cfg and layers-18pct.cfg, whose pools round the output size up."""
    net.conv(1, 32, kernel=5)  #                                  32 x 32 x 32
    net.max_pool(1, ceil=True)  #                                 32 x 16 x 16
    net.spatial_lrn(1)
    net.conv(2, 32, kernel=5)  #                                  32 x 16 x 16
    net.average_pool(2)  #                                        32 x  8 x  8
    net.spatial_lrn(2)
    net.conv(3, 64, kernel=5)  #                                  64 x  8 x  8
    net.average_pool(3)  #                                        64 x  4 x  4
    if net.variant == "cifar-80sec":
        net.linear(64, 64)
    net.linear(10)


# Each variant with the default values of its options. bn is the AlexNet-BN of large-batch training (You et al.,
# arXiv:1709.05011): batch normalisation replaces LRN and the convolutions' biases. It has one column, because the
# paper's groups only served to fit the network into two GPUs with 3 GB.
VARIANTS: dict[str, tuple[Callable[["_Builder"], None], dict[str, Any]]] = {
    "paper": (_paper, {"groups": 2, "lrn": True}),
    "owt": (_owt, {"groups": 1, "lrn": False}),
    "bn": (_paper, {"groups": 1, "lrn": False}),
    "cifar-80sec": (_cifar, {"groups": 1, "lrn": False}),
    "cifar-18pct": (_cifar, {"groups": 1, "lrn": True}),
}


class AlexNet(nn.Module):
    """AlexNet, as two Sequentials: `features` (convolutions) and `classifier` (fully connected layers).

    Layers are named as in the paper (`features.conv1`, `classifier.fc6`); those of `owt` are numbered as in
    torchvision. Weights have PyTorch's default initialisation; see `model.training.recipe` for others.

    Args:
        num_classes: number of outputs.
        variant: one of VARIANTS (see the module). The two for CIFAR have no dropout and take only `image_size` and
            `activation` of the options below.
        dropout: probability of dropping an output of fc6 and fc7 (section 4.2), or in `owt` an input.
        image_size: height and width of the images in pixels. The paper has 224; its maps of 55x55 after conv1
            require the padding of 2 pixels that conv1 has here.
        stride: stride of conv1 (section 3.5). 4 needs images of at least 63 pixels; use 1 for images of 24 to 32.
        activation: "relu", "tanh" or "sigmoid", after every layer except the last (section 3.1).
        groups: number of groups in conv2, conv4 and conv5, 1 or 2 (section 3.2); None for the variant's default.
        lrn: local response normalisation after conv1 and conv2 (section 3.3); None for the variant's default.
        pool: kernel size and stride of the max pools (section 3.4: 3 and 2, overlapping).
        drop_layers: convolutions to omit, from "conv2" to "conv5" (section 7), with their activation and
            normalisation but not their pooling.

    Attributes:
        options: the options from `stride` to `drop_layers` that differ from the variant's defaults, as
            plain values. With `num_classes`, `variant` and `image_size` they describe the network.
        convolutions: the numbers of the convolutions, in order, without the omitted ones.

    Raises:
        ModelError: the options describe no network, or the images are too small for it.
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
            raise ModelError(f"cannot omit {wrong}: choose from {', '.join(DROPPABLE)}")
        if lrn not in (None, False, True):
            raise ModelError(f"lrn is {lrn}: choose True or False")
        sizes = (num_classes, image_size, stride, *pool)
        if len(pool) != 2 or not all(isinstance(value, int) and value >= 1 for value in sizes):
            raise ModelError(
                f"num_classes {num_classes}, image_size {image_size}, stride {stride}, pool {pool}: "
                "all must be integers of at least 1"
            )
        build, own = VARIANTS[variant]
        defaults = {"stride": 4, "activation": "relu", "pool": [3, 2], "drop_layers": [], **own}
        given = {
            "stride": stride,
            "activation": activation,
            "groups": own["groups"] if groups is None else groups,
            "lrn": own["lrn"] if lrn is None else lrn,
            "pool": list(pool),
            "drop_layers": sorted(set(drop_layers)),
        }
        self.variant, self.image_size = variant, image_size
        self.options = {name: value for name, value in given.items() if value != defaults[name]}
        if build is _cifar and self.options.keys() - {"activation"}:
            raise ModelError(
                f"variant {variant} has no {', '.join(sorted(self.options.keys() - {'activation'}))}: "
                "leave these options out, or use --variant paper with --stride 1"
            )
        net = _Builder(variant, num_classes, image_size, dropout, given)
        build(net)
        self.convolutions = net.convolutions
        self.avgpool = net.avgpool
        self.features, self.classifier = (
            nn.Sequential(*layers.values()) if variant == "owt" else nn.Sequential(OrderedDict(layers))
            for layers in (net.features, net.classifier)
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """The input of the last layer for images (N, 3, image_size, image_size).

        Except in the variants for CIFAR, these are the activations of fc7, (N, 4096) (section 6.1).
        """
        if self.variant != "owt" and x.shape[2:] != (self.image_size, self.image_size):
            given = "x".join(str(side) for side in x.shape[2:])
            raise ModelError(
                f"the network takes images of {self.image_size} pixels, not {given}: change image_size"
            )
        x = self.avgpool(self.features(x)).flatten(1)
        for layer in list(self.classifier)[:-1]:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) for images (N, 3, image_size, image_size), in any memory format."""
        return self.classifier[-1](self.forward_features(x))

    def set_position(self, key: int, first_row: int) -> None:
        """Make the dropout masks of the next forward pass a function of the position in training.

        Args:
            key: derived from (seed, epoch, step), in 0 .. 2**63 - 1.
            first_row: position in the global batch of the first row of the next input.
        """
        for layer in self.modules():
            if isinstance(layer, KeyedDropout):
                layer.set_position(key, first_row)


class SpatialLRN(nn.Module):
    """Response normalisation over a square window of each map, cuda-convnet's `rnorm`.

        y = x / (1 + alpha / size**2 * sum of x**2 over size x size)**beta

    Takes and returns (N, C, H, W) of any dtype; pixels outside the map count as zero.
    """

    def __init__(self, size: int = 3, alpha: float = 5e-5, beta: float = 0.75) -> None:
        super().__init__()
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        mean = F.avg_pool2d(x.float().square(), self.size, stride=1, padding=self.size // 2)
        return (x / (1 + self.alpha * mean).pow(self.beta)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha:g}, beta={self.beta:g}"


class _Builder:
    """Collects the layers of a network and tracks the number of channels and the size of the maps."""

    def __init__(
        self, variant: str, num_classes: int, image_size: int, dropout: float, options: dict[str, Any]
    ) -> None:
        self.variant, self.num_classes, self.image_size, self.p = variant, num_classes, image_size, dropout
        self.stride, self.groups, self.pool = options["stride"], options["groups"], tuple(options["pool"])
        self.activation, self.with_lrn = ACTIVATIONS[options["activation"]], options["lrn"]
        self.dropped = options["drop_layers"]
        self.features: dict[str, nn.Module] = {}
        self.classifier: dict[str, nn.Module] = {}
        self.avgpool: nn.Module = nn.Identity()
        self.convolutions: list[int] = []
        self.channels, self.side = 3, image_size
        self.units = 0  # inputs of the next fully connected layer; 0 before the first

    def conv(
        self, n: int, width: int, kernel: int, stride: int = 1, padding: int | None = None, groups: int = 1
    ) -> None:
        """A convolution with its activation; the default stride and padding preserve the size of the maps."""
        if f"conv{n}" in self.dropped:
            return
        padding = kernel // 2 if padding is None else padding
        norm = self.variant == "bn"
        self.features[f"conv{n}"] = nn.Conv2d(
            self.channels, width, kernel, stride, padding, groups=groups, bias=not norm
        )
        if norm:
            self.features[f"bn{n}"] = nn.BatchNorm2d(width)
        self.features[f"act{n}"] = self.activation()
        self.convolutions.append(n)
        self.channels, self.side = width, (self.side + 2 * padding - kernel) // stride + 1

    def lrn(self, n: int) -> None:
        if self.with_lrn and f"conv{n}" not in self.dropped:
            self.features[f"lrn{n}"] = LRN(relu=self._pop_relu(n) is not None)

    def spatial_lrn(self, n: int) -> None:
        if self.with_lrn:
            self.features[f"lrn{n}"] = SpatialLRN()

    def max_pool(self, n: int, ceil: bool = False) -> None:
        relu = self._pop_relu(n)
        lrn = self.features.get(f"lrn{n}")
        if isinstance(lrn, LRN) and not ceil:
            lrn.pool = self.pool
            self.features[f"pool{n}"] = nn.Identity()  # keeps the name of the pooled maps
        else:
            self.features[f"pool{n}"] = nn.MaxPool2d(self.pool[0], self.pool[1], ceil_mode=ceil)
        if relu:
            self.features[f"act{n}"] = relu
        self._pooled(ceil)

    def _pop_relu(self, n: int) -> nn.Module | None:
        """Removes and returns the last layer if it is the ReLU of convolution n."""
        last = next(reversed(self.features))
        found = last == f"act{n}" and isinstance(self.features[last], nn.ReLU)
        return self.features.pop(last) if found else None

    def average_pool(self, n: int) -> None:
        self.features[f"pool{n}"] = nn.AvgPool2d(self.pool[0], self.pool[1], ceil_mode=True)
        self._pooled(ceil=True)

    def _pooled(self, ceil: bool) -> None:
        kernel, stride = self.pool
        self.side = (self.side - kernel + (stride - 1) * ceil) // stride + 1

    def average_to(self, side: int) -> None:
        self._check_side()
        self.avgpool, self.side = _AverageTo(side), side

    def linear(self, n: int, width: int | None = None) -> None:
        """A fully connected layer with its activation; without a width it is the last one, which has none."""
        self._check_side()
        inputs = self.units or self.channels * self.side**2
        self.units = width or self.num_classes
        self.classifier[f"fc{n}"] = nn.Linear(inputs, self.units)
        if width:
            self.classifier[f"act{n}"] = self.activation()

    def dropout(self, n: int) -> None:
        self.classifier[f"drop{n}"] = KeyedDropout(self.p, salt=n)

    def _check_side(self) -> None:
        """Raises ModelError if the maps have no pixels left."""
        if self.side >= 1:
            return
        if self.variant.startswith("cifar"):
            raise ModelError(f"images of {self.image_size} pixels are too small for variant {self.variant}")
        # the search is limited because a malicious checkpoint may have any pool
        sizes = range(self.image_size, 4097)
        enough = next((size for size in sizes if _last_side(size, self.stride, self.pool) >= 1), None)
        raise ModelError(
            f"images of {self.image_size} pixels are too small for conv1's stride of {self.stride} and 3 pools "
            f"{tuple(self.pool)}: use "
            + (f"at least {enough} pixels, or " if enough else "")
            + "a smaller stride"
        )


class _AverageTo(nn.AdaptiveAvgPool2d):
    """Averages maps to the given side, and leaves those that have it: the gradient on GPUs is not deterministic."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-1] == x.shape[-2] == self.output_size else super().forward(x)


def _last_side(image_size: int, stride: int, pool: tuple[int, int]) -> int:
    """Height and width of pool5's maps; only conv1 and the three pools shrink them."""
    side = (image_size + 2 * 2 - 11) // stride + 1
    for _ in range(3):
        side = (side - pool[0]) // pool[1] + 1
    return side
