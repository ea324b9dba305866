"""Ranks: one process per device, started here or by torchrun, and their communication."""

from __future__ import annotations

import inspect
import os
import re
import signal
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from base.errors import ModelError, UserError
from base.files import Inherited
from base.machine import STOP_SIGNALS, keep_freed_memory

GRACE = 5  # seconds after a signal in which another one is ignored
DRIVER_VERSION = Path("/sys/module/nvidia/version")


@dataclass(frozen=True)
class Ranks:
    """This process's rank and device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    gpu: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if self.gpu else torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this rank writes logs and checkpoints."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def sum_of(self, numbers: list[float]) -> list[float]:
        """The sum of each number over ranks. Collective: call it on every rank."""
        sums: list[float] = self.sum(torch.tensor(numbers, device=self.device)).tolist()
        return sums

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Collective: call it on every rank."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())


def under_torchrun() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process as a rank."""
    given = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return given <= os.environ.keys()


def launch(
    work: Callable[[Ranks, Any], None], config: Any, ranks: int, gpu: bool, lock: int | None = None
) -> None:
    """Run `work(ranks, config)` in `ranks` processes on this machine, or as one of torchrun's ranks.

    Exits with the code of the first rank that fails. SIGINT, SIGTERM and SIGHUP are passed on to all ranks, which
    handle them themselves. The ranks also hold the lock on the descriptor `lock`: if this process is killed, they
    still save.
    """
    if under_torchrun():
        rank, world, local_rank, local_world = (
            int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        place = Ranks(rank, world, local_rank, local_world, gpu)
        _as_rank(place, "env://", work, config)
    elif ranks == 1:
        if not gpu:
            keep_freed_memory()
        work(Ranks(gpu=gpu), config)
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        # the tracker of shared memory ignores SIGINT and SIGTERM by itself, but a closed terminal would end it
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        resource_tracker.ensure_running()
        signal.signal(signal.SIGHUP, before)
        errors = mp.get_context("spawn").SimpleQueue()
        held = None if lock is None else Inherited(lock)
        arguments = (ranks, gpu, address, work, config, errors, held)
        context = mp.spawn(_spawned, arguments, nprocs=ranks, join=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal also sends it to the ranks
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: [p.terminate() for p in context.processes])
        try:
            while not context.join():
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as failed:
            # ranks often fail together and for the same reason: print each message once
            messages = set()
            while not errors.empty():
                messages.add(errors.get())
            for message in sorted(messages):
                UserError(message).show()
            if not messages and isinstance(failed, mp.ProcessRaisedException):
                raise
            code = getattr(failed, "exit_code", 1)
            sys.exit(code if code > 0 else 128 - code)


def _spawned(
    rank: int,
    world: int,
    gpu: bool,
    address: str,
    work: Callable[..., None],
    config: Any,
    errors: Any,
    _held: Inherited | None,
) -> None:
    try:
        _as_rank(Ranks(rank, world, rank, world, gpu), address, work, config)
    except click.ClickException as error:
        errors.put(error.message)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)


def _as_rank(ranks: Ranks, init_method: str, work: Callable[..., None], config: Any) -> None:
    if ranks.gpu:
        torch.cuda.set_device(ranks.device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
        keep_freed_memory()
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = next(iter(dist.rendezvous(init_method, ranks.rank, ranks.world_size)))[0]
        store = dist.PrefixStore(_agree_on_name(store, ranks), store)
    dist.init_process_group(
        "nccl" if ranks.gpu else "gloo",
        init_method=None if store else init_method,
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device_id=ranks.device if ranks.gpu else None,
    )
    try:
        work(ranks, config)
    finally:
        dist.destroy_process_group()


def _agree_on_name(store: dist.Store, ranks: Ranks) -> str:
    """Agree on a name that all ranks of this start share and that no earlier start used.

    torchrun's store survives a restart and then holds the addresses of ranks that have died, and nodes may count
    restarts differently. Therefore each rank sends a unique request, to which the first rank replies with the name.
    """
    unique = uuid.uuid4().hex
    if not ranks.first:
        store.set(f"asks/{ranks.rank}", unique)
        name = store.get(f"answer/{unique}").decode()
        store.set(f"heard/{name}/{ranks.rank}", "")
        return name
    for rank in range(1, ranks.world_size):
        while not store.check([f"heard/{unique}/{rank}"]):
            if store.check([f"asks/{rank}"]):
                store.set(f"answer/{store.get(f'asks/{rank}').decode()}", unique)
            time.sleep(0.01)
    return unique


def distribute(
    model: nn.Module,
    ranks: Ranks,
    static: bool = True,
    compress: bool = False,
    ignore: Collection[str] = (),
) -> nn.Module:
    """Make a network data parallel over all ranks: the same weights on each, and averaged gradients.

    Args:
        model: the network.
        ranks: this process's rank.
        static: whether every backward pass is the same and averages gradients; not with gradient accumulation.
        compress: send gradients as bfloat16, which halves the traffic.
        ignore: names of parameters that ranks do not share.
    """
    if ranks.world_size == 1:
        return model
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(ignore))
    # every rank derives its own buffers (dropout position); the CUDA 12 pins' torch knows only the older name
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    own_buffers: dict[str, Any] = {buffers: False}
    parallel = DistributedDataParallel(
        model,
        device_ids=[ranks.local_rank] if ranks.gpu else None,
        **own_buffers,
        gradient_as_bucket_view=True,
        static_graph=static,
    )
    if compress:
        # in a lambda, because DDP refuses this hook by name without NCCL, although gloo supports bfloat16
        parallel.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    return parallel


