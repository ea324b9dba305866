"""The options of a training run: one dataclass field per option, and the click command made from them.

Imports neither torch nor DALI, so that --help and errors in options appear at once.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Collection
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
OWN_DATA = 100_000  # with fewer images, the default values of some options depend on their number


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
    """A field of Config and its command-line option.

    Args:
        group: one of GROUPS, the section of --help.
        help: the text of --help.
        default: the default value; None if it is chosen later, as `shown` describes.
        type: a click type; None for switches.
        flag: the option's declaration if it does not follow from the field's name.
        shown: the default that --help shows.
        resumable: whether a resumed run may change the option: options for speed, length and logging.
        more: further arguments of click.option.
    """
    metadata = {"group": group, "help": help, "type": type, "flag": flag, "shown": shown}
    metadata |= {"resumable": resumable, "more": more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _pool(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Check --pool: "3,2"."""
    sizes = value.split(",")
    if len(sizes) != 2 or not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise click.BadParameter(f"{value!r} is not KERNEL,STRIDE in pixels, such as 3,2 or 2,2")
    return ",".join(str(int(size)) for size in sizes)


def _milestones(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Check --milestones: "120,130"."""
    epochs = [epoch.strip() for epoch in value.split(",")] if value else []
    if not all(epoch.isdecimal() for epoch in epochs) or sorted({int(e) for e in epochs}) != [
        int(e) for e in epochs
    ]:
        raise click.BadParameter(f"{value!r} is not a list of increasing epochs such as 120,130")
    return ",".join(epochs)


def _layer_decays(_context: click.Context, _parameter: click.Parameter, values: Any) -> list[str]:
    """Check and sort the values of --layer-decay: "fc10=1"."""
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
    """All options of train.py; a run's config.json holds these fields."""

    # ---- Data
    data: Path = opt(
        "Data", "Data set: the folder that holds train/ and val/.", Path("data/imagenet"), type=PATH,
        resumable=True,
    )  # fmt: skip
    crop: int = opt("Data", "Height and width of the crops in pixels.", 224, type=COUNT)
    mean: str | None = opt(
        "Data", "What to subtract from the pixels: the mean image, each channel's mean, ImageNet's channel "
        "means, or nothing.", type=click.Choice(["pixel", "channel", "imagenet", "none"]),
        shown="pixel; imagenet with torchvision's --weights",
    )  # fmt: skip
    augment: str = opt(
        "Data", "Random augmentation: crops and flips, only one of them, or none.", "all",
        type=click.Choice(["all", "crop", "flip", "none"]),
    )  # fmt: skip
    color_std: float = opt(
        "Data", "Standard deviation of the PCA colour shift; 0 disables it.", 0.1, type=click.FloatRange(0),
    )  # fmt: skip
    # ---- Network
    variant: str | None = opt(
        "Network", "Network: paper is the paper's, owt is torchvision's, bn has batch normalisation instead of "
        "LRN, and cifar-80sec and cifar-18pct are the author's networks for CIFAR-10.",
        shown="paper, or that of --weights",
        type=click.Choice(["paper", "owt", "bn", "cifar-80sec", "cifar-18pct"]),
    )  # fmt: skip
    activation: str = opt(
        "Network", "Activation after every layer except the last.", "relu",
        type=click.Choice(["relu", "tanh", "sigmoid"]),
    )  # fmt: skip
    groups: str | None = opt(
        "Network", "Number of groups in conv2, conv4 and conv5.", type=click.Choice(["1", "2"]),
        shown="the variant's",
    )  # fmt: skip
    lrn: bool | None = opt(
        "Network", "Use local response normalisation after conv1 and conv2.", flag="--lrn/--no-lrn",
        shown="the variant's",
    )  # fmt: skip
    pool: str = opt("Network", "Kernel size and stride of the max pools in pixels.", "3,2", callback=_pool)
    drop_layer: list[str] = opt(
        "Network", "Omit a convolution; may be repeated.", [], multiple=True, shown="none",
        type=click.Choice(["conv2", "conv3", "conv4", "conv5"]), callback=lambda _c, _p, v: sorted(set(v)),
    )  # fmt: skip
    stride: int = opt("Network", "Stride of conv1; use 1 for images of 24 to 32 pixels.", 4, type=COUNT)
    init: str | None = opt(
        "Network", "Initial weights: PyTorch's defaults, those of the author's cuda-convnet2, those of the "
        "paper's text (which often fail to learn), He's, or those of cuda-convnet for the CIFAR variants.",
        shown="torch for paper and owt, he for bn, cuda-convnet for the CIFAR variants",
        type=click.Choice(["torch", "cuda-convnet2", "paper", "he", "cuda-convnet"]),
    )  # fmt: skip
    weights: Path | None = opt(
        "Network", "Start from the weights of a run, a checkpoint, torchvision's alexnet (.pth) or a "
        "safetensors file. Fully connected layers of another shape, such as the last with other classes, get "
        "new weights.", type=PATH, shown="none",
    )  # fmt: skip
    freeze: str | None = opt(
        "Network", "Do not train the convolutions of --weights.", type=click.Choice(["features"]),
        shown="nothing",
    )  # fmt: skip
    # ---- Training
    epochs: int = opt("Training", "Number of passes over the training set.", 90, type=COUNT, resumable=True)
    global_batch: int | None = opt(
        "Training", "Images per step, over all ranks.", type=COUNT, shown="128; 32 or 64 below 8,192 images",
    )  # fmt: skip
    lr: float | None = opt(
        "Training", "Learning rate.", type=click.FloatRange(0, min_open=True),
        shown="0.01; less for small batches of your own images and for the CIFAR variants",
    )  # fmt: skip
    base_batch: int | None = opt(
        "Training", "Batch size that --lr is for: the rate is scaled by --global-batch / --base-batch.",
        type=COUNT, shown="off",
    )  # fmt: skip
    bias_lr: float = opt(
        "Training", "Learning rate of biases relative to that of weights; 2 in cuda-convnet2 and Caffe.", 1.0,
        type=click.FloatRange(0),
    )  # fmt: skip
    optimizer: str = opt(
        "Training", "Optimiser; lars is for large batches.", "sgd", type=click.Choice(["sgd", "lars"]),
    )  # fmt: skip
    schedule: str | None = opt(
        "Training", "Learning-rate schedule: plateau divides the rate by 10 when the validation error stops "
        "improving, step divides it at --milestones, cosine decays it to zero.",
        type=click.Choice(["plateau", "step", "cosine"]), shown=f"plateau; cosine below {OWN_DATA:,} images",
    )  # fmt: skip
    milestones: str = opt(
        "Training", "Epochs after which --schedule step divides the rate by 10, comma-separated.", "",
        callback=_milestones, shown="after each third of --epochs",
    )  # fmt: skip
    patience: int = opt(
        "Training", "Epochs without improvement before --schedule plateau divides the rate.", 5, type=COUNT,
    )  # fmt: skip
    warmup_epochs: float | None = opt(
        "Training", "Epochs over which the rate rises linearly from zero.", type=click.FloatRange(0),
        shown=f"0; 1 below {OWN_DATA:,} images",
    )  # fmt: skip
    momentum: float = opt("Training", "Momentum.", 0.9, type=RATIO)
    seed: int = opt("Training", "Seed of all random numbers.", 0, type=click.IntRange(0, 2**63 - 1))
    train_error: bool = opt(
        "Training", "Log the error on the training batches.", False, flag="--train-error/--no-train-error",
        resumable=True,
    )  # fmt: skip
    # ---- Regularisation
    weight_decay: float = opt(
        "Regularisation", "Weight decay; it does not apply to biases.", 5e-4, type=click.FloatRange(0),
    )  # fmt: skip
    layer_decay: list[str] = opt(
        "Regularisation", "Weight decay of one layer, such as fc10=1; may be repeated.", [], multiple=True,
        callback=_layer_decays, metavar="LAYER=DECAY", shown="none",
    )  # fmt: skip
    dropout: float = opt("Regularisation", "Probability of dropping a unit in fc6 and fc7.", 0.5, type=RATIO)
    label_smoothing: float = opt(
        "Regularisation", "Label smoothing: the share of the target that is spread evenly over all classes.",
        0.0, type=RATIO,
    )  # fmt: skip
    mixup: float = opt(
        "Regularisation", "Alpha of the Beta distribution for mixup; 0 disables it.", 0.0,
        type=click.FloatRange(0),
    )  # fmt: skip
    ema: float = opt(
        "Regularisation", "Decay of the exponential moving average of the weights; 0 disables it.", 0.0,
        type=RATIO,
    )  # fmt: skip
    # ---- Speed
    gpus: int | None = opt(
        "Speed", "Number of GPUs to use; 0 uses the CPU.", type=click.IntRange(0), shown="all", resumable=True,
    )  # fmt: skip
    cpu_ranks: int = opt("Speed", "Number of ranks on the CPU, with --gpus 0.", 1, type=COUNT, resumable=True)
    layout: str = opt(
        "Speed", "How to split the network across ranks; auto chooses hybrid if it sends less than data.",
        "auto", type=click.Choice(["auto", "data", "hybrid", "towers"]), resumable=True,
    )  # fmt: skip
    compress: bool = opt(
        "Speed", "Send gradients as bfloat16, which halves the traffic between ranks.", False,
        flag="--compress/--no-compress", resumable=True,
    )  # fmt: skip
    accumulate: int = opt(
        "Speed", "Number of parts in which each rank computes its batch, to save memory.", 1, type=COUNT,
        resumable=True,
    )  # fmt: skip
    amp: str = opt(
        "Speed", "Mixed precision; auto uses bf16 if the device supports it, fp16 on older GPUs, off on older "
        "CPUs.", "auto", type=click.Choice(["auto", "bf16", "fp16", "off"]), resumable=True,
    )  # fmt: skip
    decoder: str = opt(
        "Speed", "JPEG decoder on a GPU: mixed is nvJPEG, cpu is libjpeg-turbo on the host; auto times both at "
        "the start.", "auto", type=click.Choice(["auto", "mixed", "cpu"]), resumable=True,
    )  # fmt: skip
    deterministic: bool = opt(
        "Speed", "On a GPU, compute the same bits in every run, which is slower.", False,
        flag="--deterministic/--no-deterministic", resumable=True,
    )  # fmt: skip
    checksums: bool = opt(
        "Speed", "Verify the checksum of every record that is read.", True, flag="--checksums/--no-checksums",
        resumable=True,
    )  # fmt: skip
    workers: int = opt(
        "Speed", "Reader processes per rank; 0 reads in the main process.", 1, type=click.IntRange(0),
        resumable=True,
    )  # fmt: skip
    decode_threads: int | None = opt(
        "Speed", "Decoder threads per rank.", type=COUNT, shown="the rank's share of the cores", resumable=True,
    )  # fmt: skip
    # ---- Run
    out: Path | None = opt(
        "Run", "Folder to write the run to.", type=PATH, shown="runs/VARIANT", resumable=True,
    )  # fmt: skip
    resume: bool = opt(
        "Run", "Continue the run in --out from its newest checkpoint and with its options.", False,
        flag="--resume", resumable=True, is_flag=True,
    )  # fmt: skip
    auto_resume: bool = opt(
        "Run", "Like --resume if --out holds a checkpoint, else start a new run; for restarts by a launcher.",
        False, flag="--auto-resume", resumable=True, is_flag=True,
    )  # fmt: skip
    fall_back: bool = opt(
        "Run", "With --resume, skip damaged checkpoints and use the one before.", False, flag="--fall-back",
        resumable=True, is_flag=True,
    )  # fmt: skip
    keep: int = opt("Run", "Number of checkpoints to keep besides best.pt.", 3, type=COUNT, resumable=True)
    save_every: int = opt(
        "Run", "Steps between checkpoints; 0 saves only after each epoch.", 0, type=click.IntRange(0),
        resumable=True,
    )  # fmt: skip
    log_every: int = opt("Run", "Steps between log lines.", 20, type=COUNT, resumable=True)
    tensorboard: bool = opt(
        "Run", "Write TensorBoard events.", True, flag="--tensorboard/--no-tensorboard", resumable=True,
    )  # fmt: skip
    wandb: bool = opt(
        "Run", "Also log to Weights & Biases (pip install wandb).", False, flag="--wandb/--no-wandb",
        resumable=True,
    )  # fmt: skip
    progress: bool = opt("Run", "Show progress bars.", True, flag="--progress/--no-progress", resumable=True)

    # ---- values that follow from other options

    def fill(self, images: int) -> str:
        """Choose the options that were not given by the number of training images; returns a line for the user.

        With as many images as ImageNet has, the values are the paper's. Fewer images make fewer steps per epoch, so
        batches are smaller, and the learning rate warms up over the first epoch and decays to zero.
        """
        own = images < OWN_DATA
        batch = 128 if not own else max(32, min(128, 2 ** int(math.log2(max(1, images // 64)))))
        batch = self.global_batch or max(1, min(batch, images))
        # One weird trick (arXiv:1404.5997), section 5: scale the rate by sqrt(k) when the batch grows k times
        lr = 0.01 if not own or self.base_batch else float(f"{0.01 * math.sqrt(batch / 128):.2g}")
        chosen = {
            "variant": "paper",
            "global_batch": batch,
            "lr": lr,
            "schedule": "cosine" if own else "plateau",
            "warmup_epochs": 1.0 if own else 0.0,
            "mean": "pixel",
        }
        if (self.variant or "paper").startswith("cifar"):  # the author's; the rest is in his recipe
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

    def take_network(
        self, given: Collection[str], variant: str, mean: str | None, crop: int, options: dict[str, Any]
    ) -> None:
        """Take the network's options from existing weights unless they were given.

        Args:
            given: names of the options that were given.
            variant, options: as AlexNet takes them.
            mean: the value of --mean; None if it is unknown.
            crop: side of the network's input in pixels.
        """
        self.mean = self.mean or mean
        if "crop" not in given:
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
            if name not in given:
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
        """The learning rate for this batch size (--base-batch)."""
        assert self.lr is not None and self.global_batch is not None
        return self.lr * self.global_batch / (self.base_batch or self.global_batch)

    @property
    def poor_start(self) -> bool:
        """Whether the network starts from weights with which it often learns nothing."""
        default = DEFAULT_INIT[str(self.variant)]
        return not self.weights and self.init in ("paper", "he") and self.init != default

    @property
    def network_options(self) -> dict[str, Any]:
        """Keyword arguments for AlexNet."""
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
        """Raises UsageError if options conflict with each other or with the number of ranks."""
        assert self.global_batch
        if self.resume:  # the number of ranks may have changed
            self.cpu_ranks = 1 if gpus else self.cpu_ranks
            self.compress = self.compress and ranks > 1
        if gpus and self.cpu_ranks > 1:
            raise click.UsageError("--cpu-ranks needs --gpus 0")
        if self.milestones and self.schedule != "step":
            raise click.UsageError("--milestones needs --schedule step")
        if self.global_batch % (ranks * self.accumulate):
            raise click.UsageError(
                f"--global-batch {self.global_batch} is not divisible by {ranks} ranks "
                f"x --accumulate {self.accumulate}: choose a multiple of {ranks * self.accumulate}"
            )
        if self.compress and ranks == 1:
            raise click.UsageError("--compress needs several ranks: omit it")
        if self.compress and self.layout == "towers":
            raise click.UsageError("--layout towers averages no gradients: omit --compress")
        if self.mixup and self.global_batch // (ranks * self.accumulate) % 2:
            raise click.UsageError(
                "--mixup blends pairs: choose a --global-batch that gives each rank and part an even number"
            )

    # ---- config.json

    def as_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    def save(self) -> None:
        """Write the run's config.json."""
        write_atomic(self.folder / "config.json", (json.dumps(self.as_json(), indent=2) + "\n").encode())


def checkpoint_paths(folder: Path) -> list[Path]:
    """The numbered checkpoints in a run's folder, newest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)


# --- the command line ----------------------------------------------------------------------------------------

MAX_CONFIG_BYTES = 1 << 20  # of a config.json
# never taken from a file; wandb sends data to a server, so only the user may turn it on
OF_THIS_START = {"out", "resume", "auto_resume", "fall_back", "wandb"}


def _read(path: Path, command: click.Command) -> dict[str, Any]:
    """Read the options in a config.json or recipe and convert them to their types; raises ModelError."""
    try:
        saved = dict(json.loads(read_regular(path, MAX_CONFIG_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is not a config.json of a run ({error}): restore the file") from None
    parameters = {parameter.name: parameter for parameter in command.params}
    if unknown := sorted(saved.keys() - {f.name for f in fields(Config)}):
        raise ModelError(f"{path} has options that train.py does not know: {', '.join(unknown)}; remove them")
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
            raise ModelError(f"{path}: {name} cannot be {value!r}: {error.message}") from None
    return options


def _take(path: Path, context: click.Context) -> None:
    options = {k: v for k, v in _read(path, context.command).items() if k not in OF_THIS_START}
    context.default_map = {**(context.default_map or {}), **options}


def _take_config(context: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    """--config: use the options of another run as defaults; the command line takes precedence."""
    if path is not None:
        _take(path, context)


def _take_recipe(context: click.Context, _parameter: click.Parameter, name: str | None) -> None:
    """--recipe: like --config; a --config takes precedence."""
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
    """Make the click command of train.py, with one option per field of Config; it calls `work` with a Config."""
    sections: dict[str, list[Any]] = {group: [] for group in GROUPS}
    for f in fields(Config):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        sections[f.metadata["group"]].append(_option(f.name, f.metadata, default))
    own = cloup.option(
        "--config", type=PATH, is_eager=True, expose_value=False, callback=_take_config,
        help="Use the options in a config.json; options on the command line take precedence.",
    )  # fmt: skip
    recipe = cloup.option(
        "--recipe", type=click.Choice(sorted(path.stem for path in RECIPES.glob("*.json"))), is_eager=True,
        expose_value=False, callback=_take_recipe,
        help="Use the options in recipes/NAME.json; options on the command line take precedence.",
    )  # fmt: skip
    sections["Run"] = [own, recipe, *sections["Run"]]

    def main(**options: Any) -> None:
        config = Config(**options)
        if config.weights and not (config.out or config.variant):
            raise click.UsageError(
                "--weights determines the default --out: give --out, so that a restart finds the run"
            )
        if config.resume or config.auto_resume:
            _resume(config)
        work(config)

    main.__doc__ = work.__doc__
    for title, options in reversed(sections.items()):
        main = cloup.option_group(title, *options)(main)
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
    return cloup.command(context_settings=settings)(main)


def given_options() -> set[str]:
    """Names of the options on the command line, and of those that --config or --recipe changed from the default."""
    context, defaults = click.get_current_context(), vars(Config())
    given = set()
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        # files hold all options
        changed = source == ParameterSource.DEFAULT_MAP and value != defaults.get(name)
        if source == ParameterSource.COMMANDLINE or changed:
            given.add(name)
    return given


def _resume(config: Config) -> None:
    """Take the options of the run in --out; the command line may only change those that are resumable."""
    context = click.get_current_context()
    if config.auto_resume and not config.resume:
        config.resume = bool(checkpoint_paths(config.folder))
        if not config.resume:
            return
    path = config.folder / "config.json"
    if not path.exists():
        if checkpoint_paths(config.folder):
            raise ModelError(f"{path} is missing: restore it, or start again with another --out")
        return  # there is no run; main reports that
    saved = {**vars(Config()), **_read(path, context.command)}
    for f in fields(Config):
        name, resumable = f.name, f.metadata["resumable"]
        if name in OF_THIS_START:
            continue
        source = context.get_parameter_source(name)
        # a recipe or another run's config.json does not change resumable options
        if source == ParameterSource.DEFAULT or (source == ParameterSource.DEFAULT_MAP and resumable):
            setattr(config, name, saved[name])
        elif not resumable and getattr(config, name) != saved[name]:
            raise ModelError(
                f"the run in {config.folder} has {name} {saved[name]}, not {getattr(config, name)}: "
                "leave that option out to continue it, or start another run with another --out"
            )
