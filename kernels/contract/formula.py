r"""The KTO formula: per-sequence log-probabilities in, per-sequence losses out. Plain differentiable PyTorch on (B,).

The formula is stated twice:

- Here. The reference ends here, and so does the fused loss under torch.compile. Tests hold this statement to TRL's
  trainer, Liger-Kernel and high-precision arithmetic.
- In `ktonum.kernels.device.formula.kernels`, as one kernel that computes losses, derivative and metrics. The fused loss
  ends there outside torch.compile, because PyTorch launches 45 kernels for the functions below from `kto_losses` on.

`test_every_configuration` in ``tests/kto_kernels/device/test_formula_kernel.py`` compares the two on every pair of
parameters. `sequence_means` and `kl_estimate` are here alone, and every path uses them.

With the implied reward :math:`r_i = \log\pi(y_i|x_i) - \log\pi_\mathrm{ref}(y_i|x_i)`, the reference point
:math:`z_0 = \max(0, \mathrm{mean}_j\, r_j^\mathrm{KL})` and :math:`\sigma` the logistic function:

- ``kto`` (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, eq. 7):
  desirable :math:`\lambda_D (1 - \sigma(\beta (r_i - z_0)))`,
  undesirable :math:`\lambda_U (1 - \sigma(\beta (z_0 - r_i)))`;
- ``apo_zero_unpaired`` (D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, eq. 7, unpaired):
  desirable :math:`\lambda_D (1 - \sigma(\beta r_i))`, undesirable :math:`\lambda_U\, \sigma(\beta r_i)`.

TRL's ``KTOTrainer`` is the authority on the meaning of each parameter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig

__all__ = ["METRICS", "kl_estimate", "kto_losses", "reduce_losses", "sequence_means", "split_sums"]


#: The second element of every KTO loss's result, in Liger-Kernel's order: sums over the batch.
METRICS = (
    "chosen_logps_sum",
    "rejected_logps_sum",
    "chosen_logits_sum",
    "rejected_logits_sum",
    "chosen_rewards_sum",
    "rejected_rewards_sum",
)


def sequence_means(token_sums: Tensor, counts: Tensor, config: KTOConfig) -> Tensor:
    """Log-probability of each sequence, (B,), from its sum over unmasked tokens and their number.

    With ``average_log_prob`` a sequence without unmasked tokens has none, so it gets NaN, as in TRL. The NaN is a
    constant, so that no gradient flows: TRL's 0/0 would turn every gradient of the weight into NaN.
    """
    if not config.average_log_prob:
        return token_sums
    means = token_sums / counts.clamp(min=1)
    return torch.where(counts > 0, means, torch.full_like(means, math.nan))


def kl_estimate(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """The reference point z_0: batch mean of the KL sequences' log-ratios, clamped at 0, without gradient. A scalar.

    TRL's ``KTOTrainer._compute_loss``: ``(KL_logps - ref_KL_logps).mean().detach()``, then ``.clamp(min=0)``. Sequences
    without an average log-probability (NaN, see `sequence_means`) do not take part, as in the loss's own mean.
    """
    return (policy_logps - reference_logps).nanmean().detach().clamp(min=0)


def kto_losses(
    logps: Tensor, reference_logps: Tensor | None, labels: Tensor, kl: Tensor | None, config: KTOConfig
) -> Tensor:
    """Loss of each sequence, (B,), in the dtype of ``logps``.

    Args:
        logps: Policy log-probabilities, (B,).
        reference_logps: Reference log-probabilities, (B,), or None for a reference-free loss (they count as 0).
        labels: True for desirable sequences, (B,), bool.
        kl: The reference point, a scalar, (1,) or (B,); None counts as 0. Not used by ``apo_zero_unpaired``.
        config: The parameters.
    """
    ratios = logps if reference_logps is None else logps - reference_logps
    # z = β (r − z_0) if desirable, β (z_0 − r) if undesirable; apo_zero_unpaired: the same with z_0 = 0,
    # since σ(β r) = 1 − σ(−β r).
    if kl is not None and config.loss_type == "kto":
        ratios = ratios - kl
    margins = config.beta * torch.where(labels, ratios, -ratios)
    # Filled in, because `torch.where` of two Python numbers would round them to float32.
    weights = torch.full_like(margins, config.undesirable_weight).masked_fill(labels, config.desirable_weight)
    # 1 − σ(z) = σ(−z). Autograd's derivative of a sigmoid y is y (1 − y), which cancels where y is near 1. So each side
    # of zero uses the sigmoid that is small there: for the value where z > 0, and for the derivative on both sides.
    return weights * torch.where(margins > 0, torch.sigmoid(-margins), 1 - torch.sigmoid(margins))


def reduce_losses(losses: Tensor, config: KTOConfig) -> Tensor:
    """``losses`` reduced as ``config`` says, without the sequences that have no loss (NaN, see `sequence_means`).

    TRL reduces with ``losses.nanmean()``. Under ``none`` such losses stay NaN.
    """
    if config.reduction == "none":
        return losses
    if not config.average_log_prob:
        return losses.mean() if config.reduction == "mean" else losses.sum()
    return losses.nanmean() if config.reduction == "mean" else losses.nansum()


def split_sums(values: Tensor, labels: Tensor) -> Tensor:
    """Sums of ``values``, (..., B), over desirable and over undesirable sequences, skipping NaN as TRL's metrics do.

    Returns:
        (..., 2), desirable first.
    """
    sides = torch.stack((labels, ~labels))
    return torch.where(sides, values.unsqueeze(-2), torch.zeros((), dtype=values.dtype, device=values.device)).nansum(
        -1
    )
