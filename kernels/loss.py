"""The loss that users import: `fused_linear_kto_loss`, and the module `FusedLinearKTOLoss`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels.contract.config import KTOConfig, LossType, Reduction
from ktonum.kernels.contract.formula import kl_estimate, kto_losses, reduce_losses, sequence_means, split_sums
from ktonum.kernels.contract.inputs import KTOInputs, check_structure
from ktonum.kernels.contract.interface import KTOLoss, cast_for_autocast
from ktonum.kernels.device.formula.launch import FormulaInputs
from ktonum.kernels.device.slabs import DEFAULT_COMPUTED, DEFAULT_WORKSPACE, Workspace
from ktonum.kernels.step.autograd import differentiable_formula, sequence_logps
from ktonum.kernels.step.forward_passes import ScoringOptions

__all__ = ["FusedLinearKTOLoss", "KernelOptions", "fused_linear_kto_loss"]


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """How the loss is computed. No option changes which function it is.

    Attributes:
        allow_tf32: Let products of float32 inputs run in TF32, which has three digits instead of seven.
        validate: Check values: targets inside the vocabulary, finite inputs. This synchronises with the device. Must be
            False while a CUDA graph is captured.
        workspace: Bytes of exponentials (tokens × vocabulary) that the forward may store for the backward. The others
            are stored in the memory of the weight's gradient, as far as they fit, which the forward then allocates. The
            rest is computed again, which costs up to a fifth matrix product beside four.
        computed_at_a_time: Bytes of those that the backward computes at a time, if not all of them can be stored.
    """

    allow_tf32: bool = False
    validate: bool = True
    workspace: int = DEFAULT_WORKSPACE
    computed_at_a_time: int = DEFAULT_COMPUTED

    def __post_init__(self) -> None:
        for name in ("workspace", "computed_at_a_time"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise InputError(f"{name} = {value!r}: pass a positive number of bytes")


def fused_linear_kto_loss(
    inputs: KTOInputs, config: KTOConfig | None = None, options: KernelOptions | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The KTO loss and six metrics, without ever storing all logits.

    Gradients flow to ``input``, ``weight`` and ``bias``, and only those that are needed are computed. None flow to the
    reference model, the KL sequences or from the metrics. Under ``torch.autocast`` floating tensors are cast as for
    ``linear``.

    Args:
        inputs: The tensors, see `KTOInputs` for names and shapes. CUDA tensors; under Triton's interpreter any.
        config: The loss's parameters, see `KTOConfig`.
        options: See `KernelOptions`.

    Returns:
        The loss (a scalar, or (B,) for ``reduction="none"``) and sums over desirable and over undesirable sequences of
        log-probabilities, logits and rewards, in the order of `ktonum.kernels.contract.formula.METRICS`. float64 for
        float64 inputs, otherwise float32.

    Raises:
        InputError: An argument does not fit; the message says which, and what is accepted.
    """
    config, options = config or KTOConfig(), options or KernelOptions()
    inputs = cast_for_autocast(inputs)
    check_structure(inputs, config)

    scoring = ScoringOptions(
        ignore_index=config.ignore_index,
        average=config.average_log_prob,
        allow_tf32=options.allow_tf32,
        validate=options.validate,
        workspace=Workspace(options.workspace, options.computed_at_a_time),
    )
    sums = sequence_logps(inputs, scoring)
    reference_logps, kl, kl_reference = (
        None if tensor is None else tensor.detach().double()
        for tensor in (inputs.ref_logps, inputs.kl, inputs.kl_ref_logps)
    )

    def means(sums: Tensor, target: Tensor) -> Tensor:
        # Counting costs launches, and small batches wait for each launch.
        counts = (target != config.ignore_index).sum(1) if config.average_log_prob else sums
        return sequence_means(sums, counts, config)

    policy_logps = means(sums.policy, inputs.target)
    if sums.reference is not None:
        reference_logps = means(sums.reference, inputs.target)
    if sums.kl is not None and inputs.kl_target is not None:
        kl_logps = means(sums.kl, inputs.kl_target)
        if sums.kl_reference is not None:
            kl_reference = means(sums.kl_reference, inputs.kl_target)
        kl = kl_estimate(kl_logps, torch.zeros_like(kl_logps) if kl_reference is None else kl_reference)
    out = torch.float64 if inputs.input.dtype == torch.float64 else torch.float32
    if not torch.compiler.is_compiling():
        formula = FormulaInputs(policy_logps, reference_logps, kl, inputs.preference_labels, sums.logits)
        loss, metrics = differentiable_formula(formula, config, out)
        return loss, metrics.unbind()
    # In float64 up to the loss, because a sequence's log-ratio is a small difference of sums over thousands of tokens.
    loss = reduce_losses(kto_losses(policy_logps, reference_logps, inputs.preference_labels, kl, config), config)
    with torch.no_grad():
        rewards = config.beta * (policy_logps if reference_logps is None else policy_logps - reference_logps)
        metrics = split_sums(torch.stack((policy_logps, sums.logits, rewards)), inputs.preference_labels)
    return loss.to(out), metrics.to(out).flatten().unbind()


class FusedLinearKTOLoss(KTOLoss):
    """`fused_linear_kto_loss` behind the interface of Liger-Kernel's ``LigerFusedLinearKTOLoss``.

    To migrate, swap the import. What Liger-Kernel lacks comes as keywords.

    Args:
        allow_tf32, validate, workspace: See `KernelOptions`. All others: see `KTOLoss`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        loss_type: LossType = "kto",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reduction: Reduction = "mean",
        allow_tf32: bool = False,
        validate: bool = True,
        workspace: int = DEFAULT_WORKSPACE,
    ) -> None:
        super().__init__(
            ignore_index,
            beta,
            compiled,
            use_ref_model,
            average_log_prob,
            chunk_size,
            loss_type=loss_type,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            reduction=reduction,
        )
        self.options = KernelOptions(allow_tf32=allow_tf32, validate=validate, workspace=workspace)

    def compute(self, inputs: KTOInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `fused_linear_kto_loss`."""
        return fused_linear_kto_loss(inputs, self.config, self.options)
