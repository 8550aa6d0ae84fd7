"""Which tokens take part: their rows are packed, so that masked ones cost no matrix work."""

from __future__ import annotations

import torch
from torch import Tensor

from ktonum.errors import InputError

__all__ = ["packed", "unmasked_rows"]


def unmasked_rows(target: Tensor, vocabulary: int, ignore_index: int, validate: bool, name: str) -> tuple[Tensor, int]:
    """Flat indices of unmasked tokens first, (B·T,), and how many there are; synchronises with the device."""
    flat = target.reshape(-1)
    unmasked = flat != ignore_index
    if flat.is_cuda and torch.cuda.is_current_stream_capturing():
        if validate:
            raise InputError(
                "values cannot be validated while a CUDA graph is captured: pass validate=False, after a validated "
                "run on the same inputs"
            )
        return torch.arange(flat.numel(), device=flat.device), flat.numel()
    rows = torch.argsort(unmasked.logical_not(), stable=True)
    count, outside = torch.stack([unmasked.sum(), (unmasked & ((flat < 0) | (flat >= vocabulary))).sum()]).tolist()
    if validate and outside:
        at = int((unmasked & ((flat < 0) | (flat >= vocabulary))).nonzero()[0])
        raise InputError(
            f"{name}[{at // target.shape[1]}, {at % target.shape[1]}] = {int(flat[at])} is outside the vocabulary "
            f"[0, {vocabulary}) and is not ignore_index = {ignore_index}; mask the token or mend the target"
        )
    return rows, count


def packed(input: Tensor, target: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Hidden states and targets of the first ``count`` rows: (count, H) and (count,)."""
    x, y = input.reshape(-1, input.shape[-1]), target.reshape(-1).contiguous()
    if count == y.numel():
        return x, y
    return x.index_select(0, rows[:count]), y.index_select(0, rows[:count])
