"""Packing the rows of unmasked tokens, so that masked tokens cost no matrix work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.kernels.device.packing.kernels import pack_targets_kernel, sequence_sums_kernel
from ktonum.kernels.device.trace import note

__all__ = ["Packing", "capturing"]


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured. During a capture nothing can be read from the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Packing:
    """The unmasked tokens of (B, T) targets.

    Attributes:
        rows: Flat indices of all tokens, (B·T,), int64: first the unmasked ones in their order, then the masked ones in
            theirs.
        targets: The targets of ``rows``, (B·T,), int64.
        starts: Where in ``rows`` the unmasked tokens of each sequence begin, and where the last ones end: (B + 1,),
            int64.
        count: How many rows are scored: the unmasked ones if the host knows how many there are, otherwise all.
        known: Whether the host knows it.
    """

    rows: Tensor
    targets: Tensor
    starts: Tensor
    count: int
    known: bool

    @classmethod
    def of(cls, target: Tensor, vocabulary: int, ignore_index: int, counts: Tensor) -> Packing:
        """Pack ``target``, without waiting for the device.

        Args:
            target: (B, T), int64.
            vocabulary: V.
            ignore_index: Marks masked tokens.
            counts: Written, (2,), int64: the number of unmasked targets, and of those that are outside the vocabulary.
        """
        (batch, tokens), size = target.shape, target.numel()
        # Even, because Triton compiles another kernel for pointers that are not multiples of 16 bytes.
        even = size + size % 2
        memory = torch.empty(2 * even + batch + 1, dtype=torch.int64, device=target.device)
        rows, targets, starts = memory[:size], memory[even : even + size], memory[2 * even :]
        pack_targets_kernel[(1,)](
            target.contiguous(),
            rows,
            targets,
            starts,
            counts,
            batch=batch,
            tokens=tokens,
            vocabulary=vocabulary,
            ignore_index=ignore_index,
            BLOCK=2048,
            num_warps=8,
        )
        note("pack_targets_kernel", target.dtype, sequences=batch, tokens=tokens)
        return cls(rows, targets, starts, size, known=False)

    @property
    def limit(self) -> Tensor | None:
        """The number of unmasked tokens, (1,), int64, if the host does not know it; otherwise None."""
        return None if self.known else self.starts[-1:]

    def pack(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states, (B, T, H), and targets of the scored rows: (count, H) and (count,)."""
        x = input.reshape(-1, input.shape[-1])
        if self.known and self.count == len(x):
            return x, self.targets
        return x.index_select(0, self.rows[: self.count]), self.targets[: self.count]

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """Sums of the rows' ``values``, (count,), float64, over each sequence's unmasked tokens: (B,)."""
        batch = self.starts.numel() - 1
        sums = values.new_empty(batch)
        sequence_sums_kernel[(batch,)](values, self.starts, sums, BLOCK=1024)
        note("sequence_sums_kernel", values.dtype, sequences=batch, rows=len(values))
        return sums