def reduces(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Context for one part of a step: only the last part averages gradients over ranks."""
    if last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


@torch.no_grad()
def average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Average the running statistics of batch normalisation, which each rank computes on its own samples."""
    for buffer in model.buffers():
        if ranks.world_size > 1 and buffer.is_floating_point():
            ranks.sum(buffer).div_(ranks.world_size)


def count_gpus(wanted: int | None) -> int:
    """The number of GPUs to use on this machine: all if `wanted` is None; 0 is the CPU.

    Under torchrun, it is the number of ranks. Raises ModelError if there are fewer GPUs or torch cannot use them.
    """
    present = 0 if wanted == 0 else torch.cuda.device_count()
    if under_torchrun() and present:
        count = int(os.environ["LOCAL_WORLD_SIZE"])
        if count > present:
            raise ModelError(
                f"torchrun starts {count} ranks on this machine, which has {present} GPUs: "
                f"use --nproc-per-node {present}, or --gpus 0 for the CPU"
            )
    elif wanted is not None and wanted > present:
        raise ModelError(
            f"--gpus {wanted} asked for, {present} found: use --gpus {present}"
            + (" (the CPU)" if present == 0 else "")
        )
    else:
        count = present if wanted is None else wanted
    if count:
        _check_driver()
        for index in range(count):
            _check_architecture(index)
    return count


def one_gpu(wanted: int | None) -> int:
    """`count_gpus` for tools that use one GPU unless more are asked for."""
    return count_gpus(min(1, torch.cuda.device_count()) if wanted is None else wanted)


def _check_driver() -> None:
    """Raises ModelError if CUDA does not start; torch counts GPUs through the driver, without CUDA."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return
    reason = str(caught[-1].message).splitlines()[0] if caught else "CUDA does not start"
    reason = reason.removeprefix("CUDA initialization: ").split(". ")[0]
    try:
        driver = DRIVER_VERSION.read_text().strip()
    except OSError:
        driver = "of unknown version"
    raise ModelError(
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use driver {driver}: {reason}; CUDA 13 "
        "needs driver 580 or later, CUDA 12 (constraints-cuda12.txt) 525: update the driver, install the other "
        "torch (make install STACK=cuda12, docs/gpu.md), or use --gpus 0 for the CPU"
    )


def _check_architecture(index: int) -> None:
    """Raises ModelError if this build of torch has no machine code for the GPU."""
    major, minor = torch.cuda.get_device_capability(index)
    built = torch.cuda.get_arch_list()
    for kind, *version in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(built)):
        oldest = tuple(map(int, version))
        # machine code runs on later GPUs of the same generation, PTX on all later GPUs
        if (major, minor) >= oldest and (kind == "compute" or major == oldest[0]):
            return
    raise ModelError(
        f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(index)} (sm_{major}{minor}), "
        f"only for {', '.join(built)}: install a torch built for it (docs/gpu.md), or use --gpus 0 for the CPU"
    )


class StopRequest:
    """Records SIGINT, SIGTERM or SIGHUP. A second signal, more than GRACE seconds later, has its usual effect.

    A signal that was ignored when the program started (nohup) stays ignored.

    Args:
        say: whether this process tells the user what happens.
    """

    def __init__(self, say: bool = False) -> None:
        self.say = say
        self.requested = False
        self._since = 0.0
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._request)

    def _request(self, number: int, _frame: Any) -> None:
        # launchers send some signals twice, and Python runs this only when the current operator has ended
        if self.requested and time.monotonic() - self._since > GRACE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            if self.say:  # print may be what was interrupted
                line = "stopping: this step or validation ends, then the run is saved; "
                line += f"another Ctrl-C, after {GRACE} s, ends it unsaved"
                os.write(2, f"\n{line}\n".encode())
