"""One gradient check, from the first call of the function to the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ktonum.gradient_check.backward_passes import Backward, Finding, Tolerances
from ktonum.gradient_check.checked_function import CheckedFunction, first_bad_element
from ktonum.gradient_check.contraction import Contraction
from ktonum.gradient_check.directional_derivative import Setting
from ktonum.gradient_check.directions import measure
from ktonum.gradient_check.forward_mode import batched_forward_defect, forward_defect, forward_slope
from ktonum.gradient_check.other_leaves import remark_on_other_leaves
from ktonum.gradient_check.precisions import Precisions, dtype_in_words, infer_precisions
from ktonum.gradient_check.recorded_call import RecordedCall, record
from ktonum.gradient_check.result import GradcheckResult
from ktonum.gradient_check.verdict import judge
from ktonum.results import Verdict

__all__ = ["Questions", "check"]

#: Two runs at one point may differ by this many eps, because atomics reorder sums. If they differ more, they are not
#: deterministic.
_REPEATABLE = 1024.0


@dataclass(frozen=True)
class Questions:
    """What a check is to find out, see the arguments of `ktonum.gradcheck`.

    Attributes:
        backward: ``check_backward_ad``.
        forward: ``check_forward_ad``.
        undefined: ``check_undefined_grad``.
        dtypes: ``check_grad_dtypes``.
        batched: ``check_batched_grad``.
        batched_forward: ``check_batched_forward_grad``.
        nondet_tol: See there.
        precision: The precision that the caller told, or None.
        seed: See there.
        probes: See there.
        localise_evaluations: See there.
    """

    backward: bool
    forward: bool
    undefined: bool
    dtypes: bool
    batched: bool
    batched_forward: bool
    nondet_tol: float | None
    precision: torch.dtype | None
    seed: int
    probes: int
    localise_evaluations: int


def check(function: CheckedFunction, questions: Questions) -> GradcheckResult:
    """The result of a gradient check.

    Raises:
        InputError: fn returns a sparse tensor, or writes to its inputs.
        CandidateError: The number or the shapes of the outputs change from call to call.
        Exception: Any exception of fn at its inputs, or of its backward.
    """
    precision = dtype_in_words(questions.precision or torch.float64)
    blank = GradcheckResult(Verdict.FAIL, "", evaluations=1, precision=precision, seed=questions.seed)
    call = record(function, questions.seed)
    if (early := _nothing_to_measure(function, call, blank)) is not None:
        return early
    by_backward = questions.backward and not call.constant
    raw = call.raw_gradients() if by_backward else [None] * len(call.leaves)
    gradients = [leaf.gradient(g) for leaf, g in zip(call.leaves, raw, strict=True)]
    if (early := _not_finite(call, gradients, blank)) is not None:
        return early

    contraction = call.contraction(function)
    again = contraction.row(function.again())
    function.refuse_hidden_writes()
    precisions = infer_precisions(contraction, call, gradients, again, questions.precision)
    blank = replace(blank, precision=precisions.words)
    noise = float(torch.linalg.vector_norm(contraction.cotangent * (again - contraction.base)))
    if not noise <= _REPEATABLE * precisions.eps * contraction.size + contraction.change(questions.nondet_tol or 0.0):
        return _failed(_not_deterministic(call, noise, contraction.size), blank, function)
    backward = Backward(call, gradients, _tolerances(call, gradients, contraction, precisions, questions))
    if by_backward and (finding := backward.unsteady()) is not None:
        return _failed(finding, blank, function)

    analytic = dict(enumerate(gradients)) if questions.backward or call.constant else None
    setting = Setting(
        contraction=contraction,
        gradients=analytic,
        slope=_slope(contraction, analytic),
        missing=frozenset(p for p, g in enumerate(raw) if g is None),
        eps=precisions.eps,
        analytic_eps=precisions.analytic_eps,
        repeat_noise=noise,
        gradient_noise=backward.jitter() if by_backward and questions.nondet_tol else 0.0,
        seed=questions.seed,
    )
    result = judge(setting, measure(setting, questions.probes), blank, questions.localise_evaluations)
    if call.constant and result.verdict is Verdict.FAIL:
        why = "no output requires grad, yet they move with the inputs. Does it call detach, no_grad or .item()?"
        return replace(result, reason=f"fn is not differentiable: {why} That is, {result.reason}")
    if result.verdict is not Verdict.FAIL and not call.constant:
        finding = _without_differences(setting, result, backward if by_backward else None, questions)
        if finding is not None:
            return _failed(finding, blank, function)
    if result.verdict is Verdict.PASS and (remark := remark_on_other_leaves(call.outputs, call.tensors)):
        return replace(result, reason=f"{result.reason} {remark}")
    return result


def _nothing_to_measure(
    function: CheckedFunction, call: RecordedCall, blank: GradcheckResult
) -> GradcheckResult | None:
    """The result where inputs or outputs allow no measurement, otherwise None."""
    if not call.leaves:
        reason = f"{', '.join(function.empty)}: empty, so no gradient to check."
        return replace(blank, verdict=Verdict.PASS, reason=reason)
    if all(leaf.fixed is not None and bool(leaf.fixed.all()) for leaf in call.leaves):
        names = ", ".join(leaf.name for leaf in call.leaves)
        reason = f"{names}: no element is finite; pass finite inputs."
        return replace(blank, verdict=Verdict.INCONCLUSIVE, reason=reason)
    if not call.outputs:
        return replace(blank, reason="fn returned no floating tensor: fn is not differentiable. Does it call .item()?")
    for place, array in zip(call.chosen, call.arrays, strict=True):
        # From infinite inputs a right function may make infinite outputs. These stay out.
        if (bad := first_bad_element(array)) is not None and not function.not_finite:
            return replace(blank, reason=f"output {place} is not finite at {list(bad)}.")
    return None


def _not_finite(call: RecordedCall, gradients: Sequence[Tensor], blank: GradcheckResult) -> GradcheckResult | None:
    """The result for a gradient with NaN or infinity, None if there is none."""
    for position, gradient in enumerate(gradients):
        if (bad := first_bad_element(gradient)) is not None:
            leaf = call.leaves[position]
            reason = f"the gradient of {leaf.name} is not finite at {leaf.index_in_words(bad)}."
            return replace(blank, reason=reason, worst_input=position, worst_index=bad)
    return None


def _not_deterministic(call: RecordedCall, noise: float, size: float) -> Finding:
    apart = f"two evaluations at one point differ by {noise:.2g}, and the outputs have size {size:.2g}"
    if any(leaf.fills_up for leaf in call.leaves):
        return Finding(
            f"fn depends on which elements are specified, or is not deterministic: {apart}. Pass masked=True, or seed "
            f"its random numbers inside fn"
        )
    return Finding(f"fn is not deterministic: {apart}. Seed its random numbers inside fn")


def _tolerances(
    call: RecordedCall,
    gradients: Sequence[Tensor],
    contraction: Contraction,
    precisions: Precisions,
    questions: Questions,
) -> Tolerances:
    """How far two backward runs may be apart."""
    # A gradient that cancels to nothing may still differ by the rounding of the terms that cancel.
    sizes = [
        float(torch.linalg.vector_norm(gradient)) + contraction.size / leaf.unit
        for gradient, leaf in zip(gradients, call.leaves, strict=True)
    ]
    return Tolerances([_REPEATABLE * precisions.analytic_eps * size for size in sizes], questions.nondet_tol)


def _slope(contraction: Contraction, gradients: Mapping[int, Tensor] | None) -> Callable[[int, Tensor], float]:
    """The analytic derivative along a direction of one tensor: from backward's gradients, or in forward mode."""
    if gradients is None:
        return lambda position, direction: forward_slope(contraction, {position: direction})
    return lambda position, direction: float((gradients[position] * direction).sum())


def _without_differences(
    setting: Setting, result: GradcheckResult, backward: Backward | None, questions: Questions
) -> Finding | None:
    """The first defect of derivatives that do not disagree with finite differences."""
    finding = None
    if backward is not None:
        finding = backward.incomplete(undefined=questions.undefined, dtypes=questions.dtypes, batched=questions.batched)
    if finding is None and questions.forward and setting.gradients is not None and result.verdict is Verdict.PASS:
        finding = forward_defect(setting, result)
    if finding is None and questions.batched_forward:
        finding = batched_forward_defect(setting)
    return finding


def _failed(finding: Finding, blank: GradcheckResult, function: CheckedFunction) -> GradcheckResult:
    return replace(blank, reason=f"{finding.words}.", worst_input=finding.position, evaluations=function.calls)
