"""Export to ONNX, safetensors and torchvision, and import from torchvision. Imports no DALI."""

from __future__ import annotations

import base64
import copy
import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import DataError, ModelError
from base.files import read_regular, temporary_path
from model.lrn import LRN
from model.training import checkpoint
from model.training.weights import IMAGENET_STD, load_torchvision
from pipeline.preprocess import IMAGENET_MEAN, Preprocess
from pipeline.shards import MANIFEST, Manifest
from tools.lib.cli import cannot_write
from tools.lib.runs import Classes, Run

MAX_NAMES_BYTES = 1 << 26  # of a file of class names
# largest difference of ONNX Runtime's logits from torch's, relative to the largest logit
TOLERANCE = 1e-4


def write_file(path: Path, write: Callable[[Path], str]) -> str:
    """Write a file through a temporary one, so that a failure leaves no incomplete file; returns its message."""
    part = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        message = write(part)
        part.replace(path)
        return message
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        part.unlink(missing_ok=True)


def extra(module: str) -> Any:
    """Import a module of the extra `export`; raises ModelError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ModelError(f"{module} is not installed: run pip install -e '.[export]'") from None


def metadata(run: Run) -> dict[str, str]:
    """Metadata for other programs; see "Exported files" in docs/tools.md."""
    own = run.preprocess
    preprocess: dict[str, Any] = {
        "channels": "RGB",
        "range": 255,  # levels of 0..255, not 0..1
        "exif_orientation": "ignored",
        "square": "central",  # of the side of the short edge
        "size": own.size,  # to which the square is scaled
        "shrink": "area",
        "enlarge": "cubic",
        "crop": own.crop,
        "crop_offset": (own.size - own.crop) // 2,  # top and left of the centre crop
        "mean_mode": own.mean_mode,
        "channel_mean": own.mean.mean((0, 1), dtype=np.float64).tolist(),
        "std": [1.0, 1.0, 1.0],
        "layout": "NCHW",
        "dtype": "float32",
    }
    if own.mean_mode == "pixel":
        preprocess["mean_pixels"] = base64.b64encode(own.mean.astype("<f4").tobytes()).decode()
        preprocess["mean_pixels_layout"] = "HWC RGB, size x size x 3, little-endian float32, base64"
    return {
        "variant": run.variant,
        "network": json.dumps(run.network.options),
        "epoch": str(run.epoch),
        "classes": json.dumps(run.classes),
        "preprocess": json.dumps(preprocess),
        "preprocess_text": describe(own),
        "outputs": "logits, one for each entry of classes in that order; their softmax is the probabilities",
    }


def describe(preprocess: Preprocess) -> str:
    """The preprocessing as a sentence, with OpenCV's names for the filters."""
    size, crop, mode = preprocess.size, preprocess.crop, preprocess.mean_mode
    offset = (size - crop) // 2
    means = {
        "pixel": f"subtract the same {crop} x {crop} window of the mean image (mean_pixels, not its average)",
        "none": "subtract nothing",
    }
    mean = means.get(mode, "subtract channel_mean, one level for each channel")
    return (
        "Decode to 8-bit RGB (ignore EXIF orientation, drop alpha); cut out the central square whose side is the "
        f"short side; resize it to {size} x {size} pixels, with an area filter (cv2.INTER_AREA) if that shrinks it "
        f"and a bicubic one (cv2.INTER_CUBIC) if it enlarges it, and round to 8 bits; take the centre crop of "
        f"{crop} x {crop} pixels, rows and columns from {offset}; in float32 and levels of 0..255 {mean}; "
        f"do not divide; order as (N, 3, {crop}, {crop}), red first."
    )


# --- ONNX ----------------------------------------------------------------------------------------------------


class OnnxLRN(nn.Module):
    """LRN, and the ReLU and max pool that it may compute, as ONNX's operators. ONNX's LRN divides alpha by size.

    https://onnx.ai/onnx/operators/onnx__LRN.html
    """

    def __init__(self, lrn: LRN) -> None:
        super().__init__()
        self.constants: dict[str, Any] = {
            "size": lrn.size,
            "alpha": lrn.alpha * lrn.size,
            "beta": lrn.beta,
            "bias": lrn.k,
        }
        self.relu, self.pool = lrn.relu, lrn.pool

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu() if self.relu else x
        y = torch.onnx.ops.symbolic("LRN", (x,), self.constants, dtype=x.dtype, shape=x.shape, version=13)
        return F.max_pool2d(y, *self.pool) if self.pool else y


def to_onnx(run: Run, path: Path) -> str:
    """Write a float32 ONNX file with a dynamic batch size and verify it; returns a line for the user.

    Raises ModelError if the extra packages are missing or ONNX Runtime's logits differ from torch's.
    """
    onnx = extra("onnx")
    extra("onnxscript")
    runtime = extra("onnxruntime")
    network = copy.deepcopy(run.network)
    for name, layer in network.features.named_children():
        if isinstance(layer, LRN):
            setattr(network.features, name, OnnxLRN(layer))
    crop = run.preprocess.crop
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, crop, crop), generator=generator).float() - 128
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's internal ones, about which a user can do nothing
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None  # with dynamo=True
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata(run))
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, str(path))

    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for part in (images, images[:1]):
        with torch.inference_mode():
            expected = run.network(part).numpy()
        (found,) = session.run(["logits"], {"images": part.numpy()})
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    if not worst <= TOLERANCE:
        raise ModelError(
            f"ONNX Runtime's logits differ from torch's by {worst:.1e} of the largest, more than {TOLERANCE:.0e}: "
            "use the versions of constraints.txt"
        )
    return (
        f"ONNX opset {proto.opset_import[0].version}; logits of ONNX Runtime are within {worst:.1e} of torch's, "
        f"relative to the largest (the limit is {TOLERANCE:.0e})"
    )


