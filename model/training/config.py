"""The options of a training run: one dataclass field an option, and the click command made from it.

Imports neither torch nor DALI, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import click
import cloup
from click.core import ParameterSource

from base.errors import ModelError
from base.files import read_regular, write_atomic

RECIPES = Path(__file__).parents[2] / "recipes"
GROUPS = ("Data", "Network", "Training", "Regularisation", "Speed", "Run")
DEFAULT_INIT = {
    "paper": "torch",
    "owt": "torch",
    "bn": "he",
    "cifar-80sec": "cuda-convnet",
    "cifar-18pct": "cuda-convnet",
}
OWN_DATA = 100_000  # images; below, options that are not given follow from the number of images


def opt(
    group: str,
    help: str,
    default: Any = None,
    *,
    type: Any = None,
    flag: str | None = None,
    shown: str | None = None,
    resumable: bool = False,
    **more: Any,
) -> Any:
    """A field of Config and the option it becomes.

    Args:
        group: one of GROUPS, the section of --help.
        help: one sentence.
        default: None: decided later, `shown` says how.
        type: a click type; left out for switches.
        flag: the option's declaration where it is not the field's name.
        shown: what --help shows as the default.
        resumable: a resumed run may change it: how fast and how long, not what is computed.
    """
    metadata = {"group": group, "help": help, "type": type, "flag": flag, "shown": shown}
    metadata |= {"resumable": resumable, "more": more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _pool(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """ "3,2" -> "3,2"; refuses what is not two whole numbers."""
    sizes = value.split(",")
    if len(sizes) != 2 or not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise click.BadParameter(f"{value!r} is not KERNEL,STRIDE in pixels: 3,2 overlaps, 2,2 does not")
    return ",".join(str(int(size)) for size in sizes)


def _milestones(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """ "120,130" -> "120,130"; refuses what are not rising whole numbers."""
    epochs = [epoch.strip() for epoch in value.split(",")] if value else []
    if not all(epoch.isdecimal() for epoch in epochs) or sorted({int(e) for e in epochs}) != [
        int(e) for e in epochs
    ]:
        raise click.BadParameter(f"{value!r} is not a list of rising epochs such as 120,130")
    return ",".join(epochs)


def _layer_decays(_context: click.Context, _parameter: click.Parameter, values: Any) -> list[str]:
    """("fc10=1", ...) -> the same, checked."""
    for value in values:
        layer, _, decay = str(value).partition("=")
        try:
            right = bool(layer) and 0 <= float(decay) < math.inf
        except ValueError:
            right = False
        if not right:
            raise click.BadParameter(f"{value!r} is not LAYER=DECAY such as fc10=1")
    return sorted(values)


PATH = click.Path(path_type=Path)
COUNT = click.IntRange(1)
RATIO = click.FloatRange(0, 1, max_open=True)


@dataclass
class Config:
    """Every option of train.py; `config.json` of a run holds these fields."""

    # ---- Data
    data: Path = opt(
        "Data", "Folder that holds train/ and val/.", Path("data/imagenet"), type=PATH, resumable=True
    )
    crop: int = opt("Data", "Height and width of the crops, in pixels.", 224, type=COUNT)
    mean: str | None = opt(
        "Data", "What is subtracted from the pixels: the mean image, the mean of each channel, or nothing.",
        type=click.Choice(["pixel", "channel", "imagenet", "none"]), shown="pixel; imagenet for torchvision's",
    )  # fmt: skip
    augment: str = opt(
        "Data",
        "Random crops, flips, both or none.",
        "all",
        type=click.Choice(["all", "crop", "flip", "none"]),
    )
    color_std: float = opt(
        "Data", "Standard deviation of the PCA colour shift; 0 turns it off.", 0.1, type=click.FloatRange(0)
    )
    # ---- Network
    variant: str | None = opt(
        "Network",
        "The network: the paper's; owt, torchvision's; bn, batch normalisation in place of LRN; "
        "cifar-80sec and cifar-18pct, its author's for CIFAR-10.",
        shown="paper; that of --weights",
        type=click.Choice(["paper", "owt", "bn", "cifar-80sec", "cifar-18pct"]),
    )  # fmt: skip
    activation: str = opt(
        "Network",
        "Activation after every layer but the last.",
        "relu",
        type=click.Choice(["relu", "tanh", "sigmoid"]),
    )
    groups: str | None = opt(
        "Network", "Groups of conv2, conv4 and conv5.", type=click.Choice(["1", "2"]), shown="the variant's"
    )
    lrn: bool | None = opt(
        "Network",
        "Local response normalisation after conv1 and conv2.",
        flag="--lrn/--no-lrn",
        shown="the variant's",
    )
    pool: str = opt("Network", "Kernel and stride of the max pools, in pixels.", "3,2", callback=_pool)
    drop_layer: list[str] = opt(
        "Network", "Leave out a convolution; may be given again.", [], multiple=True, shown="none",
        type=click.Choice(["conv2", "conv3", "conv4", "conv5"]), callback=lambda _c, _p, v: sorted(set(v)),
    )  # fmt: skip
    stride: int = opt("Network", "Stride of conv1; 1 suits images of 24 to 32 pixels.", 4, type=COUNT)
    init: str | None = opt(
        "Network", "Initial weights: PyTorch's own; cuda-convnet2's, by the paper's author; the paper's text, "
        "which often never learns; He's; cuda-convnet's, for the CIFAR variants.",
        shown="the variant's: torch for paper and owt, he for bn, cuda-convnet for cifar",
        type=click.Choice(["torch", "cuda-convnet2", "paper", "he", "cuda-convnet"]),
    )  # fmt: skip
    weights: Path | None = opt(
        "Network", "Begin with the weights of a run, a checkpoint, torchvision's alexnet (.pth) or a safetensors "
        "file; layers that do not fit, such as the last with other classes, begin anew.", type=PATH, shown="none",
    )  # fmt: skip
    freeze: str | None = opt(
        "Network",
        "Keep the convolutions of --weights as they are.",
        type=click.Choice(["features"]),
        shown="nothing",
    )
    # ---- Training
    epochs: int = opt("Training", "Passes over the training set.", 90, type=COUNT, resumable=True)
    global_batch: int | None = opt(
        "Training", "Images a step, over all ranks.", type=COUNT, shown="128; 32 or 64 below 8,192 images"
    )
    lr: float | None = opt(
        "Training", "Learning rate.", type=click.FloatRange(0, min_open=True),
        shown="0.01; smaller for small batches of own photographs and the CIFAR variants",
    )  # fmt: skip
    base_batch: int | None = opt(
        "Training", "--lr is for a batch of this size and grows with --global-batch.", type=COUNT, shown="off"
    )
    bias_lr: float = opt(
        "Training", "The rate of biases over that of weights; cuda-convnet2 and Caffe have 2.", 1.0,
        type=click.FloatRange(0),
    )  # fmt: skip
    optimizer: str = opt("Training", "lars is for large batches.", "sgd", type=click.Choice(["sgd", "lars"]))
    schedule: str | None = opt(
        "Training", "plateau divides the rate by 10 when validation stops improving, step at --milestones, cosine "
        "takes it to zero.", type=click.Choice(["plateau", "step", "cosine"]),
        shown=f"plateau; cosine below {OWN_DATA:,} images",
    )  # fmt: skip
    milestones: str = opt(
        "Training", "Epochs after which --schedule step divides the rate by 10.", "", callback=_milestones,
        shown="each third of --epochs",
    )  # fmt: skip
    patience: int = opt("Training", "Epochs without progress until plateau divides the rate.", 5, type=COUNT)
    warmup_epochs: float | None = opt(
        "Training", "Epochs over which the rate rises from zero.", type=click.FloatRange(0),
        shown=f"0; 1 below {OWN_DATA:,} images",
    )  # fmt: skip
    momentum: float = opt("Training", "Momentum of SGD.", 0.9, type=RATIO)
    seed: int = opt("Training", "Seed of every random decision.", 0, type=click.IntRange(0, 2**63 - 1))
    train_error: bool = opt(
        "Training", "Log the error of the training batches, as trained.", False,
        flag="--train-error/--no-train-error", resumable=True,
    )  # fmt: skip
    # ---- Regularisation
    weight_decay: float = opt(
        "Regularisation", "Weight decay; biases have none.", 5e-4, type=click.FloatRange(0)
    )
    layer_decay: list[str] = opt(
        "Regularisation", "LAYER=DECAY: a layer's own weight decay; may be given again.", [], multiple=True,
        callback=_layer_decays, metavar="LAYER=DECAY", shown="none",
    )  # fmt: skip
    dropout: float = opt("Regularisation", "Probability of dropping a unit of fc6 and fc7.", 0.5, type=RATIO)
    label_smoothing: float = opt(
        "Regularisation", "Share of the target that goes to all classes alike.", 0.0, type=RATIO
    )
    mixup: float = opt(
        "Regularisation", "Alpha of mixup's Beta distribution; 0 turns it off.", 0.0, type=click.FloatRange(0)
    )
    ema: float = opt("Regularisation", "Decay of averaged weights; 0 turns them off.", 0.0, type=RATIO)
    # ---- Speed
    gpus: int | None = opt(
        "Speed", "0 is the CPU.", type=click.IntRange(0), shown="all there are", resumable=True
    )
    cpu_ranks: int = opt("Speed", "Processes on the CPU (with --gpus 0).", 1, type=COUNT, resumable=True)
    layout: str = opt(
        "Speed", "How the network is split across ranks; auto: hybrid where that sends less than data.", "auto",
        type=click.Choice(["auto", "data", "hybrid", "towers"]), resumable=True,
    )  # fmt: skip
    compress: bool = opt(
        "Speed", "Average gradients as bfloat16: half the bytes.", False, flag="--compress/--no-compress",
        resumable=True,
    )  # fmt: skip
    accumulate: int = opt(
        "Speed", "Parts that each rank's batch is computed in.", 1, type=COUNT, resumable=True
    )
    amp: str = opt(
        "Speed", "Mixed precision; auto: bf16 where the device computes it, fp16 on older GPUs, else off.", "auto",
        type=click.Choice(["auto", "bf16", "fp16", "off"]), resumable=True,
    )  # fmt: skip
    decoder: str = opt(
        "Speed", "On a GPU, what decodes: mixed is nvJPEG, cpu is libjpeg-turbo on the host; auto times both "
        "at the start.", "auto", type=click.Choice(["auto", "mixed", "cpu"]), resumable=True,
    )  # fmt: skip
    deterministic: bool = opt(
        "Speed", "On a GPU, the same bits for every run: slower.", False, flag="--deterministic/--no-deterministic",
        resumable=True,
    )  # fmt: skip
    checksums: bool = opt(
        "Speed", "Compare every record that is read with its checksum.", True, flag="--checksums/--no-checksums",
        resumable=True,
    )  # fmt: skip
    workers: int = opt(
        "Speed", "Processes a rank that read shards; 0: none.", 1, type=click.IntRange(0), resumable=True
    )
    decode_threads: int | None = opt(
        "Speed",
        "Threads a rank that decode.",
        type=COUNT,
        shown="the rank's share of the cores",
        resumable=True,
    )
    # ---- Run
    out: Path | None = opt("Run", "Folder of the run.", type=PATH, shown="runs/VARIANT", resumable=True)
    resume: bool = opt(
        "Run", "Continue from the newest checkpoint in --out, with its options.", False, flag="--resume",
        resumable=True, is_flag=True,
    )  # fmt: skip
    auto_resume: bool = opt(
        "Run", "--resume if --out holds a checkpoint, else begin: for restarts.", False, flag="--auto-resume",
        resumable=True, is_flag=True,
    )  # fmt: skip
    fall_back: bool = opt(
        "Run", "With --resume: use the checkpoint before a damaged one.", False, flag="--fall-back",
        resumable=True, is_flag=True,
    )  # fmt: skip
    keep: int = opt("Run", "Checkpoints to keep beside the best.", 3, type=COUNT, resumable=True)
    save_every: int = opt(
        "Run",
        "Steps between checkpoints; 0: one after each epoch.",
        0,
        type=click.IntRange(0),
        resumable=True,
    )
    log_every: int = opt("Run", "Steps between log lines.", 20, type=COUNT, resumable=True)
    tensorboard: bool = opt(
        "Run", "Write TensorBoard events.", True, flag="--tensorboard/--no-tensorboard", resumable=True
    )
    wandb: bool = opt(
        "Run",
        "Log to Weights & Biases too (pip install wandb).",
        False,
        flag="--wandb/--no-wandb",
        resumable=True,
    )
    progress: bool = opt("Run", "Show progress bars.", True, flag="--progress/--no-progress", resumable=True)

    # ---- what follows from other options

    def fill(self, images: int) -> str:
        """Choose what was not given by the number of training images; returns what was chosen, in one line.

        ImageNet's values are the paper's. Few images make few steps: smaller batches, a rate that rises over the
        first epoch and falls to zero at the end.
        """
        own = images < OWN_DATA
        batch = 128 if not own else max(32, min(128, 2 ** int(math.log2(max(1, images // 64)))))
        batch = self.global_batch or max(1, min(batch, images))
        # One weird trick (arXiv:1404.5997), section 5: a batch k times as large bears a rate sqrt(k) times as large
        lr = 0.01 if not own or self.base_batch else float(f"{0.01 * math.sqrt(batch / 128):.2g}")
        chosen = {
            "variant": "paper",
            "global_batch": batch,
            "lr": lr,
            "schedule": "cosine" if own else "plateau",
            "warmup_epochs": 1.0 if own else 0.0,
            "mean": "pixel",
        }
        if (self.variant or "paper").startswith("cifar"):  # the author's own recipe, whatever the size
            chosen |= {
                "global_batch": min(128, images),
                "lr": 0.001,
                "schedule": "step",
                "warmup_epochs": 0.0,
            }
        given = {name: getattr(self, name) for name in chosen if getattr(self, name) is not None}
        for name, value in {**chosen, **given}.items():
            setattr(self, name, value)
        self.init = self.init or DEFAULT_INIT[str(self.variant)]
        start = f"the weights of {self.weights}" if self.weights else f"{self.init}'s initial weights"
        return (
            f"{images:,} training images: {start}, batches of {self.global_batch}, rate {self.lr:g}, "
            f"schedule {self.schedule}, {self.warmup_epochs:g} epoch{'s' * (self.warmup_epochs != 1)} of warm-up"
        )

    def take_network(self, variant: str, mean: str | None, crop: int, options: dict[str, Any]) -> None:
        """Take over the network of existing weights, where nothing else was given.

        Args:
            variant, options: as AlexNet has them; mean: the value of --mean, None where any does; crop: in pixels.
        """
        self.mean = self.mean or mean
        if self.crop == Config().crop:
            self.crop = crop
        if self.variant not in (None, variant):
            return
        self.variant = variant
        renamed: dict[str, Callable[[Any], Any]] = {
            "pool": lambda pool: ",".join(map(str, pool)),
            "groups": str,
            "drop_layers": sorted,
        }
        for option, value in options.items():
            name = "drop_layer" if option == "drop_layers" else option
            if getattr(self, name) == getattr(Config(), name):
                setattr(self, name, renamed[option](value) if option in renamed else value)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.out or Path("runs") / (self.variant or "paper")

    @property
    def resume_command(self) -> str:
        """The command that continues this run."""
        return shlex.join(["python", "train.py", "--resume", "--out", str(self.folder)])

    @property
    def scaled_lr(self) -> float:
        """The learning rate for this batch (--base-batch)."""
        assert self.lr is not None and self.global_batch is not None
        return self.lr * self.global_batch / (self.base_batch or self.global_batch)

    @property
    def network_options(self) -> dict[str, Any]:
        """The keyword arguments of AlexNet that have options here."""
        kernel, stride = map(int, self.pool.split(","))
        return {
            "stride": self.stride,
            "activation": self.activation,
            "groups": int(self.groups) if self.groups else None,
            "lrn": self.lrn,
            "pool": (kernel, stride),
            "drop_layers": self.drop_layer,
        }

    @property
    def decay_by_layer(self) -> dict[str, float]:
        pairs = (entry.partition("=") for entry in self.layer_decay)
        return {layer: float(decay) for layer, _, decay in pairs}

    @property
    def drop_epochs(self) -> tuple[int, ...]:
        """--milestones as numbers."""
        return tuple(int(epoch) for epoch in self.milestones.split(",") if epoch)

    def check_ranks(self, ranks: int, gpus: int) -> None:
        """Raises UsageError where options do not go with each other or with the number of ranks."""
        assert self.global_batch
        if self.resume:  # the number of ranks may change, and with it what these are for
            self.cpu_ranks = 1 if gpus else self.cpu_ranks
            self.compress = self.compress and ranks > 1
        if gpus and self.cpu_ranks > 1:
            raise click.UsageError("--cpu-ranks goes with --gpus 0")
        if self.milestones and self.schedule != "step":
            raise click.UsageError("--milestones goes with --schedule step")
        if self.global_batch % (ranks * self.accumulate):
            raise click.UsageError(
                f"--global-batch {self.global_batch} does not divide into {ranks} ranks "
                f"x --accumulate {self.accumulate}"
            )
        if self.compress and ranks == 1:
            raise click.UsageError("--compress is for several ranks: there is one")
        if self.compress and self.layout == "towers":
            raise click.UsageError("--layout towers averages no gradients: leave --compress out")
        if self.mixup and self.global_batch // (ranks * self.accumulate) % 2:
            raise click.UsageError(
                "--mixup blends pairs: --global-batch has to leave each rank and part an even batch"
            )

    # ---- config.json

    def as_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    def save(self) -> None:
        """Write config.json of the run."""
        write_atomic(self.folder / "config.json", (json.dumps(self.as_json(), indent=2) + "\n").encode())


def checkpoint_paths(folder: Path) -> list[Path]:
    """The numbered checkpoints in a run's folder, newest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)


