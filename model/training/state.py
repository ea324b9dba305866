"""TrainState: everything that changes during training, and the content of checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from base.errors import ModelError, one_line
from model.alexnet import AlexNet
from model.parallel.layouts import Layout
from model.parallel.ranks import Ranks
from model.training import recipe
from model.training.checkpoint import Checkpoints
from model.training.config import Config
from model.training.ema import Ema
from model.training.log import duration, size
from model.training.precision import amp_dtype, check_scale, diverged
from model.training.watch import Watch
from model.training.weights import Weights
from pipeline.load.plan import Plan
from pipeline.preprocess import Preprocess


class TrainState:
    """The network on this rank, its optimiser and schedule, and the position in the run.

    Args:
        config: the options, after `Config.fill`.
        ranks: this process's rank.
        plan: the random decisions of the run.
        classes: the manifest's classes.
        preprocess: saved in every checkpoint.
        data_sha256: hash of the training set, which must not change when a run is resumed.
        weights: the initial weights; None draws them as --init says.

    Attributes:
        network: split across the ranks; in training, call `forward` instead.
        loaded: what was loaded from `weights`, for the user.
        step: steps done.
        best: the best validation top-1 so far, in 0..1.
        loss_sum, correct, label_counts: sums on the device since the last log line.
        data_wait: seconds that the loop waited for batches since the last log line.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        plan: Plan,
        classes: list[dict[str, str | None]],
        preprocess: Preprocess,
        data_sha256: str = "",
        weights: Weights | None = None,
    ) -> None:
        assert config.variant and config.init and config.schedule and config.global_batch
        self.config, self.ranks, self.plan = config, ranks, plan
        self.classes, self.preprocess = classes, preprocess
        self.amp = amp_dtype(config.amp, ranks.device)
        self.network = AlexNet(
            len(classes), config.variant, config.dropout, image_size=config.crop, **config.network_options
        )
        recipe.initialise(self.network, config.init, config.seed)
        self.loaded = weights.into(self.network) if weights else ""
        self.network.to(ranks.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        width = (self.amp or torch.float32).itemsize
        self.layout = Layout(self.network, config.layout, ranks, config.global_batch, width, config.compress)
        if config.freeze:
            self.network.features.requires_grad_(False)
        self.optimizer = recipe.build_optimizer(
            self.network,
            config.scaled_lr,
            config.momentum,
            config.weight_decay,
            config.optimizer,
            self.layout.sum_of_slices,
            bias_lr=config.bias_lr,
            layer_decay=config.decay_by_layer,
        )
        self.schedule = recipe.Schedule(
            config.schedule,
            config.scaled_lr,
            config.epochs,
            plan.steps_per_epoch,
            config.warmup_epochs or 0.0,
            config.patience,
            config.drop_epochs,
        )
        self.scaler = self.layout.grad_scaler(self.optimizer, enabled=self.amp == torch.float16)
        self.ema = Ema(self.network, config.ema) if config.ema else None
        self.watch = Watch(len(classes), config.label_smoothing, plan.steps_per_epoch)
        self.checkpoints = Checkpoints(config.folder, config.keep)
        self.step, self.best = 0, -1.0
        # what the weights and the order of samples depend on; resume() refuses a checkpoint that differs
        self.identity = {
            "variant": config.variant,
            "seed": config.seed,
            "global_batch": config.global_batch,
            "data": data_sha256,
            "crop": config.crop,
            "mean": config.mean,
            "network": self.network.options,
        }
        self.loss_sum = torch.zeros((), device=ranks.device)
        self.correct = torch.zeros((), device=ranks.device)
        self.label_counts = torch.zeros(len(classes), dtype=torch.int64, device=ranks.device)

    def start(self) -> None:
        """Make the module to call in training; call after a checkpoint is loaded and before the first step."""
        # for DDP the graph is static if a step is one backward pass
        self.forward = self.layout.distribute(self.config.accumulate == 1, self.config.compress)
        self.train_mode()
        self._estimate_step = self.step + 100
        self._measured_seconds, self._measured_images = 0.0, 0

    def train_mode(self) -> None:
        """Return from evaluation to training mode; frozen batch normalisation keeps its statistics."""
        self.network.train()
        if self.config.freeze:
            self.network.features.eval()

    @property
    def epoch(self) -> int:
        """Complete epochs so far."""
        return self.step // self.plan.steps_per_epoch

    @property
    def end_step(self) -> int:
        return self.config.epochs * self.plan.steps_per_epoch

    @property
    def epoch_ends(self) -> bool:
        """Whether the last step was the last of its epoch."""
        return self.step % self.plan.steps_per_epoch == 0

    @property
    def save_due(self) -> bool:
        """Whether a checkpoint follows the last step: after each epoch and every --save-every steps."""
        every = self.config.save_every
        return self.epoch_ends or (every > 0 and self.step % every == 0)

    @property
    def images_left(self) -> int:
        """Training images from here to the end of the run."""
        return (self.end_step - self.step) * self.plan.global_batch

    @property
    def trained(self) -> torch.nn.Module:
        """The network to evaluate: the averaged one with --ema. Collective: call it on every rank."""
        return self.layout.plain_network(self.ema.network if self.ema else self.network)

    @property
    def checkpoint_bytes(self) -> int:
        """Approximate size of a checkpoint: weights, momentum and averaged weights in float32."""
        slices = self.layout.dims  # of these parameters each rank holds 1 / world_size
        count = sum(
            p.numel() * (self.ranks.world_size if name in slices else 1)
            for name, p in self.network.named_parameters()
        )
        return 4 * count * (3 if self.ema else 2)

    # ---- messages

    def describe(self) -> str:
        """The devices and the number format of the run, and where it resumes, for the user."""
        ranks = self.ranks
        if ranks.gpu:
            where = f"{ranks.world_size} x {torch.cuda.get_device_name(ranks.device)}"
        else:
            where = f"{ranks.world_size} x {torch.get_num_threads()} CPU threads"
        done = f", resuming after step {self.step:,} of {self.end_step:,}" if self.step else ""
        return f"training on {where}, in {str(self.amp or torch.float32).removeprefix('torch.')}{done}"

    def estimate(self) -> str:
        """The time and disk space that the run needs, at the rate so far: once, after 100 steps or the first epoch.

        Empty at other times and when nothing is left to do.
        """
        if not self._estimate_step or not (self.step >= self._estimate_step or self.epoch_ends):
            return ""
        self._estimate_step = 0
        if not self.images_left:
            return ""
        rate = self._measured_images / self._measured_seconds
        epoch = self.plan.steps_per_epoch * self.plan.global_batch
        every = self.config.save_every
        saves = self.config.epochs + (self.end_step // every if every else 0)
        files = min(self.config.keep, saves) + 1  # plus best.pt
        return (
            f"at {rate:,.0f} images/s an epoch takes {duration(epoch / rate)} and the rest of the run "
            f"{duration(self.images_left / rate)}, without validation; up to {files} checkpoints of "
            f"{size(self.checkpoint_bytes)} take {size(files * self.checkpoint_bytes)}"
            + (
                f", and {size((files + 1) * self.checkpoint_bytes)} while one is written"
                if saves > self.config.keep
                else ""
            )
        )

    # ---- checkpoints

    def save(self, best: bool = False) -> None:
        """Write a checkpoint, with `best` also as best.pt. Collective: call it on every rank."""
        model, updates = self.layout.state_dict(), self.layout.optimizer_state_dict(self.optimizer)
        averaged = self.ema.state_dict(self.layout.whole) if self.ema else {}
        if not self.ranks.first:
            return
        state = {
            "model": model,
            "optimizer": updates,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "watch": self.watch.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "seed": self.config.seed,
            "variant": self.network.variant,
            "network": self.network.options,
            "ema": averaged,
            "identity": self.identity,
            "classes": self.classes,
            "preprocess": self.preprocess.state_dict(),
        }
        self.checkpoints.save(state, best=best)

    def resume(self, say: Callable[[str], None]) -> None:
        """Continue from the newest checkpoint; raises ModelError if there is none or it is another run's.

        Args:
            say: called with a line about each damaged checkpoint that --fall-back skips.
        """
        saved = self.checkpoints.newest(self.config.fall_back, say)
        try:
            self._load(saved)
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # the checkpoint may be right
            raise
        except (
            KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError
        ) as error:  # fmt: skip
            raise ModelError(
                f"the checkpoint in {self.config.folder} does not fit this run ({one_line(error)[:200]}): "
                "give the --out of the run that wrote it, or start again with another --out"
            ) from None

    def _load(self, saved: dict[str, Any]) -> None:
        out = self.config.folder
        for key, value in self.identity.items():
            if saved["identity"].get(key) != value:
                raise ModelError(
                    f"the checkpoint in {out} has {key} {saved['identity'].get(key)}, not {value}: "
                    "resume with the options and the data of the original run"
                )
        if bool(saved["ema"]) != bool(self.ema):
            raise ModelError(
                f"the checkpoint in {out} was made {'with' if not self.ema else 'without'} --ema: "
                "resume with the original options"
            )
        self.layout.load_state_dict(saved["model"])
        self.layout.load_optimizer_state_dict(self.optimizer, saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.watch.load_state_dict(saved["watch"])
        if saved["scaler"]:  # empty without float16; --amp may have changed
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema:
            self.ema.load_state_dict(saved["ema"], self.layout.part)
        self.step, self.best = saved["step"], saved["best"]

    def check_same_step(self) -> None:
        """Raises ModelError if ranks found different checkpoints, because nodes do not share the run's folder."""
        ranks, step = self.ranks, torch.tensor(self.step, device=self.ranks.device)
        if ranks.any(ranks.sum(step).item() != self.step * ranks.world_size):
            raise ModelError(
                f"the ranks found different checkpoints in {self.config.folder}: "
                "give an --out that all nodes share"
            )

    # ---- windows: the steps between two log lines

    def start_window(self) -> None:
        """Start measuring; call again after work that is not training, such as validation."""
        self._window_start, self._window_step, self.data_wait = time.perf_counter(), self.step, 0.0

    def end_window(self) -> dict[str, float]:
        """The fields of a log line, and start the next window. Waits for the device.

        Means over the steps of the window and all ranks. Raises ModelError if training has diverged.
        """
        ranks, steps = self.ranks, self.step - self._window_step
        means = {"loss": ranks.sum(self.loss_sum).item() / steps / ranks.world_size}
        if self.config.train_error:
            images = steps * self.layout.batch * ranks.world_size
            means["error"] = 1 - ranks.sum(self.correct).item() / images
        self.watch.add(means["loss"], steps, ranks.sum(self.label_counts))
        means["guess"] = self.watch.guess()
        for total in (self.loss_sum, self.correct, self.label_counts):
            total.zero_()
        if not math.isfinite(means["loss"]):
            raise diverged(f"the loss is {means['loss']} at step {self.step}", self.config.folder)
        check_scale(self.scaler, self.config.folder)
        seconds = time.perf_counter() - self._window_start
        self._measured_seconds += seconds
        self._measured_images += steps * self.plan.global_batch
        speed = {
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": steps * self.plan.global_batch / seconds,
            "data_wait": self.data_wait / seconds,
        }
        self.start_window()
        return {"steps": steps, **speed, **means}

    # ---- the end of an epoch

    def validated(self, top1: float) -> bool:
        """Update the schedule with the validation accuracy in 0..1; returns whether it is the best so far."""
        self.schedule.validated(1 - top1, guessing=not self.watch.learnt)
        is_best = top1 > self.best
        self.best = max(self.best, top1)
        return is_best

    @torch.no_grad()
    def before_saving(self) -> None:
        """Average running statistics over ranks; raises ModelError if the weights are not finite.

        The loss of a step does not reveal that the update after it diverged.
        """
        for averaged in (self.network, self.ema.network) if self.ema else (self.network,):
            self.layout.average_buffers(averaged)
        total = sum(parameter.detach().float().sum() for parameter in self.network.parameters())
        if not torch.isfinite(self.ranks.sum(torch.as_tensor(total))):
            raise diverged("the weights are not finite", self.config.folder)
