"""Outputs and gradients are written completely: new memory is filled with NaN, and the results show none of it."""

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
    """Inside, ``torch.empty`` and similar functions return NaN, or the largest integer, instead of old memory.

    torch does so if deterministic algorithms are on. Here they only warn.
    """
    mode = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Not `use_deterministic_algorithms`: it imports torch's compiler, which takes two to four seconds in each process.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            # Operations without a deterministic form warn, and cuBLAS does, too. This check does not ask about that.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.set_deterministic_debug_mode(mode)


def _probes(context: CaseContext) -> list[Probe]:
    with poisoned_memory():
        actual = context.evaluate().tensors()
    # Compared with the clean run. If that one is wrong, `forward` and `gradients` report it.
    oracle = context.oracle.tensors()
    expected = {n: _without_poison(t, oracle[n]) for n, t in context.result.tensors().items() if n in oracle}
    return held_to_bounds(context, actual=actual, expected=expected, scale=2.0)


def _without_poison(clean: Tensor, oracle: Tensor) -> Tensor:
    """``clean``, with the oracle's numbers where ``clean`` is NaN and the oracle is finite.

    New memory of the clean run may contain the NaN of an earlier poisoned run, and NaN agrees with NaN. A planted tile
    that was not written was missed in one run of the test suite for that reason.
    """
    return torch.where(clean.isnan() & oracle.isfinite(), oracle.to(clean.dtype), clean)


CHECK = Check(
    "written", "outputs and gradients are written completely, and do not show what was in new memory", _probes
)