# --- the command line ----------------------------------------------------------------------------------------

MAX_CONFIG_BYTES = 1 << 20  # of a config.json
# of each start; never taken from another run's file. What sends data away is the user's own to turn on.
OF_THIS_START = {"out", "resume", "auto_resume", "fall_back", "wandb"}


def _read(path: Path, command: click.Command) -> dict[str, Any]:
    """The options in a config.json or recipe, converted by the options' own types; raises ModelError."""
    try:
        saved = dict(json.loads(read_regular(path, MAX_CONFIG_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{path} is not a config.json of a run ({error}): restore it, or leave it out"
        ) from None
    parameters = {parameter.name: parameter for parameter in command.params}
    if unknown := sorted(saved.keys() - {f.name for f in fields(Config)}):
        raise ModelError(f"{path} has options that train.py does not know: {', '.join(unknown)}")
    context = click.Context(command)
    options = {}
    for name, value in saved.items():
        parameter = parameters[name]
        if value is None:
            continue
        if parameter.multiple != isinstance(value, list) or isinstance(value, dict):
            raise ModelError(f"{path}: {name} cannot be {value!r}: correct it or delete the file")
        try:
            options[name] = parameter.process_value(context, value)
        except click.UsageError as error:
            raise ModelError(f"{path}: {name} cannot be {value!r} ({error.message})") from None
    return options


def _take(path: Path, context: click.Context) -> None:
    options = {k: v for k, v in _read(path, context.command).items() if k not in OF_THIS_START}
    context.default_map = {**(context.default_map or {}), **options}


def _take_config(context: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    """--config: the options of an earlier run become the defaults of this one; the command line wins."""
    if path is not None:
        _take(path, context)


def _take_recipe(context: click.Context, _parameter: click.Parameter, name: str | None) -> None:
    """--recipe: as --config; a --config beside it wins."""
    if name is not None:
        earlier = context.default_map or {}
        _take(RECIPES / f"{name}.json", context)
        context.default_map = {**(context.default_map or {}), **earlier}


def _option(name: str, metadata: Any, default: Any) -> Any:
    flags = [metadata["flag"] or "--" + name.replace("_", "-"), name]
    keywords = {"help": metadata["help"], "default": default, "show_default": metadata["shown"] or True}
    if metadata["type"]:
        keywords["type"] = metadata["type"]
    return cloup.option(*flags, **keywords, **metadata["more"])


def command(work: Callable[[Config], None]) -> click.Command:
    """train.py's click command: its options in groups, made from Config; calls `work` with what was given."""
    sections: dict[str, list[Any]] = {group: [] for group in GROUPS}
    for f in fields(Config):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        sections[f.metadata["group"]].append(_option(f.name, f.metadata, default))
    own = cloup.option(
        "--config", type=PATH, is_eager=True, expose_value=False, callback=_take_config,
        help="Repeat the run of this config.json; options given here win.",
    )  # fmt: skip
    recipe = cloup.option(
        "--recipe", type=click.Choice(sorted(path.stem for path in RECIPES.glob("*.json"))), is_eager=True,
        expose_value=False, callback=_take_recipe, help="Options of recipes/NAME.json; options given here win.",
    )  # fmt: skip
    sections["Run"] = [own, recipe, *sections["Run"]]

    def main(**options: Any) -> None:
        config = Config(**options)
        if config.weights and not (config.out or config.variant):
            raise click.UsageError(
                "--weights takes the network from a file: give --out, so that a restart finds the run"
            )
        if config.resume or config.auto_resume:
            _resume(config)
        work(config)

    main.__doc__ = work.__doc__
    for title, options in reversed(sections.items()):
        main = cloup.option_group(title, *options)(main)
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
    return cloup.command(context_settings=settings)(main)


def _resume(config: Config) -> None:
    """Take over the run's own options; those given now may only change what is resumable."""
    context = click.get_current_context()
    if config.auto_resume and not config.resume:
        config.resume = bool(checkpoint_paths(config.folder))
        if not config.resume:
            return
    path = config.folder / "config.json"
    if not path.exists():
        if checkpoint_paths(config.folder):
            raise ModelError(f"{path} is missing: restore it, or begin again with another --out")
        return  # there is no run: main reports it
    saved = {**vars(Config()), **_read(path, context.command)}
    for f in fields(Config):
        name, resumable = f.name, f.metadata["resumable"]
        if name in OF_THIS_START:
            continue
        source = context.get_parameter_source(name)
        # of a recipe or another run's config.json, what may be changed is not meant to
        if source == ParameterSource.DEFAULT or (source == ParameterSource.DEFAULT_MAP and resumable):
            setattr(config, name, saved[name])
        elif not resumable and getattr(config, name) != saved[name]:
            raise ModelError(
                f"the run in {config.folder} has {name} {saved[name]}, not {getattr(config, name)}: "
                "leave that option out to continue it, or begin another run with another --out"
            )
