"""Train AlexNet on LMDB shards: one command, one loop, read it from top to bottom.

python train.py                      data/imagenet, all GPUs, the paper's recipe
python train.py --gpus 0 --data D    on the CPU
torchrun --nproc-per-node 8 train.py on the launcher's ranks (restarts: --auto-resume)
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from tqdm import tqdm

from base.errors import DataError, ModelError
from base.files import write_atomic
from base.machine import cpu_threads
from model.alexnet import ACTIVATIONS, DROPPABLE, VARIANTS, AlexNet
from model.parallel.layouts import LAYOUTS, Layout
from model.parallel.ranks import Ranks, count_gpus, launch, reduces, under_torchrun
from model.training import recipe
from model.training.checkpoint import Checkpoints
from model.training.ema import Ema
from model.training.evaluation import evaluate
from model.training.mixup import cross_entropy, mix
from pipeline.load.loader import eval_loader, train_loader
from pipeline.load.plan import AUGMENTATIONS, Plan
from pipeline.preprocess import MEANS, Preprocess
from pipeline.shards import ShardReader

# What --resume may change: how fast and how long. The weights' path stays but for rounding, except that batch
# normalisation is over each rank's part of a batch, and that --epochs stretches the schedules that end with it.
CHANGEABLE = {
    "out",
    "data",
    "resume",
    "auto_resume",
    "fall_back",
    "gpus",
    "cpu_ranks",
    "layout",
    "compress",
    "epochs",
    "accumulate",
    "amp",
    "compiled",
    "workers",
}
CHANGEABLE |= {"decode_threads", "keep", "save_every", "log_every", "train_error"}
CHANGEABLE |= {"tensorboard", "wandb", "progress"}
# of each start, never taken over from another one's config.json
OWN = {"out", "resume", "auto_resume", "fall_back"}
RECIPES = Path(__file__).parent / "recipes"
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, to be run again with --resume


def option(*names: str, **kwargs: Any) -> Any:
    return click.option(*names, show_default=kwargs.pop("show_default", True), **kwargs)


def repeat_config(context: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    """The options of an earlier run become the defaults of this one; the command line has the last word."""
    if path is None:
        return
    known = {parameter.name for parameter in context.command.params}
    try:
        options = json.loads(path.read_text())
        unknown = options.keys() - known
    except (OSError, ValueError, AttributeError) as error:
        raise click.BadParameter(f"{path} is no config.json of a run ({error})") from None
    if unknown:
        raise click.BadParameter(
            f"{path} has options that train.py does not know: {', '.join(sorted(unknown))}"
        )
    # where the earlier run lies is its own matter
    kept = {k: v for k, v in options.items() if v is not None and k not in OWN}
    # a whole run says more than a recipe, whichever comes first
    context.default_map = {**(context.default_map or {}), **kept}


def take_recipe(context: click.Context, parameter: click.Parameter, name: str | None) -> None:
    """The options of recipes/NAME.json, as --config; a --config beside it wins."""
    if name is not None:
        earlier = context.default_map or {}
        repeat_config(context, parameter, RECIPES / f"{name}.json")
        context.default_map = {**(context.default_map or {}), **earlier}


def pool_sizes(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """ "3,2" -> "3,2"; refuses what is not two whole numbers."""
    sizes = value.split(",")
    if len(sizes) != 2 or not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise click.BadParameter(f"{value!r} is not KERNEL,STRIDE in pixels: 3,2 overlaps, 2,2 does not")
    return ",".join(str(int(size)) for size in sizes)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@option(
    "--config", type=click.Path(path_type=Path), is_eager=True, expose_value=False, callback=repeat_config,
    help="Repeat the run of this config.json; options given here win.",
)  # fmt: skip
@option(
    "--recipe", type=click.Choice(sorted(path.stem for path in RECIPES.glob("*.json"))), is_eager=True,
    expose_value=False, callback=take_recipe, help="Options of recipes/NAME.json; options given here win.",
)  # fmt: skip
@option(
    "--data", type=click.Path(path_type=Path), default=Path("data/imagenet"), help="Holds train/ and val/."
)
@option("--out", type=click.Path(path_type=Path), default=None, show_default="runs/VARIANT", help="The run.")
@option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out, with its options.")
@option("--auto-resume", is_flag=True, help="--resume if --out holds a checkpoint, else begin: for restarts.")
@option("--fall-back", is_flag=True, help="With --resume: pass over a damaged checkpoint for the one before.")
@option("--gpus", type=click.IntRange(0), default=None, show_default="all there are", help="0 is the CPU.")
@option("--cpu-ranks", type=click.IntRange(1), default=1, help="Processes on the CPU (with --gpus 0).")
@option("--layout", type=click.Choice(LAYOUTS), default="data", help="How the network lies on several ranks.")
@option("--compress/--no-compress", default=False, help="Average gradients as bfloat16: half the bytes.")
@option("--variant", type=click.Choice(list(VARIANTS)), default="paper")
@option("--activation", type=click.Choice(list(ACTIVATIONS)), default="relu")
@option("--groups", type=click.Choice(["1", "2"]), default=None, show_default="the variant's")
@option("--lrn/--no-lrn", default=None, show_default="the variant's", help="Local response normalisation.")
@option("--pool", callback=pool_sizes, default="3,2", help="Kernel and stride of the max pools, in pixels.")
@option(
    "--drop-layer", type=click.Choice(DROPPABLE), multiple=True, callback=lambda _c, _p, v: sorted(set(v)),
    show_default="none", help="Leave out a convolution; may be given again.",
)  # fmt: skip
@option("--stride", type=click.IntRange(1), default=4, help="Of conv1; 1 suits images of 24 to 32 pixels.")
@option("--epochs", type=click.IntRange(1), default=90)
@option("--global-batch", type=click.IntRange(1), default=128, help="Images a step, over all ranks.")
@option(
    "--accumulate", type=click.IntRange(1), default=1, help="Parts that each rank's batch is computed in."
)
@option("--lr", type=click.FloatRange(0, min_open=True), default=0.01)
@option(
    "--base-batch", type=click.IntRange(1), default=None, show_default="off",
    help="--lr is for a batch of this size and grows with --global-batch.",
)  # fmt: skip
@option("--optimizer", type=click.Choice(recipe.OPTIMIZERS), default="sgd", help="lars: for large batches.")
@option("--schedule", type=click.Choice(recipe.SCHEDULES), default="plateau")
@option(
    "--patience", type=click.IntRange(1), default=5, help="Epochs without progress until lr / 10 (plateau)."
)
@option("--warmup-epochs", type=click.FloatRange(0), default=0.0)
@option("--momentum", type=click.FloatRange(0, 1, max_open=True), default=0.9)
@option("--weight-decay", type=click.FloatRange(0), default=5e-4)
@option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.5)
@option("--init", type=click.Choice(recipe.INITS), default=None, show_default="the variant's")
@option("--mean", type=click.Choice(MEANS), default="pixel", help="What is subtracted from the pixels.")
@option(
    "--augment", type=click.Choice(AUGMENTATIONS), default="all", help="Random crops, flips, both or none."
)
@option("--color-std", type=click.FloatRange(0), default=0.1, help="Of the PCA colour shift; 0 turns it off.")
@option("--crop", type=click.IntRange(1), default=224)
@option(
    "--label-smoothing", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="Share of all classes."
)
@option("--mixup", type=click.FloatRange(0), default=0.0, help="Alpha of its Beta distribution; 0: off.")
@option(
    "--ema",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Decay of averaged weights; 0: off.",
)
@option(
    "--train-error/--no-train-error", default=False, help="Log the error of the training batches, as trained."
)
@option("--amp", type=click.Choice(["auto", "bf16", "fp16", "off"]), default="auto", help="Mixed precision.")
@option("--compile/--no-compile", "compiled", default=False, help="torch.compile the network.")
@option("--seed", type=click.IntRange(0, 2**63 - 1), default=0)
@option("--workers", type=click.IntRange(0), default=1, help="Processes a rank that read shards; 0: none.")
@option(
    "--decode-threads", type=click.IntRange(1), default=None, show_default="the rank's share of the cores"
)
@option("--keep", type=click.IntRange(1), default=3, help="Checkpoints to keep beside the best.")
@option("--save-every", type=click.IntRange(0), default=0, help="Steps between checkpoints; 0: each epoch.")
@option("--log-every", type=click.IntRange(1), default=20, help="Steps between log lines (and loss reads).")
@option("--tensorboard/--no-tensorboard", default=True)
@option("--wandb/--no-wandb", default=False, help="Log to Weights & Biases too (pip install wandb).")
@option("--progress/--no-progress", default=True)
def main(**config: Any) -> None:
    """Train AlexNet on LMDB shards made by tools/build_lmdb.py.

    Writes to --out: checkpoint-STEP.pt and best.pt, config.json, log.jsonl, metrics.csv and TensorBoard
    events. SIGINT or SIGTERM finish the step, save and exit with code 75; --resume goes on from there, in
    mid-epoch if need be.
    """
    config["out"] = config["out"] or Path("runs") / config["variant"]
    if config["fall_back"] and not (config["resume"] or config["auto_resume"]):
        raise click.UsageError("--fall-back goes with --resume or --auto-resume")
    if config["auto_resume"]:
        config["resume"] = config["resume"] or bool(Checkpoints(config["out"]).paths())
    if config["resume"]:
        resume_config(config)
    config["init"] = config["init"] or recipe.DEFAULT_INIT[config["variant"]]
    if under_torchrun():
        gpus = 0 if config["gpus"] == 0 else torch.cuda.device_count()
        ranks = int(os.environ["WORLD_SIZE"])
    else:
        gpus = count_gpus(config["gpus"])
        ranks = gpus or config["cpu_ranks"]
    if gpus and config["cpu_ranks"] > 1:
        raise click.UsageError("--cpu-ranks goes with --gpus 0")
    if config["global_batch"] % (ranks * config["accumulate"]):
        raise click.UsageError(
            f"--global-batch {config['global_batch']} does not divide into {ranks} ranks "
            f"x --accumulate {config['accumulate']}"
        )
    if config["layout"] != "data" and config["compiled"]:
        raise click.UsageError("--compile goes with --layout data")
    if config["compress"] and ranks == 1:
        raise click.UsageError("--compress is for several ranks: there is one")
    if config["compress"] and config["layout"] == "towers":
        raise click.UsageError("--layout towers averages no gradients: leave --compress out")
    if config["mixup"] and config["global_batch"] // (ranks * config["accumulate"]) % 2:
        raise click.UsageError(
            "--mixup blends pairs: --global-batch has to leave each rank and part an even batch"
        )
    if config["resume"] and not Checkpoints(config["out"]).paths():
        Checkpoints(config["out"]).newest()  # says that there is none
    # whatever can be wrong with the data or the output is said once, before any rank starts
    for split in ("train", "val"):
        reader = ShardReader(config["data"] / split)
        reader.check_counts()
        reader.close()
    if not config["resume"] and Checkpoints(config["out"]).paths():
        raise ModelError(f"{config['out']} holds a run already: go on with --resume, or give another --out")
    with writing(config["out"]):
        config["out"].mkdir(parents=True, exist_ok=True)
    launch(train, config, ranks, gpu=gpus > 0)


def resume_config(config: dict[str, Any]) -> None:
    """A run that goes on does so with its own options; those given now may only change what is CHANGEABLE."""
    path = config["out"] / "config.json"
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        return  # there is no run, or not yet a checkpoint: that is said later
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({error}): restore it, the run's options are in it") from None
    context = click.get_current_context()
    for name in config.keys() & saved.keys():
        source = context.get_parameter_source(name)
        # of a recipe or another run's config.json, what may be changed is not meant to
        if source == ParameterSource.DEFAULT or (
            source == ParameterSource.DEFAULT_MAP and name in CHANGEABLE
        ):
            if name not in OWN:
                config[name] = Path(saved[name]) if isinstance(config[name], Path) else saved[name]
        elif name not in CHANGEABLE and config[name] != saved[name]:
            raise ModelError(
                f"the run in {config['out']} has {name} {saved[name]}, not {config[name]}: "
                "leave that option out to go on with it, or begin another run with another --out"
            )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written, said in one line."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"cannot write {path}: {error.strerror or error}; free space or give another --out"
        ) from None


def train(ranks: Ranks, config: dict[str, Any]) -> None:
    """One rank's whole training run."""
    # ---- data
    train_set, val_set = ShardReader(config["data"] / "train"), ShardReader(config["data"] / "val")
    classes = train_set.manifest.classes
    if [c["wnid"] for c in val_set.manifest.classes] != [c["wnid"] for c in classes]:
        raise DataError(f"train and val in {config['data']} have different classes: build val again")
    preprocess = Preprocess.load(config["data"] / "train", config["crop"], config["mean"])
    plan = Plan(
        count=len(train_set),
        global_batch=config["global_batch"],
        seed=config["seed"],
        size=preprocess.size,
        crop=preprocess.crop,
        augment=config["augment"],
        color_std=config["color_std"],
    )
    end_step = config["epochs"] * plan.steps_per_epoch

    # ---- network, optimiser, schedule
    if ranks.gpu:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    amp = amp_dtype(config["amp"], ranks.device)
    kernel, stride = map(int, config["pool"].split(","))
    network = AlexNet(
        len(classes),
        config["variant"],
        config["dropout"],
        image_size=config["crop"],
        stride=config["stride"],
        activation=config["activation"],
        groups=int(config["groups"]) if config["groups"] else None,
        lrn=config["lrn"],
        pool=(kernel, stride),
        drop_layers=config["drop_layer"],
    )
    recipe.initialise(network, config["init"], config["seed"])
    network = network.to(ranks.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    layout = Layout(network, config["layout"], ranks, config["global_batch"])
    lr = config["lr"] * config["global_batch"] / (config["base_batch"] or config["global_batch"])
    optimizer = recipe.build_optimizer(
        network, lr, config["momentum"], config["weight_decay"], config["optimizer"], layout.sum_of_slices
    )
    schedule = recipe.Schedule(
        config["schedule"],
        lr,
        config["epochs"],
        plan.steps_per_epoch,
        config["warmup_epochs"],
        config["patience"],
    )
    scaler = layout.grad_scaler(optimizer, enabled=amp == torch.float16)
    ema = Ema(network, config["ema"]) if config["ema"] else None
    best = -1.0

    # ---- where an earlier run stopped
    checkpoints, step = Checkpoints(config["out"], config["keep"]), 0
    # what the weights and the stream of samples depend on: a checkpoint of anything else is refused
    identity = {
        "variant": config["variant"],
        "seed": config["seed"],
        "global_batch": config["global_batch"],
        "data": train_set.manifest.content_sha256,
        "crop": config["crop"],
        "mean": config["mean"],
        "network": network.options,
    }
    if config["resume"]:
        saved = checkpoints.newest(config["fall_back"], click.echo if ranks.first else lambda line: None)
        began = {"network": {}, **saved["identity"]}  # checkpoints without it are of the variant as it is
        for key, value in identity.items():
            if began.get(key) != value:
                raise ModelError(
                    f"the checkpoint in {config['out']} has {key} {began.get(key)}, not {value}: "
                    "resume with the options (and data) that the run began with"
                )
        layout.load_state_dict(saved["model"])
        layout.load_optimizer_state_dict(optimizer, saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        if saved["scaler"]:  # empty without float16, and --amp may change on the way
            scaler.load_state_dict(saved["scaler"])
        if bool(saved.get("ema")) != bool(ema):
            raise ModelError(
                f"the checkpoint in {config['out']} was made {'with' if not ema else 'without'} --ema"
            )
        if ema:
            ema.load_state_dict(saved["ema"], layout.part)
        step, best = saved["step"], saved["best"]
        del saved
    if ranks.any(ranks.sum(torch.tensor(step, device=ranks.device)).item() != step * ranks.world_size):
        raise ModelError(
            f"the ranks find different checkpoints in {config['out']}: give an --out that all nodes share"
        )

    # DDP may take the graph as static when one eager backward pass makes a step
    static = config["accumulate"] == 1 and not config["compiled"]
    parallel = layout.distribute(static, config["compress"])
    forward = torch.compile(parallel) if config["compiled"] else parallel

    loader_options = {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "device": "gpu" if ranks.gpu else "cpu",
        "device_id": ranks.local_rank if ranks.gpu else None,
        "threads": config["decode_threads"] or cpu_threads(ranks.local_world_size),
        "workers": config["workers"],
        "dtype": input_dtype(amp, ranks.device, config["mixup"]),
    }
    train_batches = train_loader(
        train_set, plan, preprocess, first_step=step, end_step=end_step, **loader_options | layout.place
    )
    val_batch = max(1, min(config["global_batch"] // ranks.world_size, len(val_set)))
    val_batches = eval_loader(val_set, preprocess, val_batch, **loader_options)

    # ---- log: everything to log.jsonl, an epoch a row to metrics.csv
    with writing(config["out"]):
        log = Log(config, ranks, step)
    log.say(describe(ranks, amp))
    stop = StopRequest()

    def save(is_best: bool = False) -> None:
        # every rank takes part: these are gathered where ranks hold slices
        model, updates = layout.state_dict(), layout.optimizer_state_dict(optimizer)
        averaged = ema.state_dict(layout.whole) if ema else {}
        if ranks.first:
            state = {
                "model": model,
                "optimizer": updates,
                "schedule": schedule.state_dict(),
                "scaler": scaler.state_dict(),
                "epoch": step // plan.steps_per_epoch,
                "step": step,
                "best": best,
                "seed": config["seed"],
                "variant": config["variant"],
                "network": network.options,
                "ema": averaged,
                "identity": identity,
                "classes": classes,
                "preprocess": preprocess.state_dict(),
            }
            checkpoints.save(state, best=is_best)

    # ---- the loop
    loss_sum, hits = torch.zeros((), device=ranks.device), torch.zeros((), device=ranks.device)
    window_start, window_step, waited = time.perf_counter(), step, 0.0
    stopping = False
    while step < end_step:
        epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
        log.bar(epoch, step_in_epoch, plan.steps_per_epoch)

        before = time.perf_counter()
        images, labels = next(train_batches)
        waited += time.perf_counter() - before

        recipe.set_lr(optimizer, schedule.lr(step))
        dropout_key = plan.dropout_key(epoch, step_in_epoch)
        first_row, part = layout.first_row, layout.batch // config["accumulate"]
        optimizer.zero_grad(set_to_none=True)
        keep = None
        if config["mixup"]:
            mine = slice(first_row, first_row + layout.batch)
            keep = torch.from_numpy(plan.mixup(epoch, step_in_epoch, config["mixup"])[mine])
            if ranks.gpu:  # copied without waiting for the steps before
                keep = keep.pin_memory().to(ranks.device, non_blocking=True)
            images = mix(images, keep)
        for i in range(config["accumulate"]):
            rows = slice(i * part, (i + 1) * part)
            network.set_position(dropout_key, first_row + rows.start)
            with reduces(parallel, last=i == config["accumulate"] - 1):
                with torch.autocast(ranks.device.type, amp or torch.bfloat16, enabled=amp is not None):
                    logits = forward(images[rows]).float()
                    shares = keep if keep is None else keep[rows]
                    loss = cross_entropy(logits, labels[rows], config["label_smoothing"], shares)
                    loss = loss / config["accumulate"]
                scaler.scale(loss).backward()
            loss_sum += loss.detach()
            if config["train_error"]:
                hits += (logits.detach().argmax(1) == labels[rows]).sum()
        scaler.step(optimizer)
        scaler.update()
        if ema:
            ema.update(network)
        step += 1

        epoch_ends = step % plan.steps_per_epoch == 0
        saving = epoch_ends or (config["save_every"] > 0 and step % config["save_every"] == 0)
        stopping = stop.requested and ranks.world_size == 1
        if saving or stopping or step % config["log_every"] == 0:
            # the only place where the host waits for the device; several ranks agree here on stopping
            stopping = ranks.any(stop.requested)
            steps = step - window_step
            mean_loss = ranks.sum(loss_sum).item() / steps / ranks.world_size
            if not math.isfinite(mean_loss):
                raise diverged(f"the loss is {mean_loss} at step {step}", config["out"])
            errors = {}
            if config["train_error"]:
                errors["error"] = 1 - ranks.sum(hits).item() / steps / (layout.batch * ranks.world_size)
            check_scale(scaler, config["out"])
            seconds = time.perf_counter() - window_start
            log.write(
                "train",
                epoch=epoch,
                step=step,
                loss=mean_loss,
                lr=optimizer.param_groups[0]["lr"],
                images_per_s=steps * config["global_batch"] / seconds,
                data_wait=waited / seconds,
                **errors,
            )
            loss_sum.zero_()
            hits.zero_()
            window_start, window_step, waited = time.perf_counter(), step, 0.0

        is_best = False
        if saving or stopping:
            for averaged in (network, ema.network) if ema else (network,):
                layout.average_buffers(averaged)
            check_finite(network, ranks, config["out"])
        if epoch_ends:
            watched = log.watch(val_batches, -(-len(val_set) // (val_batch * ranks.world_size)))
            measured = layout.plain_network(ema.network if ema else network)
            metrics = evaluate(measured, watched, ranks, amp)
            schedule.validated(1 - metrics["top1"])
            is_best = metrics["top1"] > best
            best = max(best, metrics["top1"])
            log.write("val", epoch=epoch, step=step, **metrics)
        if saving or stopping:
            save(is_best)
            window_start = time.perf_counter()
        if stopping:
            log.say(f"stopped by a signal at step {step}, saved: go on with --resume")
            break
    if not stopping:
        log.say(f"best validation top-1 {best:.2%}; checkpoints, log and config are in {config['out']}")
    log.close()
    train_batches.close()
    val_batches.close()
    ranks.any(False)  # nobody leaves before the first rank has saved: the launcher would end the others
    if stopping:
        raise click.exceptions.Exit(EXIT_INTERRUPTED)


def diverged(what: str, out: Path) -> ModelError:
    return ModelError(
        f"{what}: training has diverged; the checkpoints in {out} are from before: "
        "resume with --amp off, or begin again with a lower --lr"
    )


def check_scale(scaler: torch.amp.GradScaler, out: Path) -> None:
    """Float16 skips a step whose gradients overflow and halves the loss scale: bounded at a scale of 1.

    From the first scale, 65,536, that is 17 steps skipped in a row (seen at the next log line).
    """
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise diverged("float16 gradients overflow at any loss scale", out)


@torch.no_grad()
def check_finite(network: torch.nn.Module, ranks: Ranks, out: Path) -> None:
    """No checkpoint holds a diverged network: the loss of a step tells nothing of the update after it."""
    total = sum(parameter.detach().float().sum() for parameter in network.parameters())
    if not torch.isfinite(ranks.sum(torch.as_tensor(total))):
        raise diverged("the weights are not finite", out)


def describe(ranks: Ranks, amp: torch.dtype | None) -> str:
    """What the run computes on, and in which type of number: the reason for most differences in speed."""
    if ranks.gpu:
        where = f"{ranks.world_size} x {torch.cuda.get_device_name(ranks.device)}"
    else:
        where = f"{ranks.world_size} x {torch.get_num_threads()} CPU threads"
    return f"training on {where}, in {str(amp or torch.float32).removeprefix('torch.')}"


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The autocast type: bfloat16 where the device computes it, float16 on older GPUs, None on older CPUs."""
    if choice == "auto":
        if device.type == "cuda":
            choice = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            choice = "bf16" if has_bf16 else "off"
    if choice == "fp16" and device.type == "cpu":
        raise ModelError("--amp fp16 needs a GPU: use --amp bf16 or --amp off on the CPU")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]


def input_dtype(amp: torch.dtype | None, device: torch.device, mixup: float = 0) -> torch.dtype:
    """Of the loader's images: float16 on a GPU (DALI knows no bfloat16), on the CPU what autocast makes of them."""
    if amp is None:
        return torch.float32
    if device.type == "cuda":
        return torch.float16
    return torch.float32 if mixup else amp  # what is mixed is rounded afterwards, once


class StopRequest:
    """Set by SIGINT or SIGTERM; a second signal kills as usual."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, _frame: Any) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)


class Log:
    """log.jsonl, metrics.csv, TensorBoard and the progress bar; on other ranks than the first, nothing."""

    FIELDS = ("epoch", "step", "loss", "lr", "images_per_s", "data_wait", "val_loss", "top1", "top5")

    def __init__(self, config: dict[str, Any], ranks: Ranks, step: int) -> None:
        self.on, self.progress = ranks.first, config["progress"]
        self._bar: tqdm | None = None
        self._epoch: dict[str, Any] = {}  # of the epoch so far: its last line, with the mean loss in it
        if not self.on:
            return
        out: Path = config["out"]
        out.mkdir(parents=True, exist_ok=True)
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in config.items()}
        write_atomic(out / "config.json", (json.dumps(plain, indent=2) + "\n").encode())
        self.jsonl_path, self.csv_path = out / "log.jsonl", out / "metrics.csv"
        self._forget_after(step)
        self._epoch["step"] = step  # later than the last line where some are missing
        self.jsonl = self.jsonl_path.open("a")
        self.tensorboard = None
        if config["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
        self.wandb = None
        if config["wandb"]:
            try:
                import wandb
            except ImportError:
                raise ModelError("--wandb needs its package: pip install -e '.[wandb]'") from None
            identity = out / "wandb-id"  # a resumed run goes on under its own
            if not (step and identity.exists()):
                identity.write_text(uuid.uuid4().hex)
            options = {"id": identity.read_text(), "name": out.name, "resume": "allow"}
            self.wandb = wandb.init(project="alexnet-dali", config=plain, **options)

    def _forget_after(self, step: int) -> None:
        """A resumed run repeats the steps after its checkpoint: their lines go, also a half-written one."""
        kept: list[str] = []
        rows: list[dict[str, Any]] = []
        if step and self.jsonl_path.exists():
            for line in self.jsonl_path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break
                if entry["step"] <= step:
                    kept.append(line + "\n")
                    rows += self._row(entry)
        table = io.StringIO()
        writer = csv.DictWriter(table, self.FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        for path, text in ((self.jsonl_path, "".join(kept)), (self.csv_path, table.getvalue())):
            write_atomic(path, text.encode())

    def _row(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """The epoch's row of metrics.csv once its validation is known.

        `loss` is the mean over the epoch's steps, the rest of its last line. A line's loss is the mean since the
        line before, wherever a stop put that.
        """
        if entry["kind"] == "train":
            new = entry["step"] - self._epoch.get("step", 0)  # steps that this line speaks of
            if new <= 0:  # of a log that somebody put together
                return []
            loss, steps = self._epoch.get("loss", 0.0), self._epoch.get("steps", 0)
            if self._epoch.get("epoch") != entry["epoch"]:
                loss, steps = 0.0, 0
            mean = (loss * steps + entry["loss"] * new) / (steps + new)
            self._epoch = {**entry, "loss": mean, "steps": steps + new}
            return []
        if self._epoch.get("epoch") != entry["epoch"]:  # its training lines are lost
            self._epoch = {"epoch": entry["epoch"], "step": entry["step"]}
        row = {k: self._epoch.get(k) for k in self.FIELDS[:6]}
        return [row | {"val_loss": entry["loss"], "top1": entry["top1"], "top5": entry["top5"]}]

    def write(self, kind: str, **entry: Any) -> None:
        if self.on:
            with writing(self.jsonl_path):
                self._write(kind, entry)

    def _write(self, kind: str, entry: dict[str, Any]) -> None:
        entry = {"kind": kind, **entry}
        self.jsonl.write(json.dumps(entry) + "\n")
        self.jsonl.flush()
        for row in self._row(entry):
            with self.csv_path.open("a", newline="") as file:
                csv.DictWriter(file, self.FIELDS, lineterminator="\n").writerow(row)
        curves = {f"{kind}/{k}": v for k, v in entry.items() if k not in ("kind", "epoch", "step", "count")}
        if self.tensorboard:
            for name, value in curves.items():
                self.tensorboard.add_scalar(name, value, entry["step"])
        if self.wandb:
            self.wandb.log(curves, step=entry["step"])
        if kind == "train" and self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {entry['loss']:.3f}, {entry['images_per_s']:.0f} images/s, "
                f"waiting for data {entry['data_wait']:.0%}"
            )
        if kind == "val":
            self.say(
                f"epoch {entry['epoch'] + 1}: train loss {self._epoch.get('loss', math.nan):.3f}, "
                f"val loss {entry['loss']:.3f}, top-1 {entry['top1']:.2%}, top-5 {entry['top5']:.2%}"
            )

    def bar(self, epoch: int, step_in_epoch: int, steps: int) -> None:
        """One progress bar an epoch, moved once a step."""
        if not (self.on and self.progress):
            return
        if self._bar is None or step_in_epoch == 0:
            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(
                total=steps, initial=step_in_epoch, desc=f"epoch {epoch + 1}", unit="step", leave=False
            )
        else:
            self._bar.update()

    def watch(self, batches: Iterable[Any], total: int) -> Iterable[Any]:
        """Validation's progress bar."""
        show = self.on and self.progress
        return tqdm(batches, "validating", total, unit="batch", leave=False) if show else batches

    def say(self, line: str) -> None:
        if self.on:
            tqdm.write(line)

    def close(self) -> None:
        if self.on:
            if self._bar is not None:
                self._bar.close()
            self.jsonl.close()
            if self.tensorboard:
                self.tensorboard.close()
            if self.wandb:
                self.wandb.finish()


if __name__ == "__main__":
    main()
