"""A gradient check by float64 finite differences that states its own error bar and power.

One backward with random signed cotangents u gives the gradient g of ``s = sum_k <u_k, f_k(x)>``. Along random signed
directions d, ``<g, d>`` is compared with an extrapolated central difference of s
(`ktonum.gradient_check.differences`). All outputs and all elements take part in every comparison. The error bar of the
difference decides, not a fixed tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ktonum.errors import GradcheckError, InputError
from ktonum.gradient_check.checked_function import (
    CheckedFunction,
    Contraction,
    carries_float32_only,
    first_bad_element,
    seeded_signs,
)
from ktonum.gradient_check.directions import FEWEST_LEVELS, Setting, measure
from ktonum.gradient_check.result import GradcheckResult, InputGradient, ProbeMeasurement
from ktonum.gradient_check.verdict import judge
from ktonum.results import Verdict

__all__ = ["GradcheckResult", "InputGradient", "ProbeMeasurement", "gradcheck"]

#: Two evaluations at one point may differ by this many eps, because atomics reorder sums. If they differ more, fn is
#: not deterministic.
REPEATABLE = 1024.0

_PRECISIONS = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def gradcheck(
    fn: Callable[..., Any],
    inputs: Any,
    *,
    seed: int = 0,
    max_evaluations: int = 32,
    probes: int = 2,
    precision: str | torch.dtype | None = None,
    localise_evaluations: int = 64,
    raise_exception: bool = True,
) -> GradcheckResult:
    """Check the gradients of ``fn`` at ``inputs``; a drop-in for ``torch.autograd.gradcheck(fn, inputs)``.

    Args:
        fn: ``fn(*inputs)`` returns a tensor or nested tuples and lists of tensors. Outputs that do not require grad,
            integer outputs and values that are not tensors are ignored. fn must be deterministic and must not write to
            its inputs. Complex outputs are not supported.
        inputs: A tensor, or a sequence of tensors and other values. Tensors may have any shape, stride and device.
            Floating tensors with ``requires_grad`` are differentiated. They must be finite, and they must be float64
            unless ``precision`` is given. The inputs are never modified.
        seed: Seed of directions and cotangents.
        max_evaluations: The most forward evaluations of fn for the check, including the one for backward; at least 10.
            The default of 32 is enough for one direction for each of three inputs. If there are more inputs, those with
            gradients of similar size share directions, and the result says so.
        probes: How many directions move each input; at least 1. All but the first move all inputs together. They are
            measured as far as the budget allows.
        precision: The precision that fn computes in: ``"float64"``, ``"float32"``, ``"float16"``, ``"bfloat16"`` or the
            torch dtype. None means float64, or a lower precision if the outputs show it.
        localise_evaluations: The most further evaluations after a mismatch, to confirm it and to find the wrong
            element; at least 0.
        raise_exception: If True, FAIL raises. If False, the result is returned, and it is falsy on FAIL.

    Returns:
        The result. It is truthy for PASS and for INCONCLUSIVE (the check cannot tell here; ``reason`` says why).

    Raises:
        GradcheckError: A gradient is wrong, missing or not finite, an output is not finite or not differentiable, or fn
            is not deterministic.
        InputError: The inputs or the parameters do not fit, fn returns a complex tensor, or fn writes to its inputs.
        CandidateError: The number or the shapes of fn's outputs change from call to call.
        Exception: Any exception that fn or its backward raises.
    """
    arguments = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    told = _read_precision(precision)
    positions = _differentiable(arguments, told)
    if max_evaluations < 2 + 2 * FEWEST_LEVELS or probes < 1 or localise_evaluations < 0:
        raise InputError(
            f"max_evaluations = {max_evaluations}, probes = {probes}, localise_evaluations = {localise_evaluations}: "
            f"they must be at least {2 + 2 * FEWEST_LEVELS}, 1 and 0"
        )
    function = CheckedFunction(fn, arguments, positions, max_evaluations)
    result = _check(function, told, seed, probes, localise_evaluations)
    if raise_exception and result.verdict is Verdict.FAIL:
        raise GradcheckError(result.summary(), result)
    return result


def _read_precision(precision: str | torch.dtype | None) -> torch.dtype | None:
    if precision is None:
        return None
    dtype = _PRECISIONS.get(str(precision).removeprefix("torch."))
    if dtype is None:
        raise InputError(f"precision = {precision!r}; accepted are None, {', '.join(_PRECISIONS)}")
    return dtype


def _differentiable(arguments: Sequence[Any], told: torch.dtype | None) -> tuple[int, ...]:
    """Positions of the inputs to differentiate.

    Raises:
        InputError: No input requires grad; or one is complex, not finite, or not float64 without a given precision.
    """
    positions = []
    for position, x in enumerate(arguments):
        if not isinstance(x, torch.Tensor) or not x.requires_grad:
            continue
        if x.is_complex():
            raise InputError(
                f"input {position} is {x.dtype}; only real inputs are supported: pass torch.view_as_real(x)"
            )
        if x.dtype is not torch.float64 and told is None:
            raise InputError(
                f"input {position} is {x.dtype}; finite differences need float64: pass x.double(), or pass the "
                f"precision that fn computes in, e.g. precision={str(x.dtype).removeprefix('torch.')!r}"
            )
        if (bad := first_bad_element(x)) is not None:
            raise InputError(f"input {position} is not finite at {list(bad)}; inputs must be finite: draw other values")
        if x.numel():
            positions.append(position)
    if not positions:
        raise InputError(
            "no input is a non-empty floating tensor that requires grad; call x.requires_grad_() on each input to check"
        )
    return tuple(positions)


def _check(
    function: CheckedFunction, told: torch.dtype | None, seed: int, probes: int, localise_evaluations: int
) -> GradcheckResult:
    leaves, outputs = function.with_graph()
    precision = str(told or torch.float64).removeprefix("torch.")
    blank = GradcheckResult(Verdict.FAIL, "", evaluations=1, precision=precision, seed=seed)
    chosen = tuple(k for k, output in enumerate(outputs) if output.requires_grad)
    if not chosen:
        why = "no floating output of fn requires grad" if outputs else "fn returned no floating tensor"
        return replace(blank, reason=f"{why}: fn is not differentiable. Does it call detach, no_grad or .item()?")
    for k in chosen:
        if (bad := first_bad_element(outputs[k])) is not None:
            return replace(blank, reason=f"output {k} is not finite at {list(bad)}.")

    base = tuple(outputs[k].detach().double() for k in chosen)
    cotangents = _cotangents(outputs, chosen, seed)
    raw = torch.autograd.grad([outputs[k] for k in chosen], leaves, cotangents, allow_unused=True)
    gradients = {
        p: torch.zeros(leaf.shape, dtype=torch.float64, device=leaf.device) if g is None else g.detach().double()
        for p, leaf, g in zip(function.positions, leaves, raw, strict=True)
    }
    for p, g in gradients.items():
        if (bad := first_bad_element(g)) is not None:
            reason = f"the gradient of input {p} is not finite at {list(bad)}."
            return replace(blank, reason=reason, worst_input=p, worst_index=bad)

    contraction = Contraction(function, chosen, tuple(u.double() for u in cotangents), base)
    contraction.measure(base)
    again = contraction.outputs_at({}, 0.0)
    function.refuse_hidden_writes()
    eps = max(torch.finfo(t).eps for t in (told or torch.float64, *(outputs[k].dtype for k in chosen)))
    float32 = torch.finfo(torch.float32).eps
    if told is None and eps < float32 and carries_float32_only([*base, *again]):
        eps, precision = float32, "float32 (seen in the outputs)"
    backward_eps = max(eps, float32 / 2.0) if told is None and carries_float32_only([*gradients.values()]) else eps
    squares = [float((u * (a - b)).square().sum()) for u, a, b in zip(contraction.cotangents, again, base, strict=True)]
    repeat = math.sqrt(math.fsum(squares))
    if not repeat <= REPEATABLE * eps * contraction.size:
        apart = f"two evaluations at one point differ by {repeat:.2g}, and the outputs have size {contraction.size:.2g}"
        reason = f"fn is not deterministic: {apart}. Seed its random numbers inside fn."
        return replace(blank, reason=reason, evaluations=function.calls)

    missing = frozenset(p for p, g in zip(function.positions, raw, strict=True) if g is None)
    setting = Setting(contraction, gradients, missing, eps, backward_eps, repeat, seed)
    measured = measure(setting, probes)
    return judge(setting, measured, replace(blank, precision=precision), localise_evaluations)


def _cotangents(outputs: Sequence[torch.Tensor], chosen: Sequence[int], seed: int) -> list[torch.Tensor]:
    """Seeded random u_k of both signs.

    A single scalar output keeps its unit: its u is 1. Several outputs are scaled to a common size, so that the rounding
    of a large output does not hide a small one.
    """
    if len(chosen) == 1 and outputs[chosen[0]].numel() == 1:
        return [torch.ones_like(outputs[chosen[0]])]
    cotangents = []
    for k in chosen:
        f = outputs[k].detach()
        norm = float(f.double().norm())
        scale = 2.0 ** -round(math.log2(norm)) if len(chosen) > 1 and norm > 0.0 else 1.0
        cotangents.append((scale * seeded_signs(f.shape, f.device, seed, 0, k)).to(f.dtype))
    return cotangents
