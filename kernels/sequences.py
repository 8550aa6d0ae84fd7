"""Log-probabilities of sequences and their gradients, on plain tensors.

`ktonum.kernels.autograd` makes a differentiable operator of the two functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels import launch
from ktonum.kernels.packing import packed, unmasked_rows
from ktonum.kernels.products import accumulator_dtype, add_product, full_precision_products, product
from ktonum.kernels.validation import refuse_nonfinite

__all__ = ["Head", "SequenceSums", "sequence_gradients", "sequence_sums"]

# Rows of the weight's gradient that exist in the accumulator's dtype at a time: 128 MiB at hidden size 4096.
_WIDE_ROWS = 8192


@dataclass(frozen=True)
class Head:
    """Hidden states, the projection to logits, and the targets that are scored.

    Attributes:
        input: (B, T, H), any strides.
        weight: (V, H), any strides, dtype of ``input``.
        bias: (V,) or None.
        target: (B, T), int64.
        ignore_index: Marks masked tokens.
        allow_tf32: Let float32 products run in TF32.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ignore_index: int
    allow_tf32: bool


@dataclass(frozen=True)
class SequenceSums:
    """What a forward gives, all float64 unless said otherwise.

    Attributes:
        logps: Sums of the unmasked tokens' log-probabilities, (B,).
        logits: Sums of all logits, (B,), or zeros.
        statistics: Log-sum-exps and log-probabilities of the packed rows, (2, B·T), zeros behind them.
        rows: Flat indices of unmasked tokens first, in order, (B·T,), int64.
        count: How many they are: a CPU scalar, so that a backward reads it without a device synchronisation.
    """

    logps: Tensor
    logits: Tensor
    statistics: Tensor
    rows: Tensor
    count: Tensor


def sequence_sums(head: Head, *, average: bool, logit_sums: bool, validate: bool, names: str) -> SequenceSums:
    """The forward; arguments and errors as of `ktonum.kernels.autograd.sequence_logps`."""
    input, weight, bias, target = head.input, head.weight, head.bias, head.target
    batch, tokens = target.shape
    input_name, weight_name, bias_name, target_name = names.split()
    rows, count = unmasked_rows(target, weight.shape[0], head.ignore_index, validate, target_name)
    if validate and average and count == 0:
        raise InputError(
            f"every token of {target_name} is masked by ignore_index = {head.ignore_index}: with average_log_prob=True "
            f"the loss is 0/0; drop the batch or pass average_log_prob=False"
        )
    x, y = packed(input, target, rows, count)
    with full_precision_products(input.device, allow_tf32=head.allow_tf32):
        logps, logsumexp = launch.token_logps(x, weight, _contiguous(bias), y, allow_tf32=head.allow_tf32)
        sums = _logit_sums(input, weight, bias) if logit_sums else input.new_zeros(batch, dtype=torch.float64)
    if count == batch * tokens:
        # While a CUDA graph is captured nothing is packed, and masked tokens are among the rows.
        by_token = torch.where(y != head.ignore_index, logps, 0.0)
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
    return SequenceSums(totals, sums, statistics, rows, torch.tensor(count))


def sequence_gradients(
    head: Head, upstream: Tensor, sums: SequenceSums, *, wanted: tuple[bool, bool, bool], workspace: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; an empty tensor in the place of each that is not wanted.

    Args:
        head: As for the forward.
        upstream: ∂L/∂logps, (B,), float64.
        sums: The forward's result; of it ``statistics``, ``rows`` and ``count`` are read.
        wanted: Which of the three to compute.
        workspace: Bytes that a slab of probabilities may take.
    """
    input, weight, bias, target = head.input, head.weight, head.bias, head.target
    input_gradient, weight_gradient, bias_gradient = wanted
    count = int(sums.count)
    batch, tokens = target.shape
    hidden, vocabulary = input.shape[-1], weight.shape[0]
    wide = accumulator_dtype(input.dtype)
    x, y = packed(input, target, sums.rows, count)
    flat = sums.rows[:count]
    # ∂L/∂log π(y_t) is its sequence's upstream gradient, 0 for masked tokens.
    coefficients = torch.where(y != head.ignore_index, upstream.index_select(0, flat // tokens), 0.0)
    logsumexp, logps = (row.contiguous() for row in sums.statistics[:, :count])
    # c_t (1 − p_{t,y_t}), without cancellation where p is near 1.
    at_target = (-torch.expm1(logps) * coefficients).to(wide)
    coefficients = coefficients.to(wide)
    partials = launch.bias_partials(count, weight) if bias_gradient else None
    grad_weight = weight.new_zeros(weight.shape if weight_gradient else 0)
    x_sums = torch.zeros((count, hidden) if input_gradient else 0, dtype=wide, device=input.device)
    weighted_x, factor = _weighted(x, -coefficients) if weight_gradient else (x, None)
    targets = torch.sort(y, stable=True)
    columns = _slab_columns(count, vocabulary, launch.slab_dtype(input.dtype), workspace)
    buffer = torch.empty((count, columns), dtype=launch.slab_dtype(input.dtype), device=input.device)
    contiguous_bias = _contiguous(bias)
    with full_precision_products(input.device, allow_tf32=head.allow_tf32):
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
                bias_sums=partials,
                allow_tf32=head.allow_tf32,
            )
            rounded = slab.to(input.dtype)
            if input_gradient:
                add_product(x_sums, rounded, weight[start:stop])
            for first in range(start, stop if weight_gradient else start, _WIDE_ROWS):
                last = min(first + _WIDE_ROWS, stop)
                # Complete in the accumulator's dtype, so that it is rounded once: rounding the product before the
                # targets' terms are added doubled the error of float16's subnormal gradients.
                total = product(rounded[:, first - start : last - start].t(), weighted_x)
                if factor is not None:
                    total *= factor
                launch.add_target_terms(total, first, x, at_target, targets)
                grad_weight[first:last] = total
    grad_input = input.new_zeros((batch * tokens, hidden) if input_gradient else 0)
    if input_gradient:
        x_sums *= (-coefficients / launch.slab_scale(input.dtype)).unsqueeze(1)
        at_targets = weight.index_select(0, y.clamp(0, vocabulary - 1))
        x_sums.addcmul_(at_targets.to(wide), at_target.unsqueeze(1))
        grad_input.index_copy_(0, flat, x_sums.to(input.dtype))
        grad_input = grad_input.view(batch, tokens, hidden)
    grad_bias = weight.new_zeros(vocabulary if bias_gradient else 0)
    if partials is not None and count:
        grad_bias.copy_(partials.sum(0, dtype=torch.float64))
    return grad_input, grad_weight, grad_bias


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


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
