"""A gradient check by float64 finite differences that states its own error bar and power.

One backward with random signed cotangents u gives the gradient g of ``s = sum_k <u_k, f_k(x)>``. Along random signed
directions d, ``<g, d>`` is compared with an extrapolated central difference of s
(`ktonum.gradient_check.differences`). All outputs and all elements take part in every comparison. The error bar of the
difference decides, not a fixed tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ktonum.errors import InputError
from ktonum.gradient_check.checked_function import CheckedFunction
from ktonum.gradient_check.directional_derivative import FEWEST_LEVELS
from ktonum.gradient_check.gradcheck_error import GradcheckError
from ktonum.gradient_check.one_check import Questions, check
from ktonum.gradient_check.result import GradcheckResult, InputGradient, ProbeMeasurement
from ktonum.results import Verdict

__all__ = ["GradcheckResult", "InputGradient", "ProbeMeasurement", "gradcheck"]

_PRECISIONS = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def gradcheck(
    func: Callable[..., Any],
    inputs: Any,
    *,
    eps: float | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    raise_exception: bool = True,
    nondet_tol: float | None = None,
    check_undefined_grad: bool = True,
    check_grad_dtypes: bool = False,
    check_batched_grad: bool = False,
    check_batched_forward_grad: bool = False,
    check_forward_ad: bool = False,
    check_backward_ad: bool = True,
    fast_mode: bool | None = None,
    masked: bool | None = None,
    seed: int = 0,
    max_evaluations: int = 32,
    probes: int = 1,
    precision: str | torch.dtype | None = None,
    localise_evaluations: int = 64,
    names: Sequence[str] | None = None,
) -> GradcheckResult:
    """Check the gradients of ``func`` at ``inputs``; a drop-in for ``torch.autograd.gradcheck``.

    Args:
        func: ``func(*inputs)`` returns tensors, alone or in nested tuples, lists and dicts. Outputs that do not require
            grad, integer outputs and values that are not tensors are ignored. It must be deterministic and must not
            write to its inputs. Of a `torch.nn.Module` the parameters that require grad are checked, too.
        inputs: A tensor, or a sequence of tensors, of other values, and of nested tuples, lists and dicts of them.
            Tensors may have any shape, stride and device, real or complex dtype, and the sparse layouts COO, CSR, CSC,
            BSR and BSC. Those that require grad are differentiated. Elements that are not finite stay as they are. The
            inputs are never modified.
        eps: Accepted for compatibility, without effect: the steps are chosen from what the differences show.
        atol: Accepted for compatibility, without effect: the error bar of the difference decides.
        rtol: As atol.
        raise_exception: If True, FAIL and INCONCLUSIVE raise. If False, the result is returned, and is falsy.
        nondet_tol: The largest difference between elements of two backward runs with the same cotangents, or of two
            evaluations; 0.0 asks for equal gradients, as torch does by default. None allows for a different order of
            summation (1024 roundings). The comparison with finite differences allows for it, too.
        check_undefined_grad: Whether backward must take an undefined gradient (None) for its outputs as zeros.
        check_grad_dtypes: Whether each gradient must have its tensor's dtype.
        check_batched_grad: Whether backward must agree with itself under vmap.
        check_batched_forward_grad: Whether forward-mode derivatives must agree with themselves under vmap.
        check_forward_ad: Whether forward-mode derivatives are checked.
        check_backward_ad: Whether gradients from backward are checked.
        fast_mode: Accepted for compatibility, without effect. There is one mode. It looks at every element, and takes
            two to three times as long as torch's fast mode for small functions.
        masked: For sparse inputs: True checks the specified elements, None or False all elements, as torch does.
        seed: Seed of directions and cotangents.
        max_evaluations: The most forward evaluations of func for the check, with the one for backward; at least 10.
            All inputs move together first. Those whose gradients are too small to be seen beside the others then move
            alone, or share a direction with those of similar size if the budget is too small; the result says so.
        probes: How many directions move each input; at least 1. They are measured as far as the budget allows.
        precision: The precision that func computes in: ``"float64"``, ``"float32"``, ``"float16"``, ``"bfloat16"`` or
            the torch dtype. None means that of the inputs, or a lower one if the outputs show it.
        localise_evaluations: The most further evaluations, to confirm a mismatch, to find the wrong element and to
            recognise the cause, or to get an answer where the check cannot tell yet; at least 0.
        names: What the inputs are called in the result, one name each; None for ``input 0`` and so on.

    Returns:
        The result. It is truthy for PASS alone.

    Raises:
        GradcheckError: A gradient is wrong, missing or not finite, an output is not finite or not differentiable, func
            or its backward is not deterministic, or the check cannot tell (INCONCLUSIVE; the message says what would
            help). It is a subclass of torch's exception of that name.
        InputError: The inputs or the parameters do not fit, func returns a sparse tensor, or func writes to its inputs.
        CandidateError: The number or the shapes of func's outputs change from call to call.
        Exception: Any exception that func raises at ``inputs``, or its backward.
    """
    if not (check_backward_ad or check_forward_ad):
        raise InputError("check_backward_ad and check_forward_ad are both False: set one of them")
    if check_batched_grad and not check_backward_ad:
        raise InputError("check_batched_grad=True needs check_backward_ad=True")
    if check_batched_forward_grad and not check_forward_ad:
        raise InputError("check_batched_forward_grad=True needs check_forward_ad=True")
    if max_evaluations < 2 + 2 * FEWEST_LEVELS or probes < 1 or localise_evaluations < 0:
        raise InputError(
            f"max_evaluations = {max_evaluations}, probes = {probes}, localise_evaluations = {localise_evaluations}: "
            f"they must be at least {2 + 2 * FEWEST_LEVELS}, 1 and 0"
        )
    told = _read_precision(precision)
    arguments = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    if names is None:
        names = [f"input {number}" for number in range(len(arguments))]
    if len(names) != len(arguments) or len(set(names)) != len(names):
        raise InputError(f"names = {list(names)} for {len(arguments)} inputs: pass one name for each, all different")
    function = CheckedFunction(func, arguments, max_evaluations, masked=bool(masked), names=names)
    if not function.leaves and not function.empty:
        raise InputError(
            "no input is a floating or complex tensor that requires grad; call x.requires_grad_() on each input that "
            "is to be checked"
        )
    questions = Questions(
        backward=check_backward_ad,
        forward=check_forward_ad,
        undefined=check_undefined_grad,
        dtypes=check_grad_dtypes,
        batched=check_batched_grad,
        batched_forward=check_batched_forward_grad,
        nondet_tol=nondet_tol,
        precision=told,
        seed=seed,
        probes=probes,
        localise_evaluations=localise_evaluations,
    )
    result = check(function, questions)
    if raise_exception and result.verdict is not Verdict.PASS:
        raise GradcheckError(result.summary(), result)
    return result


def _read_precision(precision: str | torch.dtype | None) -> torch.dtype | None:
    if precision is None:
        return None
    dtype = _PRECISIONS.get(str(precision).removeprefix("torch."))
    if dtype is None:
        raise InputError(f"precision = {precision!r}; accepted are None, {', '.join(_PRECISIONS)}")
    return dtype
