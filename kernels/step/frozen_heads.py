"""Column sums of reference heads. Training does not change these heads, so the sums are kept until a head changes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from ktonum.kernels.device.sums.launch import ColumnSums, column_sums

__all__ = ["kept_column_sums"]


@dataclass(frozen=True)
class _Kept:
    """The column sums of one tensor object, and how it was then."""

    weight: weakref.ref[Tensor]
    version: int
    data: int
    sums: ColumnSums


_kept: dict[int, _Kept] = {}


def kept_column_sums(weight: Tensor) -> ColumnSums:
    """`column_sums` of a head; from an earlier call if it is the same tensor and nothing was written to it since.

    They cost a pass over the head, 0.5 ms of a 60 ms step on an H100 at 151,936 × 4,096, and take a few MiB. Autograd's
    version counter tells whether the head was written to. A write through ``.data`` does not change the counter, so it
    goes unnoticed.
    """
    if weight.is_inference():
        return column_sums(weight)
    key, version, data = id(weight), weight._version, weight.data_ptr()
    found = _kept.get(key)
    if found is not None and found.weight() is weight and (found.version, found.data) == (version, data):
        return found.sums
    sums = column_sums(weight)
    _kept[key] = _Kept(weakref.ref(weight, lambda _: _kept.pop(key, None)), version, data, sums)
    return sums
