"""The check `upstream` where a candidate writes over the upstream gradient that it was lent."""

from __future__ import annotations

from dataclasses import replace

from small_ops import NORM_POINT, RMS_NORM, rms_norm_with
from torch import Tensor

from ktonum.checks.upstream import CHECK
from ktonum.context import CaseContext


def _overwritten(gradient: Tensor) -> Tensor:
    kept = gradient.clone()
    if 0 not in gradient.stride():
        gradient.zero_()
    return kept


def test_what_is_written_over_reaches_no_oracle_and_is_seen() -> None:
    op = replace(RMS_NORM, candidate=rms_norm_with(upstream=_overwritten), dims=[NORM_POINT])
    (case,) = op.cases(profile="quick", dtypes=["fp16"], device="cpu")
    assert CHECK.probes is not None
    probes = CHECK.probes(CaseContext(op, case))
    beyond = {m.name for probe in probes for m in probe.measure(probe.actual, "precise") if not m.within}
    # The gradients are right. At subnormal ones the oracle was given what the candidate had written, and Liger-Kernel's
    # RMSNorm, which does so, taken to be 146 times its bound off.
    assert beyond == {
        f"upstream_y {words}/differing_elements" for words in ("at negatives among zeros", "at subnormal gradients")
    }
