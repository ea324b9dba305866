"""Layouts: how a network is split across ranks. All layouts compute the same function.

    data    every rank holds all weights and computes its part of the batch; gradients are averaged
    hybrid  the convolutions are data parallel; each rank holds a slice of the fully connected layers (nine tenths
            of the weights) and computes it for the whole batch, so the gradients of these layers are never sent
            ("One weird trick", Krizhevsky 2014, arXiv:1404.5997)
    towers  each of two ranks holds half of each layer's kernels and sees the whole batch; they exchange maps before
            layers that read all of them: in `paper`, conv3 and the fully connected layers (paper, section 3.2)

In every layout, state dicts are those of the plain network: gathered when saved, sliced when loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from base.errors import ModelError
from model.alexnet import AlexNet
from model.dropout import KeyedDropout
from model.lrn import LRN
from model.parallel.ranks import Ranks, average_buffers, distribute

# collectives that autograd differentiates; torch before 2.13 has them under older names
if hasattr(funcol, "all_gather_single"):
    _gather_single, _scatter_single = funcol.all_gather_single, funcol.reduce_scatter_single
else:
    _gather_single, _scatter_single = funcol.all_gather_tensor_autograd, funcol.reduce_scatter_tensor_autograd
LAYOUTS = ("auto", "data", "hybrid", "towers")


def bytes_sent(
    network: AlexNet, kind: str, ranks: int, global_batch: int, width: int = 4, compress: bool = False
) -> float:
    """Bytes that each rank sends per step in the layout "data" or "hybrid".

    For a sliced layer, "data" sends the gradients of its weights, and "hybrid" sends the inputs (of the last layer
    the outputs) and their gradients. Tensors that are gathered in forward are reduced in backward, so each rank
    sends (ranks - 1) / ranks of the whole twice; the same holds for an averaged gradient.

    Args:
        width: bytes of an activation, which autocast halves.
        compress: whether gradients are sent as bfloat16.
    """
    *hidden, last = [layer for layer in network.classifier if isinstance(layer, nn.Linear)]
    shared = sum(p.numel() for p in network.parameters())
    units = 0
    if kind == "hybrid":
        shared -= sum(p.numel() for layer in hidden for p in layer.parameters()) + last.weight.numel()
        units = sum(layer.in_features for layer in hidden) + last.out_features
    total = shared * (2 if compress else 4) + global_batch * units * width
    return 2 * (ranks - 1) / ranks * total


def automatic(network: AlexNet, ranks: int, global_batch: int, width: int = 4, compress: bool = False) -> str:
    """The layout that sends fewer bytes: "hybrid" or "data". See `bytes_sent` for the arguments."""
    hidden = [layer for layer in network.classifier if isinstance(layer, nn.Linear)][:-1]
    if ranks == 1 or not hidden or any(layer.out_features % ranks for layer in hidden):
        return "data"
    return min(
        ("data", "hybrid"),
        key=lambda kind: bytes_sent(network, kind, ranks, global_batch, width, compress),
    )


class Layout:
    """Splits a network across all ranks, in place; create the optimiser afterwards.

    Args:
        network: the same weights on every rank.
        kind: one of LAYOUTS. On a single rank, all of them are the plain network. "auto": see `automatic`.
        ranks: this process's rank.
        global_batch: images per step over all ranks.
        width, compress: see `bytes_sent`; for "auto".

    Attributes:
        place: the `rank` and `world_size` for this rank's loader.
        batch: the number of images per step that this rank loads.
        first_row: their position in the global batch.
        dims: name of each sliced tensor -> the dimension in which it is sliced.

    Raises:
        ModelError: the network or the number of ranks does not allow this layout.
    """

    def __init__(
        self,
        network: AlexNet,
        kind: str,
        ranks: Ranks,
        global_batch: int,
        width: int = 4,
        compress: bool = False,
    ) -> None:
        if kind not in LAYOUTS:
            raise ModelError(f"no layout {kind!r}: choose one of {', '.join(LAYOUTS)}")
        if kind == "towers" and ranks.world_size > 2:
            raise ModelError(f"--layout towers is for 2 ranks, not {ranks.world_size}: use data or hybrid")
        if kind == "auto":
            kind = automatic(network, ranks.world_size, global_batch, width, compress)
        self.network, self.ranks = network, ranks
        self.kind = kind if ranks.world_size > 1 else "data"
        whole_batch = self.kind == "towers"
        self.place = {
            "rank": 0 if whole_batch else ranks.rank,
            "world_size": 1 if whole_batch else ranks.world_size,
        }
        self.batch = global_batch // self.place["world_size"]
        self.first_row = self.place["rank"] * self.batch
        self.dims: dict[str, int] = {}
        self._sliced: Tensor | None = None  # which parameters are slices, in the order of `sum_of_slices`
        if self.kind != "data":
            self._plain = copy.deepcopy(network).to("meta")
            if self.kind == "towers":
                self._split_features()
            self._split_classifier()

    def _split_features(self) -> None:
        """Keep half of the kernels; layers that need all maps gather them."""
        first = True
        for name, layer in list(self.network.features.named_children()):
            if isinstance(layer, nn.Conv2d):
                if layer.groups == 1 and not first:
                    layer.register_forward_pre_hook(lambda _, args: (_gather_units(args[0]),))
                layer.groups = 1
                layer.out_channels //= 2
                self._slice(f"features.{name}", layer, ("weight", "bias"))
                layer.in_channels, first = layer.weight.shape[1], False
            elif isinstance(layer, nn.BatchNorm2d):
                layer.num_features //= 2
                self._slice(f"features.{name}", layer, ("weight", "bias", "running_mean", "running_var"))
            elif isinstance(layer, LRN):
                setattr(self.network.features, name, _EdgedLRN(layer, self.ranks.rank))

    def _split_classifier(self) -> None:
        """Slice the outputs of fc6 and fc7 and the inputs of fc8, whose partial sums are then added."""
        classifier, n = self.network.classifier, self.ranks.world_size
        linears = [name for name, layer in classifier.named_children() if isinstance(layer, nn.Linear)]
        if self.kind == "hybrid" and len(linears) == 1:
            raise ModelError(
                "--layout hybrid needs hidden fully connected layers, and this network has none: use --layout data"
            )
        sliced = self.kind == "towers"  # whether the activations at this point are a slice of the units
        for name, layer in list(classifier.named_children()):
            if isinstance(layer, KeyedDropout) and sliced:
                layer.unit_slice = self.ranks.rank
                if self.kind == "hybrid":
                    layer.parts, layer.stride = n, self.batch
            if name == linears[-1]:
                last = _SplitInputs(layer, own_rows=self.kind == "hybrid", ranks=n)
                self._slice(f"classifier.{name}", last, ("weight",), dim=1)
                setattr(classifier, name, last)
            elif isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(
                    (lambda _, args: (_gather_units(args[0]),))
                    if sliced
                    else (lambda _, args: (_gather_rows(args[0], n),))
                )
                layer.out_features //= n
                self._slice(f"classifier.{name}", layer, ("weight", "bias"))
                sliced = True

    def _slice(self, prefix: str, layer: nn.Module, names: Iterable[str], dim: int = 0) -> None:
        for name in names:
            full = getattr(layer, name)
            if full is None:
                continue
            if full.shape[dim] % self.ranks.world_size:
                raise ModelError(
                    f"--layout {self.kind} cannot divide the {full.shape[dim]} units of {prefix} into "
                    f"{self.ranks.world_size} ranks: use --layout data"
                )
            self.dims[f"{prefix}.{name}"] = dim
            part = self.part(f"{prefix}.{name}", full.detach())
            setattr(layer, name, nn.Parameter(part) if isinstance(full, nn.Parameter) else part)

    # ---- slices and whole tensors

    def part(self, name: str, whole: Tensor) -> Tensor:
        """A copy of this rank's slice of the tensor `name` in the plain network's state dict."""
        if name not in self.dims:
            return whole
        return whole.chunk(self.ranks.world_size, self.dims[name])[self.ranks.rank].clone()

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Gather the whole tensor `name` from this rank's slice. Collective: call it on every rank."""
        if name not in self.dims:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self._n)]
        dist.all_gather(parts, part.detach().contiguous())
        return torch.cat(parts, self.dims[name])

    @property
    def _n(self) -> int:
        return self.ranks.world_size

    def state_dict(self) -> dict[str, Tensor]:
        """The plain network's state dict. Collective: call it on every rank."""
        return {name: self.whole(name, value) for name, value in self.network.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a plain network's state dict."""
        self.network.load_state_dict({name: self.part(name, value) for name, value in state.items()})

    def optimizer_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state dict of the plain network's optimiser. Collective: call it on every rank."""
        state = optimizer.state_dict()
        names = [name for name, _ in self._parameters(optimizer)]
        for index, entry in state["state"].items():
            entry = {k: self.whole(names[index], v) if _is_array(v) else v for k, v in entry.items()}
            state["state"][index] = entry
        return state

    def load_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load the state dict of a plain network's optimiser; raises ValueError if it is another optimiser's."""
        groups = [group.keys() for group in optimizer.param_groups]
        if [group.keys() for group in state["param_groups"]] != groups:
            raise ValueError("its optimiser has other groups of parameters")
        parameters = self._parameters(optimizer)
        local: dict[int, dict[str, Any]] = {}
        for index, entry in state["state"].items():
            name, parameter = parameters[index]
            parts = {k: self.part(name, v) if _is_array(v) else v for k, v in entry.items()}
            if any(_is_array(v) and v.shape != parameter.shape for v in parts.values()):
                raise ValueError(f"its optimiser state of {name} does not fit")
            # in the memory format of the parameter, which fused optimisers assume
            local[index] = {
                k: torch.empty_like(parameter).copy_(v) if _is_array(v) else v for k, v in parts.items()
            }
        optimizer.load_state_dict({**state, "state": local})

    def _parameters(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
        """Name and parameter in the order of the optimiser's indices."""
        names = {id(p): name for name, p in self.network.named_parameters()}
        return [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]

    # ---- training

    def distribute(self, static: bool = True, compress: bool = False) -> nn.Module:
        """The module to call in training, which averages the gradients of weights that ranks share.

        `static` and `compress`: see `model.parallel.ranks.distribute`.
        """
        if self.kind == "towers":
            return self.network
        return distribute(self.network, self.ranks, static, compress, self.dims.keys())

    def plain_network(self, network: nn.Module) -> nn.Module:
        """The plain network with the weights of `network`, for evaluation. Collective: call it on every rank.

        Args:
            network: the split network, or its moving average.
        """
        if self.kind == "data":
            return network
        plain = copy.deepcopy(self._plain).to_empty(device=self.ranks.device)
        plain.load_state_dict({name: self.whole(name, value) for name, value in network.state_dict().items()})
        return plain

    def average_buffers(self, network: nn.Module) -> None:
        """Average running statistics over ranks, except in towers, where they cover the whole batch."""
        if self.kind != "towers":
            average_buffers(network, self.ranks)

    def sum_of_slices(self, values: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        """Sum `values`, (P, ...) with one row per parameter, over ranks for parameters that are slices."""
        if not self.dims:
            return values
        if self._sliced is None:  # computed once: the copy to the device is synchronous
            names = {id(p): name for name, p in self.network.named_parameters()}
            self._sliced = torch.tensor([names[id(p)] in self.dims for p in parameters], device=values.device)
        sliced = self._sliced.view(-1, *[1] * (values.dim() - 1))
        return torch.where(sliced, self.ranks.sum(values.clone()), values)

    def grad_scaler(self, optimizer: torch.optim.Optimizer, enabled: bool) -> torch.amp.GradScaler:
        """The loss scaler for float16. If ranks hold slices, an overflow on one rank skips the step on all."""
        device = self.ranks.device.type
        # LARS uses the gradients' norms, so they must be unscaled before its step
        whole = getattr(optimizer, "_step_supports_amp_scaling", False)
        if whole and self.kind == "data":
            return torch.amp.GradScaler(device, enabled=enabled)
        # the optimiser's fused step skips overflows on the device; otherwise the scaler would wait for the device
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        if self.kind == "data":
            return _UnscaleFirst(device, enabled=enabled)
        return _ShardedScaler(device, enabled=enabled, process_group=_world())


class _UnscaleFirst(torch.amp.GradScaler):
    """Unscales gradients before the step instead of within a fused optimiser's step."""

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        if self.is_enabled():
            self.unscale_(optimizer)
            for found in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                found.clamp_(max=1)  # a sum over ranks, but fused optimisers expect 1
        return super().step(optimizer, *args, **kwargs)


class _ShardedScaler(_UnscaleFirst, ShardedGradScaler):
    pass


class _SplitInputs(nn.Linear):
    """The last layer, of which each rank holds the columns for its slice of the inputs.

    Maps (N, in_features / ranks) to the logits of this rank's rows (`own_rows`) or of all rows. Each rank's loss is
    the mean over its own rows, or with all rows the same loss on every rank. In both cases the gradient that is
    passed back is that of the mean over all rows.
    """

    def __init__(self, layer: nn.Module, own_rows: bool, ranks: int) -> None:
        assert isinstance(layer, nn.Linear)
        super().__init__(layer.in_features // ranks, layer.out_features, device="meta")
        self.weight, self.bias, self.own_rows, self.ranks = layer.weight, layer.bias, own_rows, ranks

    def forward(self, x: Tensor) -> Tensor:
        partial = _scale_gradient(F.linear(x, self.weight), 1 / self.ranks)
        logits = funcol.wait_tensor(_scatter_single(partial, "sum", 0, _world()))
        return (logits if self.own_rows else _all_gather(logits)) + self.bias


class _EdgedLRN(nn.Module):
    """LRN of one tower's maps whose windows include maps of the other tower, which equals LRN over all maps."""

    def __init__(self, lrn: LRN, rank: int) -> None:
        super().__init__()
        self.lrn, self.rank = lrn, rank

    def forward(self, x: Tensor) -> Tensor:
        reach, own = self.lrn.size // 2, x.shape[1]
        if self.rank == 0:
            theirs = _gather_units(x[:, own - reach :])[:, reach:]
            y = self.lrn(_channels_last(torch.cat([x, theirs], 1)))[:, :own]
        else:
            theirs = _gather_units(x[:, :reach])[:, :reach]
            y = self.lrn(_channels_last(torch.cat([theirs, x], 1)))[:, reach:]
        return _channels_last(y)


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _all_gather(x: Tensor) -> Tensor:
    """Concatenate x of all ranks to (ranks * N, ...); the gradient is summed over ranks."""
    return funcol.wait_tensor(_gather_single(x.contiguous(), 0, _world()))


def _gather_rows(x: Tensor, ranks: int) -> Tensor:
    """Gather the whole batch from the parts of all ranks.

    The gradient of the mean over all rows (see _SplitInputs) is scaled to that of the mean over this rank's rows,
    as DDP expects.
    """
    return _all_gather(_scale_gradient(x, ranks))


def _gather_units(x: Tensor) -> Tensor:
    """Gather the units (or maps) of all ranks: (N, C, ...) to (N, ranks * C, ...), channels-last."""
    parts = _all_gather(x.movedim(1, -1)).split(len(x))
    return torch.cat(parts, -1).movedim(-1, 1)


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient multiplied by `factor` in the backward pass."""
    if x.requires_grad:
        x = x.view_as(x)  # so that the hook affects only this use of x
        x.register_hook(lambda gradient: gradient * factor)
    return x


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
