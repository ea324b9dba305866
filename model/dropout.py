"""Dropout whose masks are a function of the place in training, the same for any number of ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import ModelError


class KeyedDropout(nn.Module):
    """Dropout (section 4.2) whose mask is a function of (key, layer, row of the global batch, unit) alone.

    So it is the same on every device and for any split of the global batch over ranks and micro-batches; for a
    slice of the units see `unit_slice`, for parts of several ranks in one input `parts`. What is kept is scaled
    by 1 / (1 - p) in training, where the paper halves activations at test time instead: the same network. Until
    `set_position` is first called, the masks come from torch's own generator.

    Args:
        p: probability of dropping a unit.
        salt: distinguishes this layer from the others that share a key.
    """

    position: Tensor

    def __init__(self, p: float, salt: int) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ModelError(f"dropout is {p}: it must be at least 0 and below 1")
        self.p, self.salt, self.keyed = p, salt, False
        self.unit_slice = 0  # inputs are this one of several equal slices of the units
        self.parts, self.stride = 1, 0  # inputs are so many parts, one below the other, each so many rows on
        # (key, first row): a tensor, so that torch.compile sees an input and not a constant to compile anew for.
        self.register_buffer("position", torch.zeros(2, dtype=torch.int64), persistent=False)

    def set_position(self, key: int, first_row: int) -> None:
        """Sets what the next masks derive from, without waiting for the device.

        Args:
            key: 0 .. 2**63 - 1, a function of (seed, epoch, step).
            first_row: the place in the global batch of the first row of the next input.
        """
        self.position[0].fill_(key)
        self.position[1].fill_(first_row)
        self.keyed = True

    def keep(self, rows: int, units: int) -> Tensor:
        """The mask (rows, units) as booleans; each value is one 32-bit hash compared with p."""
        device = self.position.device
        first, row = self.position[1], torch.arange(rows, device=device)
        if self.parts > 1:
            part = rows // self.parts
            first, row = first % self.stride, row // part * self.stride + row % part
        row = first + row
        # One hash after the other takes in key (both halves), layer and row; another takes in the unit.
        state = (self.position[0] & 0xFFFFFFFF) - 2**31
        for entering in (self.position[0] >> 32, self.salt, row):
            state = _hash(state.to(torch.int32)) ^ entering
        per_row = _hash(state.to(torch.int32))
        first_unit = self.unit_slice * units
        per_unit = _hash(torch.arange(first_unit, first_unit + units, device=device, dtype=torch.int32))
        value = _hash(per_row[:, None] ^ per_unit)
        return (value & 0x7FFFFFFF) >= round(self.p * 2**31)

    def forward(self, x: Tensor) -> Tensor:
        """Drops units of x (N, ...), of any dtype, in training; the identity in evaluation."""
        if not self.training or self.p == 0:
            return x
        if not self.keyed:
            return F.dropout(x, self.p)
        keep = self.keep(*x.flatten(1).shape).view_as(x)
        return torch.where(keep, x * (1 / (1 - self.p)), 0)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _hash(value: Tensor) -> Tensor:
    """Mixes int32 values in place, each output bit depending on all input bits ("lowbias32" by C. Wellons)."""
    # The masks clear the copies of the sign that a shift of int32 brings in; products wrap around.
    value ^= (value >> 16).bitwise_and_(0xFFFF)
    value *= 0x7FEB352D
    value ^= (value >> 15).bitwise_and_(0x1FFFF)
    value *= 0x846CA68B - 2**32
    value ^= (value >> 16).bitwise_and_(0xFFFF)
    return value
