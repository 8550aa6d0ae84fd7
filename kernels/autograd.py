"""Log-probabilities of sequences as differentiable custom operators, opaque to torch.compile.

What happens on the device is decided by values (how many tokens are unmasked), so Dynamo must not look inside;
`torch.library` custom operators give that together with autograd and fake tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels import launch
from ktonum.kernels.products import accumulator_dtype, add_product, full_precision_products, write_product
from ktonum.kernels.validation import refuse_nonfinite

__all__ = ["detached_double", "sequence_logps"]


@torch.library.custom_op("ktonum::sequence_logps", mutates_args=())
def _sequence_logps(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    average: bool,
    logit_sums: bool,
    allow_tf32: bool,
    validate: bool,
    workspace: int,
    names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums of unmasked log-probs (B,) f64; sums of logits (B,) f64; lse (B·T,) f64; rows (B·T,) i64; their count.

    ``rows`` holds the flat indices of unmasked tokens first, in order; the count is a CPU scalar, so that the backward
    reads it without a device synchronisation.
    """
    batch, tokens = target.shape
    input_name, weight_name, bias_name, target_name = names.split()
    rows, count = _unmasked_rows(target, weight.shape[0], ignore_index, validate, target_name)
    if validate and average and count == 0:
        raise InputError(
            f"every token of {target_name} is masked by ignore_index = {ignore_index}: with average_log_prob=True the "
            f"loss is 0/0; drop the batch or pass average_log_prob=False"
        )
    x, y = _packed(input, target, rows, count)
    with full_precision_products(input.device, allow_tf32=allow_tf32):
        logps, logsumexp = launch.token_logps(x, weight, _contiguous(bias), y, allow_tf32=allow_tf32)
        sums = _logit_sums(input, weight, bias) if logit_sums else input.new_zeros(batch, dtype=torch.float64)
    if count == batch * tokens:
        # While a CUDA graph is captured nothing is packed, and masked tokens are among the rows.
        by_token = torch.where(y != ignore_index, logps, 0.0)
    else:
        by_token = logps.new_zeros(batch * tokens).index_copy(0, rows[:count], logps)
    totals = by_token.view(batch, tokens).sum(1)
    # A bias of -inf leaves the loss finite, unless it is some target's.
    parts = (totals, sums) if bias is None else (totals, sums, bias)
    if validate and not bool(torch.stack([part.isfinite().all() for part in parts]).all()):
        refuse_nonfinite(**{input_name: input, weight_name: weight, bias_name: bias})
        raise InputError(
            f"a log-probability is not finite although {input_name} and {weight_name} are: their products overflow "
            f"float32; scale them down"
        )
    statistics = logps.new_zeros(2, batch * tokens)
    statistics[0, :count], statistics[1, :count] = logsumexp, logps
    return totals, sums, statistics, rows, torch.tensor(count)


