"""The rules by which projects decide whether a kernel is right, as they are published, for the same results.

Every judge but gradcheck sees the outputs and gradients of the candidate in one case, under an upstream gradient that
is not one. It also sees those of the reference in the same dtype (plain PyTorch) and in float64. Most of the tests that
the judges come from look at less.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ktonum.auditing.judge import run_check
from ktonum.case.context import CaseContext
from ktonum.checks import checks_for
from ktonum.declare.evaluation import named_outputs
from ktonum.errors import CandidateError, UsageError
from ktonum.results import Verdict

__all__ = ["JUDGES", "Judge", "Trial", "relative_error"]


@dataclass(frozen=True)
class Judge:
    """A published rule.

    Attributes:
        name: Its name in tables.
        source: Where it is published.
        flags: Whether it says that the candidate is wrong; None if the rule is not about the dtype.
    """

    name: str
    source: str
    flags: Callable[[Trial], bool | None]


@dataclass
class Trial:
    """One candidate on one case: what the judges look at."""

    context: CaseContext

    @property
    def dtype(self) -> str:
        """The dtype's short name."""
        return self.context.case.dtype

    @cached_property
    def actual(self) -> Mapping[str, Tensor] | None:
        """The candidate's outputs and gradients; None if any test would have raised an exception."""
        try:
            # `expected` raises if an output is missing; a test would raise, too.
            names = self.context.expected()
        except (CandidateError, UsageError):
            return None
        tensors = self.context.result.tensors()
        return {name: tensors[name] for name in names}

    def every(self, right: Callable[[Tensor, Tensor, Tensor], bool]) -> bool:
        """Whether ``right(actual, plain, oracle)`` holds for every tensor. ``plain`` has the dtype of ``actual``."""
        if self.actual is None:
            return False
        plain, oracle = self.context.plain.tensors(), self.context.oracle.tensors()
        return all(right(t, plain[name].to(t.dtype), oracle[name]) for name, t in self.actual.items() if name in plain)


def _ktonum(trial: Trial) -> bool:
    op, case = trial.context.op, trial.context.case
    results = [run_check(check, trial.context) for check in checks_for(op, case)]
    return any(r.verdict in (Verdict.FAIL, Verdict.ERROR) for r in results)


def _gradcheck(fast: bool) -> Callable[[Trial], bool | None]:
    def flags(trial: Trial) -> bool | None:
        context = trial.context
        # A gradient may by definition differ from the derivative, for example if the reference point is detached.
        if trial.dtype != "fp64" or "gradcheck" in context.case.point.without:
            return None
        others = {k: v for k, v in context.inputs.items() if k not in context.differentiable}

        def function(*leaves: Tensor) -> tuple[Tensor, ...]:
            given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in others.items()}
            outputs = named_outputs(
                context.candidate(**given, **dict(zip(context.differentiable, leaves, strict=True)))
            )
            return tuple(outputs[name] for name in context.upstream)  # type: ignore[misc]

        leaves = [context.inputs[name].clone().requires_grad_() for name in context.differentiable]
        try:
            return not torch.autograd.gradcheck(function, leaves, fast_mode=fast)
        except Exception:  # GradcheckError, or whatever the candidate raises
            return True

    return flags


# (atol, rtol) of Liger-Kernel's KTO test, which has no other dtypes.
_USUAL = {"bf16": (5e-2, 5e-1), "fp32": (1e-5, 5e-4)}


def _usual_tolerances(trial: Trial) -> bool | None:
    if trial.dtype not in _USUAL:
        return None
    atol, rtol = _USUAL[trial.dtype]
    return not trial.every(lambda a, plain, _: torch.allclose(a, plain, atol=atol, rtol=rtol, equal_nan=True))


def _twice_plain(trial: Trial) -> bool | None:
    if trial.dtype == "fp64":
        return None  # there is no wider dtype for the reference

    def right(actual: Tensor, plain: Tensor, oracle: Tensor) -> bool:
        # The reference is calculated in a wider dtype and rounded. Adding and subtracting 0.3 shows the roundoff.
        reference = oracle.to(actual.dtype)
        floor = 2 * float((reference + 0.3 - 0.3 - reference).abs().max())
        worst = float((actual - reference).abs().max())
        return worst <= 2 * float((plain - reference).abs().max()) + floor

    return not trial.every(right)


def _dynamo(trial: Trial) -> bool:
    from torch._dynamo.utils import same

    silent = logging.getLogger("judges.silent")
    silent.disabled = True
    return not trial.every(lambda a, plain, oracle: same(plain, a, fp64_ref=oracle, log_error=silent.error))


def _assert_close(trial: Trial) -> bool:
    def right(actual: Tensor, plain: Tensor, _: Tensor) -> bool:
        try:
            torch.testing.assert_close(actual, plain, equal_nan=True)
        except AssertionError:
            return False
        return True

    return not trial.every(right)


JUDGES = (
    Judge("ktonum", "this project's audit, every check of the quick profile, standard `precise`", _ktonum),
    Judge("gradcheck", "`torch.autograd.gradcheck`, defaults, float64", _gradcheck(fast=False)),
    Judge("gradcheck, fast", "`torch.autograd.gradcheck(fast_mode=True)`, float64", _gradcheck(fast=True)),
    Judge(
        "usual tolerances",
        "Liger-Kernel, `test/chunked_loss/test_kto_loss.py`: atol 5e-2, rtol 5e-1 in bfloat16; 1e-5, 5e-4 in float32; "
        "against plain PyTorch in the same dtype",
        _usual_tolerances,
    ),
    Judge(
        "2 × plain",
        "FlashAttention, `test_flash_attn.py`: the largest error is at most twice that of plain PyTorch in "
        "the same dtype, plus twice what adding and subtracting 0.3 loses; published for 16 bits, used here in "
        "float32, too",
        _twice_plain,
    ),
    Judge(
        "dynamo RMSE",
        "`torch._dynamo.utils.same` with a float64 reference, defaults: within 1e-4, or a root mean square error of "
        "at most 3 times (2 in large float32 tensors) that of plain PyTorch, plus 1e-5",
        _dynamo,
    ),
    Judge(
        "assert_close", "`torch.testing.assert_close`, defaults, against plain PyTorch in the same dtype", _assert_close
    ),
)


def relative_error(actual: Tensor, oracle: Tensor, *floors: Tensor) -> float:
    """The error of ``actual`` divided by the error of right candidates: in norm or at the worst element.

    The larger of the two ratios counts. The divisor is the largest error of ``floors``, and at least one rounding of
    the oracle to their dtype, because their own errors may be zero by luck.

    Args:
        actual: The candidate's tensor, of any dtype.
        oracle: The truth in float64, of the same shape.
        floors: Right candidates' tensors, of the same shape and of the dtype under audit.

    Returns:
        The ratio; infinite where ``actual`` has NaN or infinity at other places than the oracle.
    """
    finite = oracle.isfinite()
    if not bool((actual.isfinite() == finite).all()):
        return math.inf
    expected = torch.where(finite, oracle, 0.0)
    error, *theirs = (torch.where(finite, t.double(), 0.0) - expected for t in (actual, *floors))
    rounding = torch.finfo(floors[0].dtype).eps / 2 * expected
    ratios = [0.0]
    for size in (lambda t: float(t.norm()), lambda t: float(t.abs().max()) if t.numel() else 0.0):
        granted = max(size(t) for t in (*theirs, rounding))
        ratios.append(size(error) / granted if granted > 0 else math.inf if size(error) > 0 else 0.0)
    return max(ratios)
