"""Train AlexNet on LMDB shards: set-up and loop, read it from top to bottom.

python train.py                      data/imagenet, all GPUs
python train.py --data D             your own photographs; what is not given follows from their number
python train.py --gpus 0 --data D    on the CPU
torchrun --nproc-per-node 8 train.py on the launcher's ranks (restarts: --auto-resume)

The modules of torch and DALI take seconds to import, so functions import them: `--help` and a wrong option
answer at once.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from base.errors import DataError, ModelError
from base.files import lock, make_directory
from base.machine import cpu_threads
from model.training.config import Config, checkpoint_paths, command
from pipeline.shards import ShardReader

if TYPE_CHECKING:
    from model.parallel.ranks import Ranks
    from model.training.weights import Weights

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, to be run again with --resume


@command
def main(config: Config) -> None:
    """Train AlexNet on LMDB shards made by tools/build_lmdb.py.

    Writes to --out: checkpoint-STEP.pt and best.pt, config.json, log.jsonl, metrics.csv and TensorBoard
    events. SIGINT, SIGTERM and SIGHUP finish the step, save and exit with code 75; --resume continues from
    there, in mid-epoch if need be.
    """
    # ---- errors are reported once, before any rank starts
    if config.fall_back and not (config.resume or config.auto_resume):
        raise click.UsageError("--fall-back goes with --resume or --auto-resume")
    if config.freeze and not config.weights:
        raise click.UsageError("--freeze keeps layers of --weights as they are: give --weights too")
    check_folder(config)
    images, classes, size = check_data(config)

    from model.parallel.ranks import count_gpus, launch, under_torchrun
    from model.training.log import writing
    from model.training.weights import load_weights

    weights = None
    if config.weights and not config.resume:
        weights = load_weights(config.weights)
        config.take_network(weights.variant, weights.mean, weights.crop, weights.options)
    chosen = config.fill(images)
    check_network(config, classes, size, weights)
    gpus = count_gpus(config.gpus)
    ranks = int(os.environ["WORLD_SIZE"]) if under_torchrun() else gpus or config.cpu_ranks
    config.check_ranks(ranks, gpus)
    with writing(config.folder):
        make_directory(config.folder)
    first = os.environ.get("RANK", "0") == "0"  # under torchrun every rank gets here
    if first and not config.resume:
        click.echo(chosen)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    taken = f"another train.py writes to {config.folder}: wait for it, or give another --out"
    with lock(config.folder / ".lock", taken) if first else nullcontext():
        launch(train, config, ranks, gpu=gpus > 0)


def check_folder(config: Config) -> None:
    """Raises ModelError where --out holds a run and none should be, or the other way round."""
    exists = bool(checkpoint_paths(config.folder))
    if exists and not config.resume:
        raise ModelError(
            f"{config.folder} holds a run already: continue it with --resume, or give another --out"
        )
    if config.resume and not exists:
        raise ModelError(f"{config.folder} holds no checkpoint to resume from: start without --resume")


def check_data(config: Config) -> tuple[int, int, int]:
    """Training images, classes and an image's side in pixels; raises DataError where the data cannot be used."""
    count = 0
    classes = {}
    for split in ("train", "val"):
        reader = ShardReader(config.data / split)
        reader.check_counts()
        count = count or len(reader)
        classes[split] = [c["wnid"] for c in reader.manifest.classes]
        size = reader.manifest.size
        reader.close()
    if classes["train"] != classes["val"]:
        raise DataError(f"train and val in {config.data} have different classes: build val again")
    return count, len(classes["train"]), size


def check_network(config: Config, classes: int, size: int, weights: Weights | None) -> None:
    """Raises ModelError where the options make no network, or one that the data or the weights do not fit."""
    import torch

    from model.alexnet import AlexNet
    from model.training import recipe

    if str(config.variant).startswith("cifar") and size > 64:
        raise ModelError(
            f"variant {config.variant} is for images of 32 pixels, those in {config.data} have {size}: "
            "build them with --size 32, or take another --variant"
        )
    with torch.device("meta"):  # no memory, no work
        network = AlexNet(classes, str(config.variant), image_size=config.crop, **config.network_options)
    recipe.check_init(str(config.init), str(config.variant))
    if weights:
        weights.check(network)


