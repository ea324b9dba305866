"""--weights: start training from a run, a checkpoint, torchvision's alexnet or a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import ModelError, one_line
from base.files import open_regular, read_regular
from model.alexnet import AlexNet
from model.training import checkpoint

# of torchvision's alexnet, whose inputs are (pixel - IMAGENET_MEAN) / IMAGENET_STD for RGB pixels in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Weights:
    """A network's weights and the options that belong to them.

    Args:
        path: the file or run.
        variant, options: as AlexNet takes them.
        state: the state dict of that AlexNet.
        mean: the value of --mean that the network was trained with; None if it is unknown.
        crop: side of the network's input in pixels.

    Raises:
        ModelError: no AlexNet has these options.
    """

    path: Path
    variant: str
    state: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    mean: str | None = None
    crop: int = 224

    def __post_init__(self) -> None:
        try:
            with torch.device("meta"):  # no memory, no work
                AlexNet(1, self.variant, image_size=self.crop, **self.options)
        except (TypeError, ValueError, RuntimeError, ModelError) as error:
            reason = one_line(error)[:200]
            raise ModelError(
                f"{self.path} describes no AlexNet ({reason}){checkpoint.GIVE_ANOTHER}"
            ) from None

    def check(self, network: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors that fit `network`, and the layers that keep their initial weights; raises as `into` does."""
        own = network.state_dict()
        fits = {name: t for name, t in self.state.items() if name in own and own[name].shape == t.shape}
        initial = sorted({name.rpartition(".")[0] for name in own.keys() - fits.keys()})
        # whole layers only
        fits = {name: t for name, t in fits.items() if name.rpartition(".")[0] not in initial}
        extra = {name for name in self.state.keys() - own.keys() if name.startswith("features.")}
        if not fits or extra or any(name.startswith("features.") for name in initial):
            some = ", ".join([*initial, *sorted(extra)][:3])
            raise ModelError(
                f"{self.path} holds weights of another network ({some} do not fit): "
                "omit --variant and the network's options, or give other --weights"
            )
        return fits, initial

    def into(self, network: nn.Module) -> str:
        """Copy the layers that fit into `network`; returns a line for the user.

        A fully connected layer of another shape, such as the last with other classes, keeps its initial weights.
        Raises ModelError if a convolution does not fit, because then the networks differ.
        """
        fits, initial = self.check(network)
        network.load_state_dict({**network.state_dict(), **fits})
        layers = {name.rpartition(".")[0] for name in fits}
        return f"{len(layers)} layers of {self.path}" + (
            f", with new weights for {', '.join(initial)}" if initial else ""
        )


# cached because train.py checks the weights first, and a rank in the same process then loads them
@lru_cache(maxsize=1)
def load_weights(path: Path) -> Weights:
    """Read weights; raises ModelError if `path` holds none that fit an AlexNet.

    Args:
        path: a run's folder (its best checkpoint), a checkpoint of train.py, a state dict of torchvision's alexnet
            (.pth), or a safetensors file written by tools/export.py or with torchvision's names.
    """
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    if path.is_dir() or _is_ours(path):
        saved = checkpoint.load(checkpoint.find(path))
        try:
            state = (saved.get("ema") or saved)["model"]
            about = saved["preprocess"]
            network = saved["variant"], dict(state), dict(saved["network"])
            return Weights(path, *network, about["mean_mode"], about["crop"])
        except (KeyError, TypeError, ValueError):
            raise ModelError(f"{path} is not a checkpoint of train.py{checkpoint.GIVE_ANOTHER}") from None
    return load_torchvision(path)


def load_torchvision(path: Path, std: Sequence[float] = IMAGENET_STD) -> Weights:
    """Read a state dict of torchvision's alexnet, whose inputs are (pixel - mean) / std for pixels in 0..1.

    The division becomes part of conv1's weights, which is exact at the padded borders too.

    Raises:
        ModelError: a file that cannot be read, or that holds anything else.
    """
    try:
        state = checkpoint.unpack(read_regular(path, checkpoint.MAX_BYTES))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # torch raises many kinds, some with pages of advice
        raise ModelError(
            f"{path} is not a file of weights that torch can load without running code: give another file"
        ) from None
    return _from_torchvision(path, state, std)


def _is_ours(path: Path) -> bool:
    """Whether a file ends with the checksum that `checkpoint.save` writes."""
    try:
        with open_regular(path) as file:
            file.seek(-checkpoint.DIGEST_BYTES, 2)
            end = file.read()
        return len(bytes.fromhex(end.decode("ascii"))) * 2 == checkpoint.DIGEST_BYTES
    except (OSError, ValueError):
        return False


def _from_torchvision(path: Path, state: Any, std: Sequence[float] = IMAGENET_STD) -> Weights:
    scale = (255 * torch.tensor(std, dtype=torch.float64)).view(1, 3, 1, 1)
    try:
        checkpoint.check_weights(state)
        with torch.device("meta"):  # no memory, no work
            network = AlexNet(len(state["classifier.6.bias"]), "owt")
        expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
        if {name: tensor.shape for name, tensor in state.items()} != expected:
            raise ValueError
        first = (state["features.0.weight"].double() / scale).float()
        state = {name: tensor.float() for name, tensor in state.items()} | {"features.0.weight": first}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, ModelError):
        raise ModelError(f"{path} is not a state dict of torchvision's alexnet: give another file") from None
    return Weights(path, "owt", state, mean="imagenet")


def _from_safetensors(path: Path) -> Weights:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ModelError("safetensors is not installed: run pip install -e '.[export]'") from None
    try:
        open_regular(path, checkpoint.MAX_BYTES).close()
        with safe_open(str(path), framework="pt") as file:
            about, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if "preprocess" not in about:
        return _from_torchvision(path, state)
    try:
        inputs = json.loads(about["preprocess"])
        network = about["variant"], state, json.loads(about["network"])
        return Weights(path, *network, inputs["mean_mode"], inputs["crop"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path} has no metadata of tools/export.py: give another file") from None
