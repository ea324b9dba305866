"""Dropout whose masks depend only on the position in training, not on the number of ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import ModelError
from model.kernels import kernels_for


class KeyedDropout(nn.Module):
    """Dropout (section 4.2) whose mask is a function of (key, layer, row of the global batch, unit).

    The mask is therefore the same on every device and however the global batch is split over ranks and
    micro-batches. Remaining units are scaled by 1 / (1 - p) in training, which is equivalent to the paper's halving
    of activations at test time. Until `set_position` is called, the masks come from torch's generator.

    Args:
        p: probability of dropping a unit.
        salt: distinguishes this layer from others with the same key.

    Attributes:
        unit_slice: the inputs are this one of several equal slices of the units.
        parts, stride: the input stacks `parts` blocks of rows whose global rows are `stride` apart.
    """

    position: Tensor

    def __init__(self, p: float, salt: int) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ModelError(f"dropout is {p}: it must be at least 0 and below 1")
        self.p, self.salt, self.keyed = p, salt, False
        self.unit_slice, self.parts, self.stride = 0, 1, 0
        # (key, first row) is a tensor so that torch.compile does not recompile when it changes
        self.register_buffer("position", torch.zeros(2, dtype=torch.int64), persistent=False)

    def set_position(self, key: int, first_row: int) -> None:
        """Set what the next masks are derived from, without waiting for the device.

        Args:
            key: a function of (seed, epoch, step) in 0 .. 2**63 - 1.
            first_row: position in the global batch of the first row of the next input.
        """
        self.position[0].fill_(key)
        self.position[1].fill_(first_row)
        self.keyed = True

    @property
    def _options(self) -> tuple[float, int, int, int, int]:
        return self.p, self.salt, self.unit_slice, self.parts, self.stride

    def keep(self, rows: int, units: int) -> Tensor:
        """The mask (rows, units) as booleans."""
        return _keep(rows, units, self.position, *self._options)

    def forward(self, x: Tensor) -> Tensor:
        """Drop units of x (N, ...), of any dtype, in training mode; the identity in evaluation mode."""
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
    """`KeyedDropout.keep`: each unit compares a 32-bit hash with p."""
    salt, unit_slice, parts, stride = options
    first, row = position[1], torch.arange(rows, device=position.device)
    if parts > 1:
        part = rows // parts
        first, row = first % stride, row // part * stride + row % part
    row = first + row
    # a chain of hashes combines both halves of the key, the layer and the row; one more adds the unit
    state = (position[0] & 0xFFFFFFFF) - 2**31
    for entering in (position[0] >> 32, salt, row):
        state = _hash(state.to(torch.int32)) ^ entering
    per_row = _hash(state.to(torch.int32))
    first_unit = unit_slice * units
    unit = torch.arange(first_unit, first_unit + units, device=position.device, dtype=torch.int32)
    value = _hash(per_row[:, None] ^ _hash(unit))
    return (value & 0x7FFFFFFF) >= round(p * 2**31)


def _hash(value: Tensor) -> Tensor:
    """Hash int32 values in place, so that each output bit depends on all input bits ("lowbias32" by C. Wellons)."""
    # the masks clear the sign bits that a right shift of int32 inserts; products wrap around
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


# --- on a GPU: one kernel instead of 84; no mask is stored, and the backward pass computes it again --------------

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
    ctx.save_for_backward(position)  # autograd raises an error if `set_position` has changed it


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (position,) = ctx.saved_tensors
    grad = torch.ops.alexnet.dropout(grad.contiguous(), position, *ctx.options)
    return grad, *[None] * (1 + len(ctx.options))


torch.library.register_autograd("alexnet::dropout", _differentiate, setup_context=_save)
