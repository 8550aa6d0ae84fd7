"""Launching the loss formula on sequences' log-probabilities."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.formula import METRICS
from ktonum.kernels.device.formula.kernels import formula_kernel
from ktonum.kernels.device.trace import note

__all__ = ["FormulaInputs", "formula"]


@dataclass(frozen=True)
class FormulaInputs:
    """What the formula takes. Log-probabilities are of sequences, float64.

    Attributes:
        policy: (B,).
        reference: (B,), or None.
        kl: The reference point, a scalar, (1,) or (B,); None counts as 0.
        labels: True for desirable sequences, (B,), bool.
        logit_sums: (B,), for the metrics.
    """

    policy: Tensor
    reference: Tensor | None
    kl: Tensor | None
    labels: Tensor
    logit_sums: Tensor


def formula(inputs: FormulaInputs, config: KTOConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, ∂loss/∂policy, (B,) in float64, and the `METRICS`, (6,).

    Args:
        inputs: See there.
        config: The parameters.
        dtype: Of loss and metrics. The loss is a scalar, or (B,) for ``reduction="none"``.
    """
    policy, kl = inputs.policy.contiguous(), inputs.kl if config.loss_type == "kto" else None
    batch = len(policy)
    loss = policy.new_empty(batch if config.reduction == "none" else (), dtype=dtype)
    slope = torch.empty_like(policy)
    metrics = policy.new_empty(len(METRICS), dtype=dtype)
    formula_kernel[(1,)](
        policy,
        policy if inputs.reference is None else inputs.reference.contiguous(),
        policy if kl is None else kl.contiguous(),
        inputs.labels.contiguous().view(torch.uint8),
        inputs.logit_sums,
        loss,
        slope,
        metrics,
        batch=batch,
        stride_kl=0 if kl is None or kl.numel() == 1 else 1,
        beta=_bits(config.beta),
        desirable_weight=_bits(config.desirable_weight),
        undesirable_weight=_bits(config.undesirable_weight),
        HAS_REFERENCE=inputs.reference is not None,
        HAS_KL=kl is not None,
        REDUCTION=config.reduction,
        SKIP_NAN=config.average_log_prob,
        BLOCK=128,
        num_warps=4,
    )
    note("formula_kernel", policy.dtype, sequences=batch)
    return loss, slope, metrics


def _bits(value: float) -> int:
    """The bits of a float64 number."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