@_sequence_logps.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    average: bool,
    logit_sums: bool,
    allow_tf32: bool,
    validate: bool,
    workspace: int,
    names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens = target.shape
    wide = input.new_empty(batch, dtype=torch.float64)
    return (
        wide,
        torch.empty_like(wide),
        input.new_empty((2, batch * tokens), dtype=torch.float64),
        target.new_empty(batch * tokens, dtype=torch.int64),
        torch.empty((), dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op("ktonum::sequence_logps_backward", mutates_args=())
def _sequence_logps_backward(
    upstream: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    rows: Tensor,
    row_count: Tensor,
    input_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    ignore_index: int,
    allow_tf32: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; an empty tensor in the place of each that is not needed."""
    count = int(row_count)
    batch, tokens = target.shape
    hidden, vocabulary = input.shape[-1], weight.shape[0]
    wide = accumulator_dtype(input.dtype)
    x, y = _packed(input, target, rows, count)
    flat = rows[:count]
    # ∂L/∂log π(y_t) is its sequence's upstream gradient, 0 for masked tokens.
    coefficients = torch.where(y != ignore_index, upstream.index_select(0, flat // tokens), 0.0)
    logsumexp, logps = (row.contiguous() for row in statistics[:, :count])
    # c_t (1 − p_{t,y_t}), without cancellation where p is near 1.
    at_target = (-torch.expm1(logps) * coefficients).to(wide)
    coefficients = coefficients.to(wide)
    sums = launch.bias_partials(count, weight) if bias_gradient else None
    grad_weight = weight.new_zeros(weight.shape if weight_gradient else 0)
    x_sums = torch.zeros((count, hidden) if input_gradient else 0, dtype=wide, device=input.device)
    weighted_x, factor = _weighted(x, -coefficients) if weight_gradient else (x, None)
    columns = _slab_columns(count, vocabulary, launch.slab_dtype(input.dtype), workspace)
    buffer = torch.empty((count, columns), dtype=launch.slab_dtype(input.dtype), device=input.device)
    contiguous_bias = _contiguous(bias)
    with full_precision_products(input.device, allow_tf32=allow_tf32):
        for start in range(0, vocabulary if count else 0, columns):
            stop = min(start + columns, vocabulary)
            slab = buffer[:, : stop - start]
            launch.probabilities(
                x,
                weight,
                contiguous_bias,
                y,
                logsumexp,
                slab=slab,
                slab_start=start,
                coefficients=coefficients,
                bias_sums=sums,
                allow_tf32=allow_tf32,
            )
            rounded = slab.to(input.dtype)
            if input_gradient:
                add_product(x_sums, rounded, weight[start:stop])
            if weight_gradient:
                write_product(grad_weight[start:stop], rounded.t(), weighted_x, factor)
    if weight_gradient:
        launch.add_target_terms(grad_weight, x, at_target, y)
    grad_input = input.new_zeros((batch * tokens, hidden) if input_gradient else 0)
    if input_gradient:
        x_sums *= (-coefficients / launch.slab_scale(input.dtype)).unsqueeze(1)
        at_targets = weight.index_select(0, y.clamp(0, vocabulary - 1))
        x_sums.addcmul_(at_targets.to(wide), at_target.unsqueeze(1))
        grad_input.index_copy_(0, flat, x_sums.to(input.dtype))
        grad_input = grad_input.view(batch, tokens, hidden)
    grad_bias = weight.new_zeros(vocabulary if bias_gradient else 0)
    if sums is not None and count:
        grad_bias.copy_(sums.sum(0, dtype=torch.float64))
    return grad_input, grad_weight, grad_bias


@_sequence_logps_backward.register_fake
def _(
    upstream: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    rows: Tensor,
    row_count: Tensor,
    input_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    ignore_index: int,
    allow_tf32: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape if input_gradient else (0,)),
        weight.new_empty(weight.shape if weight_gradient else (0,)),
        weight.new_empty((weight.shape[0] if bias_gradient else 0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, bias, target, ignore_index, _, _, allow_tf32, _, workspace, _ = inputs
    _, _, statistics, rows, count = output
    ctx.save_for_backward(input, weight, bias, target, statistics, rows, count)
    ctx.options = (ignore_index, allow_tf32, workspace)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    unused = (None,) * (len(ctx.needs_input_grad) - 3)
    if upstream is None or not any(needed):
        return (None, None, None, *unused)
    input, weight, bias, target, statistics, rows, count = ctx.saved_tensors
    gradients = torch.ops.ktonum.sequence_logps_backward(
        upstream, input, weight, bias, target, statistics, rows, count, *needed, *ctx.options
    )
    return (*(g if n else None for g, n in zip(gradients, needed, strict=True)), *unused)


def _refuse_second_derivative(*_: Any) -> None:
    raise NotImplementedError(
        "the KTO kernels have no second derivative (create_graph=True, or a backward through a gradient): use "
        "ktonum.kernels.ReferenceKTOLoss for it"
    )


_sequence_logps.register_autograd(_backward, setup_context=_setup_context)
_sequence_logps_backward.register_autograd(_refuse_second_derivative)


@torch.library.custom_op("ktonum::finite_double", mutates_args=())
def _finite_double(tensor: Tensor, name: str) -> Tensor:
    refuse_nonfinite(**{name: tensor})
    return tensor.to(torch.float64, copy=True)


@_finite_double.register_fake
def _(tensor: Tensor, name: str) -> Tensor:
    return torch.empty_like(tensor, dtype=torch.float64)


def detached_double(tensor: Tensor | None, *, name: str, validate: bool) -> Tensor | None:
    """``tensor`` in float64 and without gradient; with ``validate`` it must be finite.

    Raises:
        InputError: It is not.
    """
    if tensor is None:
        return None
    detached = tensor.detach()
    return torch.ops.ktonum.finite_double(detached, name) if validate else detached.double()


def sequence_logps(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int,
    average: bool,
    logit_sums: bool,
    allow_tf32: bool,
    validate: bool,
    workspace: int,
    names: str,
) -> tuple[Tensor, Tensor]:
    """Sum of each sequence's unmasked log-probabilities, differentiable, and sum of all its logits, not.

    Args:
        input: Hidden states, (B, T, H), any strides.
        weight: Head, (V, H), any strides.
        bias: (V,) or None.
        target: (B, T), integer.
        ignore_index: Marks masked tokens: they cost no matrix work.
        average: The sums are to be divided by the numbers of unmasked tokens, so there must be one.
        logit_sums: Compute the sums of logits, else return zeros.
        allow_tf32: Let float32 products run in TF32.
        validate: Check targets and finiteness, at the price of a device synchronisation.
        workspace: Bytes that the backward may use for a slab of probabilities.
        names: What messages call input, weight, bias and target, separated by blanks.

    Returns:
        Two float64 tensors, (B,).

    Raises:
        InputError: The device cannot run the kernels; with ``validate`` also for targets outside the vocabulary,
            inputs that are not finite, and an average over nothing.
    """
    launch.check_device(input.device)
    logps, sums, *_ = torch.ops.ktonum.sequence_logps(
        input, weight, bias, target.long(), ignore_index, average, logit_sums, allow_tf32, validate, workspace, names
    )
    return logps, sums.detach()


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _unmasked_rows(target: Tensor, vocabulary: int, ignore_index: int, validate: bool, name: str) -> tuple[Tensor, int]:
    """Flat indices of unmasked tokens first, (B·T,), and how many there are; the one synchronisation of a forward."""
    flat = target.reshape(-1)
    unmasked = flat != ignore_index
    if flat.is_cuda and torch.cuda.is_current_stream_capturing():
        if validate:
            raise InputError(
                "values cannot be validated while a CUDA graph is captured: pass validate=False, after a validated "
                "run on the same inputs"
            )
        return torch.arange(flat.numel(), device=flat.device), flat.numel()
    rows = torch.argsort(unmasked.logical_not(), stable=True)
    count, outside = torch.stack([unmasked.sum(), (unmasked & ((flat < 0) | (flat >= vocabulary))).sum()]).tolist()
    if validate and outside:
        at = int((unmasked & ((flat < 0) | (flat >= vocabulary))).nonzero()[0])
        raise InputError(
            f"{name}[{at // target.shape[1]}, {at % target.shape[1]}] = {int(flat[at])} is outside the vocabulary "
            f"[0, {vocabulary}) and is not ignore_index = {ignore_index}; mask the token or mend the target"
        )
    return rows, count


def _packed(input: Tensor, target: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Hidden states and targets of the first ``count`` rows: (count, H) and (count,)."""
    x, y = input.reshape(-1, input.shape[-1]), target.reshape(-1).contiguous()
    if count == y.numel():
        return x, y
    return x.index_select(0, rows[:count]), y.index_select(0, rows[:count])


def _logit_sums(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Σ_t Σ_v z_tv = (Σ_t x_t) · (Σ_v w_v) + T Σ_v b_v, (B,), float64: no pass over logits, masked tokens included."""
    # Summed in the accumulator's dtype: asked for float64, torch first copies the weight (4.6 GiB at V = 151,936).
    wide = accumulator_dtype(input.dtype)
    sums = input.sum(1, dtype=wide).double() @ weight.sum(0, dtype=wide).double()
    return sums if bias is None else sums + input.shape[1] * bias.sum(dtype=torch.float64)


def _weighted(x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
    """c_t x_t in x's dtype, (N, H), up to the second result: the operand of Σ_t p_tv c_t x_t.

    In float16 the products are kept in range by a common power of two, which is given back as a factor together with
    the slab's.
    """
    if x.dtype != torch.float16:
        return (x.to(coefficients.dtype) * coefficients.unsqueeze(1)).to(x.dtype), None
    _, exponent = torch.frexp(coefficients.abs().amax())
    size = torch.exp2(exponent.to(coefficients.dtype))
    return (x.float() * (coefficients / size).unsqueeze(1)).to(x.dtype), size / launch.slab_scale(x.dtype)


def _slab_columns(rows: int, vocabulary: int, dtype: torch.dtype, workspace: int) -> int:
    """Vocabulary entries a slab of at most ``workspace`` bytes holds, a multiple of 256 so that tiles stay whole."""
    fits = workspace // max(1, rows * dtype.itemsize) // 256 * 256
    return min(vocabulary, max(256, fits))
