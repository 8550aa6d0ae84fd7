"""Triton: the KTO formula from sequences' log-probabilities on, in one launch: loss, derivative, metrics.

This is the second statement of the formula. `ktonum.kernels.contract.formula` has the first, for the reference and for
the fused loss under torch.compile. PyTorch makes 45 launches of that one, which a small batch waits for, so the fused
loss uses this one everywhere else. `test_every_configuration` in ``tests/kto_kernels/device/test_formula_kernel.py``
compares the two on every pair of parameters.
"""

# Triton reads the annotations of jitted functions as objects, so their evaluation is not postponed in this module.
import triton
import triton.language as tl

__all__ = ["formula_kernel"]


@triton.jit(do_not_specialize=["batch", "stride_kl", "beta", "desirable_weight", "undesirable_weight"])
def formula_kernel(
    policy_ptr,
    reference_ptr,
    kl_ptr,
    label_ptr,
    logit_sum_ptr,
    loss_ptr,
    slope_ptr,
    metric_ptr,
    batch,
    stride_kl,
    beta,
    desirable_weight,
    undesirable_weight,
    HAS_REFERENCE: tl.constexpr,
    HAS_KL: tl.constexpr,
    REDUCTION: tl.constexpr,
    SKIP_NAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses λ σ(−m) with m = ±β (r − z_0), reduced; their slopes; and six sums. One program.

    ``policy``, ``reference``, ``kl`` and ``logit_sum`` are float64, (batch,), ``kl`` with a stride of 0 or 1; ``label``
    is uint8. ``slope`` gets ∂loss/∂policy, float64. REDUCTION is that of `KTOConfig`; with SKIP_NAN it leaves out
    sequences without a loss. β and the weights come as the bits of float64 numbers, because a float that is handed to a
    kernel arrives as float32.
    """
    b = beta.to(tl.int64).to(tl.float64, bitcast=True)
    desirable = desirable_weight.to(tl.int64).to(tl.float64, bitcast=True)
    undesirable = undesirable_weight.to(tl.int64).to(tl.float64, bitcast=True)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    present = tl.zeros((BLOCK,), dtype=tl.float64)
    for side in tl.static_range(2):
        logps_sum = tl.zeros((BLOCK,), dtype=tl.float64)
        logits_sum = tl.zeros((BLOCK,), dtype=tl.float64)
        rewards_sum = tl.zeros((BLOCK,), dtype=tl.float64)
        for first in range(0, batch, BLOCK):
            at = first + tl.arange(0, BLOCK)
            mask = at < batch
            label = tl.load(label_ptr + at, mask=mask, other=0) != 0
            mine = mask & (label if side == 0 else label == 0)
            policy = tl.load(policy_ptr + at, mask=mine, other=0.0)
            ratio = policy
            if HAS_REFERENCE:
                ratio = policy - tl.load(reference_ptr + at, mask=mine, other=0.0)
            logits = tl.load(logit_sum_ptr + at, mask=mine, other=0.0)
            logps_sum += tl.where(policy == policy, policy, 0.0)
            logits_sum += tl.where(logits == logits, logits, 0.0)
            rewards_sum += tl.where(ratio == ratio, b * ratio, 0.0)
            if HAS_KL:
                ratio -= tl.load(kl_ptr + at * stride_kl, mask=mine, other=0.0)
            # m = β (r − z_0), or β (z_0 − r)
            weight = desirable if side == 0 else undesirable
            slope = b if side == 0 else -b
            margin = slope * ratio
            # σ(−m) = x / (1 + x) or 1 / (1 + x), and dσ(−m)/dm = −x / (1 + x)², with x = e^−|m| ≤ 1
            x = tl.exp(-tl.abs(margin))
            loss = weight * tl.where(margin > 0.0, x, 1.0) / (1.0 + x)
            slope = -slope * weight * x / ((1.0 + x) * (1.0 + x))
            has_loss = mine
            if SKIP_NAN:
                has_loss = mine & (loss == loss)
                slope = tl.where(has_loss, slope, 0.0)
            tl.store(slope_ptr + at, slope, mask=mine)
            if REDUCTION == "none":
                tl.store(loss_ptr + at, loss.to(loss_ptr.dtype.element_ty), mask=mine)
            else:
                total += tl.where(has_loss, loss, 0.0)
                present += has_loss.to(tl.float64)
        dtype = metric_ptr.dtype.element_ty
        tl.store(metric_ptr + side, tl.sum(logps_sum, axis=0).to(dtype))
        tl.store(metric_ptr + 2 + side, tl.sum(logits_sum, axis=0).to(dtype))
        tl.store(metric_ptr + 4 + side, tl.sum(rewards_sum, axis=0).to(dtype))
    if REDUCTION != "none":
        reduced = tl.sum(total, axis=0)
        if REDUCTION == "mean":
            count = tl.sum(present, axis=0)
            reduced = reduced / count
            tl.debug_barrier()
            for first in range(0, batch, BLOCK):
                at = first + tl.arange(0, BLOCK)
                slope = tl.load(slope_ptr + at, mask=at < batch, other=0.0)
                tl.store(slope_ptr + at, slope / count, mask=at < batch)
        tl.store(loss_ptr, reduced.to(loss_ptr.dtype.element_ty))
