"""KTO in plain PyTorch in any dtype. In float64 it is the oracle, in the dtype under audit the `eager` standard.

Logits are stored in full and rounded to the inputs' dtype, as in Hugging Face's trainers. The log-softmax of 16-bit
logits runs in float32, as in Liger-Kernel and TRL.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.formula import kl_estimate, kto_losses, reduce_losses, sequence_means, split_sums
from ktonum.kernels.contract.inputs import KTOInputs, check_values
from ktonum.kernels.contract.interface import KTOLoss

__all__ = ["LOGITS_AT_ONCE", "ReferenceKTOLoss", "reference_kto_loss"]

#: The most logits that a pass keeps by default: 2**27 float64 values are 1 GiB, and a backward holds three
#: such buffers.
LOGITS_AT_ONCE = 2**27


def _token_logps(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, 0 where masked, (B, T), and the sum of all logits of each sequence, (B,)."""
    logits = torch.nn.functional.linear(input, weight, bias)
    wide = torch.promote_types(input.dtype, torch.float32)
    unmasked = target != ignore_index
    index = torch.where(unmasked, target, 0).long()  # gather takes no narrower integers
    logps = logits.to(wide).log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return torch.where(unmasked, logps, 0.0), logits.detach().sum((-2, -1), dtype=wide)


def _sequence_logps(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, config: KTOConfig, logits_at_once: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of each sequence, (B,), and the sum of all its logits, (B,)."""
    batch, tokens = target.shape
    if batch * tokens * weight.shape[0] <= logits_at_once:
        logps, logits = _token_logps(input, weight, bias, target, config.ignore_index)
    else:
        rows = [
            checkpoint(_token_logps, input[i], weight, bias, target[i], config.ignore_index, use_reentrant=False)
            for i in range(batch)
        ]
        logps, logits = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
    return sequence_means(logps.sum(1), (target != config.ignore_index).sum(1), config), logits


def reference_kto_loss(
    inputs: KTOInputs, config: KTOConfig, *, logits_at_once: int = LOGITS_AT_ONCE
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The KTO loss and Liger-Kernel's six metrics.

    Args:
        inputs: Validated tensors, see `KTOInputs`; any floating dtype, one for all.
        config: The parameters.
        logits_at_once: A pass with more logits keeps those of one sequence at a time.

    Returns:
        The loss, a scalar or (B,), and the metrics in the order of `ktonum.kernels.contract.formula.METRICS`; float64
        for float64 inputs, otherwise float32. Only the loss carries a gradient.

    Raises:
        InputError: See `check_values`.
    """
    check_values(inputs, config)
    labels = inputs.preference_labels

    def score(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
        return _sequence_logps(input, weight, bias, target, config, logits_at_once)

    logps, logits = score(inputs.input, inputs.weight, inputs.bias, inputs.target)
    with torch.no_grad():
        reference_logps = None if inputs.ref_logps is None else inputs.ref_logps.detach()
        if inputs.ref_input is not None and inputs.ref_weight is not None:
            reference_logps, _ = score(inputs.ref_input, inputs.ref_weight, inputs.ref_bias, inputs.target)
        kl = None if inputs.kl is None else inputs.kl.detach()
        if inputs.kl_input is not None and inputs.kl_target is not None:
            kl_logps, _ = score(inputs.kl_input, inputs.weight, inputs.bias, inputs.kl_target)
            kl_reference = inputs.kl_ref_logps
            if inputs.kl_ref_input is not None and inputs.ref_weight is not None:
                kl_reference, _ = score(inputs.kl_ref_input, inputs.ref_weight, inputs.ref_bias, inputs.kl_target)
            kl = kl_estimate(kl_logps, torch.zeros_like(kl_logps) if kl_reference is None else kl_reference)
    if reference_logps is not None:
        reference_logps = reference_logps.to(logps.dtype)
    loss = reduce_losses(
        kto_losses(logps, reference_logps, labels, None if kl is None else kl.to(logps.dtype), config), config
    )
    with torch.no_grad():
        rewards = config.beta * (logps if reference_logps is None else logps - reference_logps)
        metrics = (*split_sums(logps, labels), *split_sums(logits, labels), *split_sums(rewards, labels))
    return loss, metrics


class ReferenceKTOLoss(KTOLoss):
    """`reference_kto_loss` behind the interface of Liger-Kernel's ``LigerFusedLinearKTOLoss``."""

    def compute(self, inputs: KTOInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `reference_kto_loss`."""
        return reference_kto_loss(inputs, self.config)
