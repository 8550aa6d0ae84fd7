"""A check of second derivatives: the gradient check of the function that returns the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ktonum.declare.tensor_copies import spaced_out
from ktonum.errors import InputError
from ktonum.gradient_check.gradcheck import gradcheck
from ktonum.gradient_check.gradcheck_error import GradcheckError
from ktonum.gradient_check.result import GradcheckResult
from ktonum.gradient_check.seeded_signs import seeded_signs
from ktonum.gradient_check.structures import named_tensors, with_tensors
from ktonum.results import Verdict

__all__ = ["gradgradcheck"]


def gradgradcheck(
    func: Callable[..., Any],
    inputs: Any,
    grad_outputs: Tensor | Sequence[Tensor] | None = None,
    *,
    eps: float | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    gen_non_contig_grad_outputs: bool = False,
    raise_exception: bool = True,
    nondet_tol: float | None = None,
    check_undefined_grad: bool = True,
    check_grad_dtypes: bool = False,
    check_batched_grad: bool = False,
    check_fwd_over_rev: bool = False,
    check_rev_over_rev: bool = True,
    fast_mode: bool | None = None,
    masked: bool = False,
    seed: int = 0,
    max_evaluations: int = 32,
    probes: int = 1,
    precision: str | torch.dtype | None = None,
    localise_evaluations: int = 64,
) -> GradcheckResult:
    """Check the gradients of ``func``'s gradients at ``inputs``; a drop-in for ``torch.autograd.gradgradcheck``.

    The gradients of the outputs are inputs here, too: in the result they are called ``grad_output[0]`` and so on.

    Args:
        func: As for `ktonum.gradcheck`. Of a module, the derivatives in its parameters are not checked here.
        inputs: As for `ktonum.gradcheck`.
        grad_outputs: The gradient of each output that requires grad, same shape and dtype; those that require grad are
            checked. None: random ones that do.
        eps: Without effect, see `ktonum.gradcheck`.
        atol: As eps.
        rtol: As eps.
        gen_non_contig_grad_outputs: Whether the random ones are not contiguous.
        raise_exception: As for `ktonum.gradcheck`.
        nondet_tol: As for `ktonum.gradcheck`.
        check_undefined_grad: As for `ktonum.gradcheck`, of the second backward.
        check_grad_dtypes: As for `ktonum.gradcheck`.
        check_batched_grad: As for `ktonum.gradcheck`.
        check_fwd_over_rev: Whether the gradients are differentiated in forward mode.
        check_rev_over_rev: Whether they are differentiated by backward.
        fast_mode: Without effect, see `ktonum.gradcheck`.
        masked: As for `ktonum.gradcheck`.
        seed: As for `ktonum.gradcheck`, and of the random grad_outputs.
        max_evaluations: As for `ktonum.gradcheck`; each is a forward and a backward of func.
        probes: As for `ktonum.gradcheck`.
        precision: As for `ktonum.gradcheck`.
        localise_evaluations: As for `ktonum.gradcheck`.

    Returns:
        The result. It is truthy for PASS alone.

    Raises:
        GradcheckError: As for `ktonum.gradcheck`.
        InputError: As for `ktonum.gradcheck`, or grad_outputs do not fit the outputs.
        Exception: Any exception that func raises at ``inputs``, or its backward, or that one's backward.
    """
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    names = [f"input {number}" for number in range(len(arguments))]
    wanted = [
        name
        for argument, value in zip(names, arguments, strict=True)
        for name, tensor in named_tensors(value, argument)
        if tensor.requires_grad
    ]
    with torch.enable_grad():
        outputs = _differentiable(func(*arguments))
    if not outputs:
        raise InputError("no output of func requires grad: there is no gradient to differentiate")
    cotangents = _cotangents(outputs, grad_outputs, seed, contiguous=not gen_non_contig_grad_outputs)

    def gradients(*given: Any) -> tuple[Tensor, ...]:
        tensors: dict[str, Tensor] = {}
        for argument, value in zip(names, given[:-1], strict=True):
            for name, tensor in named_tensors(value, argument):
                if name in wanted:
                    # Displaced inputs come without a graph.
                    tensors[name] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        with torch.enable_grad():
            filled = [with_tensors(value, n, tensors) for n, value in zip(names, given[:-1], strict=True)]
            found = torch.autograd.grad(
                _differentiable(func(*filled)), list(tensors.values()), given[-1], create_graph=True, allow_unused=True
            )
        return tuple(gradient for gradient in found if gradient is not None)

    result = gradcheck(
        gradients,
        (*arguments, cotangents),
        eps=eps,
        atol=atol,
        rtol=rtol,
        raise_exception=False,
        nondet_tol=nondet_tol,
        check_undefined_grad=check_undefined_grad,
        check_grad_dtypes=check_grad_dtypes,
        check_batched_grad=check_batched_grad,
        check_forward_ad=check_fwd_over_rev,
        check_backward_ad=check_rev_over_rev,
        fast_mode=fast_mode,
        masked=masked,
        seed=seed,
        max_evaluations=max_evaluations,
        probes=probes,
        precision=precision,
        localise_evaluations=localise_evaluations,
        names=[*names, "grad_output"],
    )
    result = replace(result, reason=f"of the gradients, {result.reason}")
    if raise_exception and result.verdict is not Verdict.PASS:
        raise GradcheckError(result.summary(), result)
    return result


def _differentiable(value: Any) -> list[Tensor]:
    return [tensor for _, tensor in named_tensors(value, "output") if tensor.requires_grad]


def _cotangents(outputs: Sequence[Tensor], given: Any, seed: int, *, contiguous: bool) -> list[Tensor]:
    if given is not None:
        cotangents = [given] if isinstance(given, Tensor) else list(given)
        fits = len(cotangents) == len(outputs) and all(
            isinstance(c, Tensor) and c.shape == o.shape for c, o in zip(cotangents, outputs, strict=False)
        )
        if not fits:
            shapes = ", ".join(str(tuple(o.shape)) for o in outputs)
            raise InputError(
                f"grad_outputs do not fit: pass one tensor for each output that requires grad, of shape {shapes}"
            )
        return cotangents
    cotangents = []
    for number, output in enumerate(outputs):
        real = seeded_signs(torch.Size([*output.shape, 2]), output.device, seed, 5, number)
        drawn = torch.view_as_complex(real) if output.is_complex() else real[..., 0].contiguous()
        drawn = drawn.to(output.dtype)
        cotangents.append((drawn if contiguous or not drawn.ndim else spaced_out(drawn)).requires_grad_())
    return cotangents
