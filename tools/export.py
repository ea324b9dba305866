"""Hand a trained network to other programs: python tools/export.py RUN --onnx FILE --safetensors FILE ..."""

from __future__ import annotations

import base64
import copy
import importlib
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from base.errors import ModelError
from model.alexnet import AlexNet
from model.lrn import LRN
from model.training import checkpoint
from pipeline.preprocess import Preprocess
from pipeline.shards import MANIFEST, Manifest
from tools.common import CONTEXT, Run, cannot_write, file_option, load_run, option

# logits of ONNX Runtime may differ by this share of the largest of torch's: float32 sums in another order
TOLERANCE = 1e-4
# of torchvision's own weights, for pixels of 0..1 (https://docs.pytorch.org/vision/stable/models.html)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@click.command(context_settings=CONTEXT)
@click.argument("run", type=click.Path(path_type=Path), required=False)
@file_option("--onnx", "An ONNX file, with LRN as ONNX's own operator; checked with ONNX Runtime.")
@file_option("--safetensors", "The state dict as a safetensors file.")
@file_option("--torchvision", "A state dict for torchvision.models.alexnet (variant owt only).")
@file_option("--from-torchvision", "The way back: make a checkpoint (--out) of such a state dict.")
@file_option("--out", "The checkpoint (.pt) to make.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Its train/ or val/ names the outputs' classes."
)
@option("--mean", type=float, nargs=3, default=IMAGENET_MEAN, help="Of --from-torchvision, pixels in 0..1.")
@option("--std", type=float, nargs=3, default=IMAGENET_STD, help="Likewise.")
def main(
    run: Path | None,
    onnx_path: Path | None,
    safetensors_path: Path | None,
    torchvision_path: Path | None,
    from_torchvision_path: Path | None,
    out_path: Path | None,
    data: Path | None,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> None:
    """Write the network of RUN, a folder that train.py wrote or a checkpoint, for other programs.

    Inputs are (N, 3, crop, crop) float32, RGB levels of 0..255 minus the mean; outputs are logits. ONNX and
    safetensors files hold in their metadata what is needed to make inputs and to name outputs: variant,
    classes (JSON), and preprocess (JSON: size, crop, mean_mode, channel_mean, and for a mean image
    mean_pixels: base64 of size x size x 3 little-endian float32).

    \b
    torchvision's weights become a checkpoint for evaluate.py, predict.py and show.py with
      export.py --from-torchvision alexnet.pth --out alexnet.pt --data data/imagenet

    --onnx and --safetensors need the extra packages of `pip install -e '.[export]'`.
    """
    outputs = {
        to_onnx: onnx_path,
        to_safetensors: safetensors_path,
        to_torchvision: torchvision_path,
    }
    if from_torchvision_path:
        if run or any(outputs.values()):
            raise click.UsageError("--from-torchvision makes a checkpoint and takes no RUN; export that next")
        if not (out_path and data):
            raise click.UsageError(
                "--from-torchvision needs --out for the checkpoint and --data for its classes"
            )
        click.echo(from_torchvision(from_torchvision_path, out_path, data, mean, std))
        return
    if out_path or data:
        raise click.UsageError("--out and --data go with --from-torchvision")
    if not run:
        raise click.UsageError("give a RUN to export, or --from-torchvision")
    if not any(outputs.values()):
        raise click.UsageError("nothing to write: give --onnx, --safetensors or --torchvision")
    trained = load_run(run)
    for write, path in outputs.items():
        if path:
            click.echo(f"{path}: {write_file(path, partial(write, trained))}")


def write_file(path: Path, write: Callable[[Path], str]) -> str:
    """Make a file by way of a temporary one, so that a failure leaves none that looks whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        said = write(part)
        part.replace(path)
        return said
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        part.unlink(missing_ok=True)


def extra(module: str) -> Any:
    """A module of the extra `export`; raises ModelError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ModelError(f"{module} is not installed: run pip install -e '.[export]'") from None


def metadata(run: Run) -> dict[str, str]:
    """What another program needs besides the weights (see `main`)."""
    mean = run.preprocess.mean
    preprocess: dict[str, Any] = {
        "layout": "NCHW",
        "channels": "RGB",
        "range": 255,
        "size": run.preprocess.size,
        "crop": run.preprocess.crop,
        "mean_mode": run.preprocess.mean_mode,
        "channel_mean": mean.mean((0, 1), dtype=np.float64).tolist(),
    }
    if run.preprocess.mean_mode == "pixel":
        preprocess["mean_pixels"] = base64.b64encode(mean.astype("<f4").tobytes()).decode()
    return {
        "variant": run.variant,
        "network": json.dumps(run.network.options),
        "epoch": str(run.epoch),
        "classes": json.dumps(run.classes),
        "preprocess": json.dumps(preprocess),
    }


# --- ONNX ----------------------------------------------------------------------------------------------------


class OnnxLRN(nn.Module):
    """LRN as the operator of ONNX, which divides alpha by size where the paper does not.

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

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic("LRN", (x,), self.constants, dtype=x.dtype, shape=x.shape, version=13)


def to_onnx(run: Run, path: Path) -> str:
    """Write an ONNX file with a free batch size, float32, and check it; returns what was found, for the user.

    Raises ModelError where the extra packages are missing, or if ONNX Runtime's logits differ from torch's.
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
        warnings.simplefilter("ignore")  # of torch about itself: nothing that a user could mend
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
        f"relative to the largest (at most {TOLERANCE:.0e} is let through)"
    )