# --- state dicts ---------------------------------------------------------------------------------------------


def to_safetensors(run: Run, path: Path) -> str:
    """Write the state dict as a safetensors file (https://huggingface.co/docs/safetensors)."""
    safetensors = extra("safetensors.torch")
    state = {name: tensor.contiguous() for name, tensor in run.network.state_dict().items()}
    path.touch()
    mode = path.stat().st_mode
    safetensors.save_file(state, str(path), metadata=metadata(run))
    path.chmod(mode)  # save_file would make it readable for the user only
    return f"{len(state)} tensors, {sum(t.numel() for t in state.values()):,} numbers"


def to_torchvision(run: Run, path: Path) -> str:
    """Write the weights as a state dict for torchvision's alexnet: equal inputs give equal logits."""
    if run.variant != "owt":
        raise ModelError(
            f"torchvision's alexnet is variant owt, but {run.path} is {run.variant}: train with --variant owt"
        )
    if run.network.options:
        switched = ", ".join(f"{name} {value}" for name, value in run.network.options.items())
        raise ModelError(
            f"torchvision's alexnet has no options, but {run.path} was trained with {switched}: train without"
        )
    torch.save({name: tensor.contiguous() for name, tensor in run.network.state_dict().items()}, path)
    levels = run.preprocess.mean.mean((0, 1), dtype=np.float64)
    mean = ", ".join(f"{level / 255:.6f}" for level in levels)
    inputs = f"transforms.Normalize([{mean}], [1 / 255] * 3) after ToTensor"
    if run.preprocess.mean_mode == "pixel":
        inputs = f"255 * ToTensor minus the mean image, or approximately {inputs}"
    return f"for models.alexnet(num_classes={len(run.classes)}); its inputs are {inputs}"


WRITERS: dict[str, Callable[[Run, Path], str]] = {
    "onnx": to_onnx,
    "safetensors": to_safetensors,
    "torchvision": to_torchvision,
}


def from_torchvision(
    source: Path,
    out: Path,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    data: Path | None = None,
    names: Path | None = None,
) -> str:
    """Make the checkpoint `out` of a state dict of torchvision's alexnet.

    Args:
        source: the state dict, read by `load_torchvision`.
        out: the checkpoint to write.
        mean, std: what the weights expect pixels in 0..1 to be normalised with; the mean becomes the
            checkpoint's channel mean.
        data: a data set to take the classes from.
        names: a file of `wnid name` lines to take them from; without `data` and `names` they are numbers.

    Raises:
        ModelError: `source` is something else.
        DataError: the classes do not match the network's outputs.
    """
    weights = load_torchvision(source, std)
    outputs = len(weights.state["classifier.6.bias"])
    size, basis = 256, np.zeros((3, 3))  # the colour shift is for training only
    if data:
        split = next((s for s in ("train", "val") if (data / s / MANIFEST).exists()), "train")
        manifest = Manifest.load(data / split)
        size, classes = manifest.size, manifest.classes
        basis = 255 * np.array(manifest.pca_eigenvectors) * np.array(manifest.pca_eigenvalues)
    else:
        classes = _read_classes(names) if names else _numbered_classes(outputs)
    if outputs != len(classes):
        raise DataError(
            f"{source} has {outputs} outputs, but {data or names} has {len(classes)} classes: give the --data or "
            "--names that it was trained on, or neither"
        )
    levels = np.tile(255 * np.array(mean, np.float32), (size, size, 1))
    # the value of --mean for a training that starts from these weights
    mode = "imagenet" if mean == IMAGENET_MEAN else "channel"
    preprocess = Preprocess(size, weights.crop, mode, levels, basis.astype(np.float32))
    # a checkpoint of train.py without the entries that only --resume needs
    saved = {
        "model": weights.state,
        "optimizer": {},
        "schedule": {},
        "scaler": {},
        "epoch": 0,
        "step": 0,
        "best": -1.0,
        "seed": 0,
        "variant": "owt",
        "identity": {},
        "classes": classes,
        "preprocess": preprocess.state_dict(),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from None
    checkpoint.save(out, saved)
    return f"wrote {out}: owt, {len(classes)} classes, inputs minus 255 * {mean}, conv1 / (255 * {std})"


def _read_classes(path: Path) -> Classes:
    """Read the classes from a file of `wnid name` lines, sorted by wnid."""
    try:
        lines = read_regular(path, MAX_NAMES_BYTES).decode("utf-8-sig", "surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    entries = (line.strip().replace("\t", " ").partition(" ") for line in lines if line.strip())
    return [{"wnid": wnid, "name": name.strip() or None} for wnid, _, name in sorted(entries)]


def _numbered_classes(count: int) -> Classes:
    """Classes with labels as wnids; for 1000 classes with ImageNet's names from torchvision, if it is installed."""
    names: list[str] = []
    if count == 1000:
        try:
            from torchvision.models import AlexNet_Weights

            names = list(AlexNet_Weights.DEFAULT.meta["categories"])
        except (ImportError, RuntimeError):  # RuntimeError: torchvision was built for another torch
            pass
    return [{"wnid": str(i), "name": names[i] if len(names) == count else None} for i in range(count)]
