"""Train AlexNet on LMDB shards. Read from top to bottom: the checks, the set-up, the loop.

python train.py                       ImageNet in data/imagenet, on all GPUs
python train.py --data D              your own photographs; the defaults depend on their number
python train.py --gpus 0 --data D     on the CPU
torchrun --nproc-per-node 8 train.py  with a launcher (--auto-resume for restarts)

torch and DALI take seconds to import, so they are imported inside functions: --help and errors in options
appear at once.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from base.errors import ModelError
from base.files import lock, make_directory
from base.machine import cpu_threads
from model.training.config import Config, command, given_options

if TYPE_CHECKING:
    from model.parallel.ranks import Ranks

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: the run was saved and continues with --resume


@command
def main(config: Config) -> None:
    """Train AlexNet on LMDB shards made by tools/build_lmdb.py.

    Writes checkpoint-STEP.pt, best.pt, config.json, log.jsonl, metrics.csv and TensorBoard events to --out. On
    SIGINT, SIGTERM or SIGHUP it finishes the current step, saves and exits with code 75; --resume then continues
    from that step.
    """
    # ---- checks: errors are reported once, before any rank starts
    if config.fall_back and not (config.resume or config.auto_resume):
        raise click.UsageError("--fall-back needs --resume or --auto-resume")
    if config.freeze and not config.weights:
        raise click.UsageError("--freeze keeps the convolutions of --weights: give --weights too")
    from model.training.checks import check_data, check_folder, check_network

    check_folder(config)
    images, classes, size = check_data(config)

    from model.parallel.ranks import count_gpus, launch, under_torchrun
    from model.training.log import writing
    from model.training.weights import load_weights

    weights = None
    if config.weights and not config.resume:
        weights = load_weights(config.weights)
        config.take_network(given_options(), weights.variant, weights.mean, weights.crop, weights.options)
    chosen = config.fill(images)
    check_network(config, classes, size, weights)
    del weights
    gpus = count_gpus(config.gpus)
    ranks = int(os.environ["WORLD_SIZE"]) if under_torchrun() else gpus or config.cpu_ranks
    config.check_ranks(ranks, gpus)
    with writing(config.folder):
        make_directory(config.folder)
    first = os.environ.get("RANK", "0") == "0"  # under torchrun every rank runs this
    if first and not config.resume:
        click.echo(chosen)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    taken = f"another train.py writes to {config.folder}: wait for it, or give another --out"
    with lock(config.folder / ".lock", taken) if first else nullcontext() as descriptor:
        launch(train, config, ranks, gpu=gpus > 0, lock=descriptor)


def train(ranks: Ranks, config: Config) -> None:
    """Train on one rank, from set-up to the end of the run."""
    import torch

    from model.parallel.ranks import StopRequest
    from model.training.evaluation import evaluate
    from model.training.log import Log, writing
    from model.training.precision import input_dtype
    from model.training.state import TrainState
    from model.training.step import train_step
    from model.training.weights import load_weights
    from pipeline.load.loader import eval_loader, fastest_decoder, train_loader
    from pipeline.load.plan import Plan
    from pipeline.preprocess import Preprocess
    from pipeline.shards import ShardReader

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

    # ---- network, optimiser, schedule; the checkpoint to resume from
    if ranks.gpu:
        torch.backends.cudnn.benchmark = not config.deterministic  # picks algorithms by their time
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    manifest = train_set.manifest
    weights = load_weights(config.weights) if config.weights and not config.resume else None
    state = TrainState(config, ranks, plan, manifest.classes, preprocess, manifest.content_sha256, weights)
    del weights
    load_weights.cache_clear()
    if ranks.gpu:
        torch.backends.cudnn.allow_tf32 = state.amp is not None  # --amp off means float32
    if config.resume:
        state.resume(click.echo if ranks.first else lambda line: None)
    state.check_same_step()
    if config.resume and state.step >= state.end_step:
        if state.step > state.end_step:
            raise ModelError(
                f"{config.folder} has {state.epoch} epochs already: give a larger --epochs to continue"
            )
        if ranks.first:
            click.echo(
                f"{config.folder} is finished, {state.epoch} epochs: give a larger --epochs to continue"
            )
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
            config.decoder, decoder_rates = fastest_decoder(
                train_set, preprocess, state.layout.batch, ranks.sum_of, **loader_options
            )
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

    # ---- log: all entries in log.jsonl, one row per epoch in metrics.csv
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
    if state.loaded:
        log.say(f"starting from {state.loaded}" + ("; the convolutions are frozen" if config.freeze else ""))
    stop = StopRequest(say=ranks.first)

    # ---- the loop
    stopping = False
    state.start_window()
    while state.step < state.end_step and not stopping:
        epoch, step_in_epoch = divmod(state.step, plan.steps_per_epoch)
        log.bar(epoch, step_in_epoch, plan.steps_per_epoch)

        before = time.perf_counter()
        images, labels = next(train_batches)
        state.data_wait += time.perf_counter() - before
        train_step(state, images, labels)

        stopping = stop.requested and ranks.world_size == 1
        if not (state.save_due or stopping or state.step % config.log_every == 0):
            continue

        # the host waits for the device only from here on; the ranks agree whether to stop
        stopping = ranks.any(stop.requested)
        window = state.end_window()
        log.remaining(state.images_left / window["images_per_s"])
        log.write("train", epoch=epoch, step=state.step, **window)
        if estimate := state.estimate():
            log.say(estimate)
        if not (state.save_due or stopping):
            continue

        state.before_saving()
        is_best = False
        if state.epoch_ends:
            guessing = state.watch.epoch_ends(state.step, last=state.step == state.end_step)
            if guessing:
                log.write("guessing", epoch=epoch, step=state.step, **guessing)
                log.say(state.watch.advice(guessing, state.step, config.poor_start))
            metrics = evaluate(state.trained, log.watch(val_batches, val_steps), ranks, state.amp)
            state.train_mode()
            is_best = state.validated(metrics["top1"])
            log.write("val", epoch=epoch, step=state.step, **metrics)
        state.save(is_best)
        state.start_window()

    # ---- the end
    if stopping:
        log.say(
            f"stopped by a signal at step {state.step} and saved: continue with\n  {config.resume_command}"
        )
    else:
        log.say(
            f"finished: best validation top-1 {state.best:.2%}; checkpoints, log and config in {config.folder}"
        )
    log.close()
    train_batches.close()
    val_batches.close()
    ranks.any(False)  # wait until the first rank has saved: the launcher kills the others when one exits
    if stopping:
        raise click.exceptions.Exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