# --- state dicts ---------------------------------------------------------------------------------------------


def to_safetensors(run: Run, path: Path) -> str:
    """Write the state dict under its own names (https://huggingface.co/docs/safetensors)."""
    safetensors = extra("safetensors.torch")
    state = {name: tensor.contiguous() for name, tensor in run.network.state_dict().items()}
    path.touch()
    mode = path.stat().st_mode
    safetensors.save_file(state, str(path), metadata=metadata(run))
    path.chmod(mode)  # theirs would be readable to nobody else
    return f"{len(state)} tensors, {sum(t.numel() for t in state.values()):,} numbers"


def to_torchvision(run: Run, path: Path) -> str:
    """Write the unchanged weights as torchvision names them: equal inputs give equal logits."""
    if run.variant != "owt":
        raise ModelError(
            f"torchvision's alexnet is the variant owt, {run.path} is {run.variant}: train with --variant owt"
        )
    if run.network.options:
        switched = ", ".join(f"{name} {value}" for name, value in run.network.options.items())
        raise ModelError(f"torchvision's alexnet has no options, {run.path} was trained with {switched}")
    torch.save({name: tensor.contiguous() for name, tensor in run.network.state_dict().items()}, path)
    levels = run.preprocess.mean.mean((0, 1), dtype=np.float64)
    mean = ", ".join(f"{level / 255:.6f}" for level in levels)
    inputs = f"transforms.Normalize([{mean}], [1 / 255] * 3) after ToTensor"
    if run.preprocess.mean_mode == "pixel":
        inputs = f"255 * ToTensor minus the mean image, or nearly the same {inputs}"
    return f"for models.alexnet(num_classes={len(run.classes)}); its inputs are {inputs}"


def from_torchvision(
    source: Path,
    out: Path,
    data: Path,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> str:
    """Make the checkpoint `out` of a state dict of torchvision's alexnet.

    Such networks take (pixel - mean) / std of pixels in 0..1. The division becomes part of conv1's weights,
    which is exact at the padded borders too, and the mean the checkpoint's channel mean. Raises ModelError if
    `source` is something else, DataError if DATA is none.
    """
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"cannot read {source}: {error.strerror}") from None
    except Exception:  # torch raises many kinds, with pages of advice
        raise ModelError(f"{source} is no state dict that torch can load without running its code") from None
    split = next((s for s in ("train", "val") if (data / s / MANIFEST).exists()), "train")
    manifest = Manifest.load(data / split)
    network = AlexNet(len(manifest.classes), "owt")
    outputs = (
        state["classifier.6.bias"].shape[0] if isinstance(state, dict) and "classifier.6.bias" in state else 0
    )
    if outputs and outputs != len(manifest.classes):
        raise ModelError(
            f"{source} has {outputs} outputs, {data} {len(manifest.classes)} classes: give its --data"
        )
    try:
        network.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError, AttributeError):
        raise ModelError(f"{source} is not a state dict of torchvision's alexnet") from None
    with torch.no_grad():
        first = next(network.features.parameters())
        first.copy_(first.double() / (255 * torch.tensor(std, dtype=torch.float64)).view(1, 3, 1, 1))
    basis = 255 * np.array(manifest.pca_eigenvectors) * np.array(manifest.pca_eigenvalues)
    levels = np.tile(255 * np.array(mean, np.float32), (manifest.size, manifest.size, 1))
    preprocess = Preprocess(manifest.size, network.image_size, "channel", levels, basis.astype(np.float32))
    # as train.py's, without what only training needs: nothing to --resume
    saved = {
        "model": network.state_dict(),
        "optimizer": {},
        "schedule": {},
        "scaler": {},
        "epoch": 0,
        "step": 0,
        "best": -1.0,
        "seed": 0,
        "variant": "owt",
        "identity": {},
        "classes": manifest.classes,
        "preprocess": preprocess.state_dict(),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from None
    checkpoint.save(out, saved)
    return (
        f"wrote {out}: owt, {len(manifest.classes)} classes, inputs minus 255 * {mean}, conv1 / (255 * {std})"
    )


if __name__ == "__main__":
    main()