def train(ranks: Ranks, config: Config) -> None:
    """One rank's whole training run."""
    import torch

    from model.parallel.ranks import StopRequest
    from model.training.evaluation import evaluate
    from model.training.log import Log, writing
    from model.training.precision import check_scale, diverged, input_dtype
    from model.training.state import TrainState
    from model.training.step import train_step
    from model.training.weights import load_weights
    from pipeline.load.loader import DECODERS, eval_loader, time_decoders, train_loader
    from pipeline.load.plan import Plan
    from pipeline.preprocess import Preprocess

    assert config.mean and config.global_batch

    # ---- data
    train_set, val_set = (ShardReader(config.data / split, config.checksums) for split in ("train", "val"))
    preprocess = Preprocess.load(config.data / "train", config.crop, config.mean)
    plan = Plan(
        count=len(train_set),
        global_batch=config.global_batch,
        seed=config.seed,
        size=preprocess.size,
        crop=preprocess.crop,
        augment=config.augment,
        color_std=config.color_std,
    )

    # ---- network, optimiser, schedule; an earlier run's checkpoint
    if ranks.gpu:
        torch.backends.cudnn.benchmark = not config.deterministic  # chooses algorithms by time
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    manifest = train_set.manifest
    weights = load_weights(config.weights) if config.weights and not config.resume else None
    state = TrainState(config, ranks, plan, manifest.classes, preprocess, manifest.content_sha256, weights)
    if ranks.gpu:
        torch.backends.cudnn.allow_tf32 = state.amp is not None  # --amp off means float32
    if config.resume:
        state.resume(click.echo if ranks.first else lambda line: None)
    state.check_same_step()
    if config.resume and state.step >= state.end_step:
        if state.step > state.end_step:
            raise ModelError(
                f"{config.folder} has {state.epoch} epochs already: give --epochs more than that"
            )
        if ranks.first:
            click.echo(f"{config.folder} is finished, {state.epoch} epochs: continue it with more --epochs")
        return
    state.start()

    # ---- batches on the device
    loader_options: dict[str, Any] = {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "device": "gpu" if ranks.gpu else "cpu",
        "device_id": ranks.local_rank if ranks.gpu else None,
        "threads": config.decode_threads or cpu_threads(ranks.local_world_size),
        "workers": config.workers,
        "dtype": input_dtype(state.amp, ranks.device, config.mixup),
    }
    decoder_rates = ""
    if ranks.gpu:
        if config.decoder == "auto" and not config.deterministic:
            rates = time_decoders(train_set, preprocess, state.layout.batch, **loader_options)
            totals = ranks.sum(torch.tensor(rates, device=ranks.device)).tolist()
            config.decoder = DECODERS[totals.index(max(totals))]  # the same pixels on all ranks
            rated = ", ".join(f"{d} {rate:,.0f}" for d, rate in zip(DECODERS, totals, strict=True))
            decoder_rates = f", decoder {config.decoder} ({rated} images/s)" if max(totals) else ""
        loader_options["decoder"] = "mixed" if config.decoder == "auto" else config.decoder
    train_batches = train_loader(
        train_set,
        plan,
        preprocess,
        first_step=state.step,
        end_step=state.end_step,
        **loader_options | state.layout.place,
    )
    val_batch = max(1, min(config.global_batch // ranks.world_size, len(val_set)))
    val_steps = -(-len(val_set) // (val_batch * ranks.world_size))
    val_batches = eval_loader(val_set, preprocess, val_batch, **loader_options)

    # ---- log: everything to log.jsonl, an epoch a row to metrics.csv
    with writing(config.folder):
        if ranks.first:
            config.save()
        log = Log(
            config.folder,
            ranks.first,
            state.step,
            config=config.as_json() if config.wandb else None,
            tensorboard=config.tensorboard,
            progress=config.progress,
        )
    log.say(state.describe() + decoder_rates)
    if state.begins_with:
        log.say(
            f"begins with {state.begins_with}" + ("; the convolutions are frozen" if config.freeze else "")
        )
    stop = StopRequest()

    # ---- the loop
    first_step, estimated = state.step, False
    window_start, window_step, waited = time.perf_counter(), state.step, 0.0
    stopping = False
    while state.step < state.end_step and not stopping:
        epoch, step_in_epoch = divmod(state.step, plan.steps_per_epoch)
        log.bar(epoch, step_in_epoch, plan.steps_per_epoch)

        before = time.perf_counter()
        images, labels = next(train_batches)
        waited += time.perf_counter() - before
        train_step(state, images, labels)

        step = state.step
        epoch_ends = step % plan.steps_per_epoch == 0
        saving = epoch_ends or (config.save_every > 0 and step % config.save_every == 0)
        stopping = stop.requested and ranks.world_size == 1
        if saving or stopping or step % config.log_every == 0:
            # between saves, the only place where the host waits for the device; here ranks agree on stopping
            stopping = ranks.any(stop.requested)
            steps = step - window_step
            means = state.window(steps)
            if not math.isfinite(means["loss"]):
                raise diverged(f"the loss is {means['loss']} at step {step}", config.folder)
            check_scale(state.scaler, config.folder)
            seconds = time.perf_counter() - window_start
            rate = steps * config.global_batch / seconds
            log.remaining((state.end_step - step) * config.global_batch / rate)
            log.write(
                "train",
                epoch=epoch,
                step=step,
                steps=steps,
                lr=state.optimizer.param_groups[0]["lr"],
                images_per_s=rate,
                data_wait=waited / seconds,
                **means,
            )
            if not estimated and (step - first_step >= 100 or epoch_ends):
                estimated = True
                if step < state.end_step:
                    log.say(state.estimate(rate))
            window_start, window_step, waited = time.perf_counter(), step, 0.0

        is_best = False
        if saving or stopping:
            state.before_saving()
        if epoch_ends:
            guessing = state.watch.epoch_ends(step, last=step == state.end_step)
            if guessing:
                log.write("guessing", epoch=epoch, step=step, **guessing)
                log.say(
                    state.watch.advice(
                        guessing, step, fresh_start=config.init if not config.weights else None
                    )
                )
            metrics = evaluate(state.trained, log.watch(val_batches, val_steps), ranks, state.amp)
            state.train_mode()
            state.schedule.validated(1 - metrics["top1"], guessing=not state.watch.learnt)
            is_best = metrics["top1"] > state.best
            state.best = max(state.best, metrics["top1"])
            log.write("val", epoch=epoch, step=step, **metrics)
        if saving or stopping:
            state.save(is_best)
            window_start = time.perf_counter()
    if stopping:
        log.say(
            f"stopped by a signal at step {state.step} and saved: continue with\n  {resume_command(config)}"
        )
    else:
        log.say(
            f"finished: best validation top-1 {state.best:.2%}; checkpoints, log and config in {config.folder}"
        )
    log.close()
    train_batches.close()
    val_batches.close()
    ranks.any(False)  # nobody leaves before the first rank has saved: the launcher would end the others
    if stopping:
        raise click.exceptions.Exit(EXIT_INTERRUPTED)


def resume_command(config: Config) -> str:
    """What to type to continue this run."""
    return shlex.join(["python", "train.py", "--resume", "--out", str(config.folder)])


if __name__ == "__main__":
    main()
