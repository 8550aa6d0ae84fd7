"""Which tokens take part: their rows are packed, so that masked ones cost no matrix work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Packing", "capturing"]


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, during which no number can be read off the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Packing:
    """The unmasked tokens of (B, T) targets.

    Attributes:
        rows: Their flat indices first, in order, (B·T,), int64.
        count: How many they are. While a CUDA graph is captured nothing is packed, and masked tokens are among them.
    """

    rows: Tensor
    count: int

    @classmethod
    def of(cls, target: Tensor, ignore_index: int, count: int) -> Packing:
        """Of targets of which ``count`` are unmasked."""
        if count == target.numel():
            return cls(torch.arange(count, device=target.device), count)
        return cls(torch.argsort((target == ignore_index).reshape(-1), stable=True), count)

    def pack(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and targets of the first ``count`` rows: (count, H) and (count,)."""
        x, y = input.reshape(-1, input.shape[-1]), target.reshape(-1).contiguous()
        if self.count == y.numel():
            return x, y
        return x.index_select(0, self.rows[: self.count]), y.index_select(0, self.rows[: self.count])

    def sum_by_sequence(self, values: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        """Sums of the rows' ``values``, (count,), over each sequence's unmasked tokens: (B,)."""
        if self.count < target.numel():
            values = values.new_zeros(target.numel()).index_copy(0, self.rows[: self.count], values)
        elif capturing(target):
            values = torch.where(target.reshape(-1) != ignore_index, values, 0.0)
        return values.view(target.shape).sum(1)
