"""Words for one result: its case, a measurement, the source of a bound, the reason why it is not PASS.

Like `ktonum.results`, it handles text and numbers only, without torch and without a terminal.
"""

from __future__ import annotations

import math

from ktonum.results import BoundKind, BoundSource, Cause, CheckResult, Localisation, Measurement, Verdict

__all__ = [
    "bound_words",
    "excess_words",
    "format_measured",
    "measured",
    "place",
    "place_lines",
    "reason_words",
    "short_case",
    "sizes_words",
    "wrong_words",
]

# The words of the check or of the candidate replace the braces.
_REASONS = {
    Cause.CANNOT_RUN: "the candidate cannot run this case: {}",
    Cause.NOTHING_MEASURED: "the candidate returns none of the tensors that this check measures",
    Cause.OUT_OF_MEMORY: "device memory ran out during this check: {}",
    Cause.CANDIDATE_WRONG: "the candidate {}",
    Cause.CANDIDATE_REFUSED: "the candidate refused the case: {}",
    Cause.HUNG: "the candidate hung: {}",
    Cause.DIED: "the process died while the candidate ran: {}",
    Cause.CUDA_LOST: "the process lost its CUDA context while the candidate ran, after the results had been read",
    Cause.NOT_RUN: "not run: {}",
}
# The number of failing tensors that are named.
_NAMED = 2


def sizes_words(result: CheckResult) -> str:
    """Dims and parameters, e.g. ``B=4,T=33,beta=0.3``; the case's name if its parts are not known."""
    return result.parts.sizes if result.parts.op else result.case


def short_case(result: CheckResult) -> str:
    """Dtype, dims and parameters; also the distribution and the seed's offset if they are not the usual ones."""
    parts = result.parts
    tail = "" if parts.distribution == "normal" else f" ({parts.distribution})"
    tail += f" +{parts.offset}" if parts.offset else ""
    return f"{parts.dtype} {sizes_words(result)}{tail}".strip()


def measured(result: CheckResult) -> str:
    """The worst measurement as ``name = value / bound``; empty if there is none."""
    return "" if result.worst is None else format_measured(result.worst)


def format_measured(m: Measurement) -> str:
    """``name = value / bound``, with unit, standard error and remark if there are any."""
    error = "" if m.standard_error is None else f" ± {m.standard_error:.1g}"
    remark = f" ({m.remark})" if m.remark else ""
    bound = "" if m.bound_source.kind is BoundKind.NONE else f" / {m.bound:.3g}"
    return f"{m.name} = {m.value:.3g}{error}{bound}{_unit(m)}{remark}"


def _unit(m: Measurement) -> str:
    return "" if m.unit in ("1", "bound") else f" {m.unit}"


def place(m: Measurement) -> str:
    """The place, e.g. `` at [3, 17]``; empty for a measurement without a place."""
    return f" at {list(m.where)}" if m.where else ""


def bound_words(source: BoundSource) -> str:
    """The source of a bound."""
    reference = f"the error of the reference {'under autocast to' if source.autocast else 'in'} {source.dtype}"
    multiple = reference if source.scale is None else f"{source.scale:g} × {reference}"
    analysis = ", ".join(filter(None, ("rounding-error analysis", source.standard)))
    return {
        BoundKind.DERIVED: source.text or analysis,
        BoundKind.MEASURED: multiple,
        BoundKind.LARGER: f"the larger one of {analysis}, and {multiple}",
        BoundKind.EXACT: f"must be exact: {source.text}",
        BoundKind.TABLE: source.text,
        BoundKind.ERROR_BAR: f"{source.scale:g} × the error bar of the finite difference" if source.scale else "",
        BoundKind.DECLARED: "declared by the op",
        BoundKind.NONE: "",
    }[source.kind]


def excess_words(m: Measurement) -> str:
    """How far a measurement is beyond its bound, the source of the bound, and the place."""
    if math.isnan(m.value):
        words = f"{m.name} is NaN"
    elif m.unit == "bound":
        words = f"{m.name}: {m.value:.3g} times the bound"
    elif m.bound > 0:
        words = f"{m.name} = {m.value:.3g}{_unit(m)}, {m.use:.3g} times the bound {m.bound:.3g}"
    else:
        words = f"{m.name} = {m.value:.3g}{_unit(m)}, and none is allowed"
    source = bound_words(m.bound_source)
    return f"{words}{f' ({source})' if source else ''}{place(m)}"


def wrong_words(result: CheckResult) -> str:
    """The tensors of a FAIL that are wrong, the worst first; empty if no tensor's measurement is beyond its bound."""
    beyond = sorted((m for m in result.measurements if not m.within), key=lambda m: -m.use)
    subjects = list(dict.fromkeys(m.subject for m in beyond if m.tensor))
    if not subjects:
        return ""
    more = [f"{len(subjects) - _NAMED} more"] if len(subjects) > _NAMED else []
    *first, last = (*subjects[:_NAMED], *more)
    named = f"{', '.join(first)} and {last}" if first else last
    return f"{named} {'are' if len(subjects) > 1 else 'is'} wrong"


def place_lines(found: Localisation) -> tuple[str, ...]:
    """A line that says where a tensor is wrong, and a line that says what it looks like if that is known."""
    look = (f"{found.subject} looks like: {found.looks_like}",) if found.looks_like else ()
    return (f"where {found.subject} is wrong: {found.where}", *look)


def reason_words(result: CheckResult) -> str:
    """Why the verdict is not PASS, in a sentence; empty for a PASS that is not vacuous."""
    if result.vacuous:
        return "no planted defect made this check fail, so that its PASS proves nothing"
    if result.cause in _REASONS:
        return _REASONS[result.cause].format(result.reason).removesuffix(": ")
    beyond = [m for m in result.measurements if not m.within]
    if not result.reason and result.verdict is Verdict.FAIL and beyond:
        worst = max(beyond, key=lambda m: m.use)
        return f"{wrong_words(result)}: {excess_words(worst)}" if worst.tensor else excess_words(worst)
    return result.reason
