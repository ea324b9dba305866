"""Dropout whose masks depend on the position in training alone, not on the number of ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import ModelError
from model.kernels import kernels_for


class KeyedDropout(nn.Module):
    """Dropout (section 4.2) whose mask is a function of (key, layer, row of the global batch, unit) alone.

    The mask is the same on every device and for any split of the global batch over ranks and micro-batches. Kept
    units are scaled by 1 / (1 - p) in training; the paper halves activations at test time instead, which is the
    same network. Until `set_position` is first called, masks come from torch's generator.

    Args:
        p: probability of dropping a unit.
        salt: distinguishes layers that share a key.

    Attributes:
        unit_slice: the input is this slice of the units, of several equal slices.
        parts, stride: the input stacks `parts` row blocks whose global rows are `stride` apart.
    """

    position: Tensor

    def __init__(self, p: float, salt: int) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ModelError(f"dropout is {p}: use a number of at least 0 and below 1")
        self.p, self.salt, self.keyed = p, salt, False
        self.unit_slice = 0
        self.parts, self.stride = 1, 0
        # (key, first row): a tensor, since torch.compile would recompile for each new Python number
        self.register_buffer("position", torch.zeros(2, dtype=torch.int64), persistent=False)

    def set_position(self, key: int, first_row: int) -> None:
        """Sets the position that the next masks derive from, without waiting for the device.

        Args:
            key: 0 .. 2**63 - 1, a function of (seed, epoch, step).
            first_row: row of the global batch that the next input begins with.
        """
        self.position[0].fill_(key)
        self.position[1].fill_(first_row)
        self.keyed = True

    @property
    def _options(self) -> tuple[float, int, int, int, int]:
        return self.p, self.salt, self.unit_slice, self.parts, self.stride

    def keep(self, rows: int, units: int) -> Tensor:
        """The mask (rows, units), boolean: True for units that are kept."""
        return _keep(rows, units, self.position, *self._options)

    def forward(self, x: Tensor) -> Tensor:
        """Drops units of x (N, ...), of any dtype, in training; returns x in evaluation."""
        if not self.training or self.p == 0:
            return x
        if not self.keyed:
            return F.dropout(x, self.p)
        if x.is_cuda:
            return torch.ops.alexnet.dropout(x, self.position, *self._options)
        return _formula(x, self.position, *self._options)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _keep(rows: int, units: int, position: Tensor, p: float, *options: int) -> Tensor:
    """`KeyedDropout.keep`: compares one 32-bit hash per unit with p."""
    salt, unit_slice, parts, stride = options
    first, row = position[1], torch.arange(rows, device=position.device)
    if parts > 1:
        part = rows // parts
        first, row = first % stride, row // part * stride + row % part
    row = first + row
    # Successive hashes mix in both halves of the key, the layer and the row; the last mixes in the unit.
    state = (position[0] & 0xFFFFFFFF) - 2**31
    for entering in (position[0] >> 32, salt, row):
        state = _hash(state.to(torch.int32)) ^ entering
    per_row = _hash(state.to(torch.int32))
    first_unit = unit_slice * units
    unit = torch.arange(first_unit, first_unit + units, device=position.device, dtype=torch.int32)
    value = _hash(per_row[:, None] ^ _hash(unit))
    return (value & 0x7FFFFFFF) >= round(p * 2**31)


def _hash(value: Tensor) -> Tensor:
    """Mixes int32 values in place, each output bit depending on all input bits ("lowbias32" by C. Wellons)."""
    # A right shift of int32 copies the sign, which the masks clear. Products wrap around.
    value ^= (value >> 16).bitwise_and_(0xFFFF)
    value *= 0x7FEB352D
    value ^= (value >> 15).bitwise_and_(0x1FFFF)
    value *= 0x846CA68B - 2**32
    value ^= (value >> 16).bitwise_and_(0xFFFF)
    return value


def _formula(x: Tensor, position: Tensor, p: float, *options: int) -> Tensor:
    rows, units = x.flatten(1).shape
    keep = _keep(rows, units, position, p, *options).view_as(x)
    return torch.where(keep, x * (1 / (1 - p)), 0)


# --- on a GPU: one kernel instead of 84; no mask is stored, and backward computes it again ------------------------

torch.library.define(
    "alexnet::dropout",
    "(Tensor x, Tensor position, float p, int salt, int unit_slice, int parts, int stride) -> Tensor",
)


@torch.library.impl("alexnet::dropout", "CompositeExplicitAutograd")
def _dropout(x: Tensor, position: Tensor, *options: Any) -> Tensor:
    if kernels := kernels_for(x):
        return kernels.dropout(x, position, *options)
    return _formula(x, position, *options)


@torch.library.register_fake("alexnet::dropout")
def _fake(x: Tensor, position: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, position, *ctx.options = inputs
    ctx.save_for_backward(position)  # autograd then raises if `set_position` has changed it before backward


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (position,) = ctx.saved_tensors
    grad = torch.ops.alexnet.dropout(grad.contiguous(), position, *ctx.options)
    return grad, *[None] * (1 + len(ctx.options))


torch.library.register_autograd("alexnet::dropout", _differentiate, setup_context=_save)
