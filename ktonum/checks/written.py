"""Outputs and gradients are written in full: fresh memory is poisoned, and no poison comes out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic
from torch import Tensor

from ktonum.case.context import CaseContext
from ktonum.checks.check import Check, held_to_bounds
from ktonum.measure.probe import Probe

__all__ = ["CHECK", "poisoned_memory"]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within: ``torch.empty`` and its like return NaN, or the largest integer, instead of whatever lay there.

    torch does so under deterministic algorithms, which are asked for with warnings only.
    """
    mode = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Not `use_deterministic_algorithms`, which imports torch's compiler: two to four seconds in every process.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            # Every operation without a deterministic form warns, and so does cuBLAS; that is not the question here.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.set_deterministic_debug_mode(mode)


def _probes(context: CaseContext) -> list[Probe]:
    with poisoned_memory():
        actual = context.evaluate().tensors()
    # Against the clean run: where that is wrong, `forward` and `gradients` say so.
    oracle = context.oracle.tensors()
    expected = {n: _without_poison(t, oracle[n]) for n, t in context.result.tensors().items() if n in oracle}
    return held_to_bounds(context, actual=actual, expected=expected, scale=2.0)


def _without_poison(clean: Tensor, oracle: Tensor) -> Tensor:
    """``clean``, with the oracle's numbers where it is NaN and should not be.

    Fresh memory of the clean run may hold an earlier run's poison, and NaN agrees with NaN: a planted unwritten tile
    went unnoticed in one run of the test suite and not in the next.
    """
    return torch.where(clean.isnan() & oracle.isfinite(), oracle.to(clean.dtype), clean)


CHECK = Check("written", "outputs and gradients are written in full, whatever lay in fresh memory", _probes)
