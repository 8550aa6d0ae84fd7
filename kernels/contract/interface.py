"""The interface of all KTO losses: Liger-Kernel's constructor and ``forward``, with keywords for what it lacks."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels.contract.config import KTOConfig, LossType, Reduction
from ktonum.kernels.contract.inputs import KTOInputs

__all__ = ["KTOLoss", "cast_for_autocast"]

# What autocast casts for `linear`. Everything else has B elements, or is integer.
_CAST = ("input", "weight", "bias", "ref_input", "ref_weight", "ref_bias", "kl_input", "kl_ref_input")


def cast_for_autocast(inputs: KTOInputs) -> KTOInputs:
    """``inputs`` with hidden states, heads and biases in autocast's dtype, if it is on; float64 stays, as in torch."""
    if not isinstance(inputs.input, Tensor) or not torch.is_autocast_enabled(inputs.input.device.type):
        return inputs
    dtype = torch.get_autocast_dtype(inputs.input.device.type)
    cast = {
        name: tensor.to(dtype)
        for name, tensor in inputs.tensors().items()
        if name in _CAST and tensor.is_floating_point() and tensor.dtype != torch.float64
    }
    return replace(inputs, **cast)


class KTOLoss(torch.nn.Module):
    """A KTO loss with the constructor and ``forward`` of Liger-Kernel's ``LigerFusedLinearKTOLoss``.

    A subclass computes the loss in `compute`.

    Args:
        ignore_index, beta, average_log_prob, loss_type, desirable_weight, undesirable_weight, reduction: See
            `KTOConfig`.
        compiled, chunk_size: Arguments of Liger-Kernel. They are accepted and have no effect.
        use_ref_model: Whether ``forward`` uses the reference model's tensors, or ``ref_logps``.
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
    ) -> None:
        super().__init__()
        self.use_ref_model = use_ref_model
        self.config = KTOConfig(
            loss_type=loss_type,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            ignore_index=ignore_index,
            average_log_prob=average_log_prob,
            reduction=reduction,
        )

    def compute(self, inputs: KTOInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the six metrics. ``inputs`` are cast for autocast, but not checked."""
        raise NotImplementedError

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
        kl_input: Tensor | None = None,
        kl_target: Tensor | None = None,
        kl_ref_input: Tensor | None = None,
        kl_ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, a scalar or (B,), and six sums in the order of `ktonum.kernels.contract.formula.METRICS`.

        Shapes are those of `KTOInputs`. Only the loss carries a gradient.

        Raises:
            InputError: An argument does not fit, or ``use_ref_model=True`` and neither reference was given.
        """
        reference = {
            "ref_input": ref_input,
            "ref_weight": ref_weight,
            "ref_bias": ref_bias,
            "ref_logps": ref_logps,
            "kl_ref_input": kl_ref_input,
            "kl_ref_logps": kl_ref_logps,
        }
        if self.use_ref_model and ref_input is None and ref_logps is None:
            raise InputError("use_ref_model=True needs ref_input and ref_weight, or ref_logps; none was given")
        given = [name for name, tensor in reference.items() if tensor is not None]
        if not self.use_ref_model and given:
            warnings.warn(
                f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} not used, since use_ref_model=False "
                f"(Liger's default); construct the loss with use_ref_model=True to use the reference model",
                # The line that calls the module; two frames of torch lie between.
                stacklevel=4,
            )
            reference = dict.fromkeys(reference)
        inputs = KTOInputs(
            input=_input,
            weight=lin_weight,
            target=target,
            preference_labels=preference_labels,  # type: ignore[arg-type]  # None is refused with a message of its own
            bias=bias,
            kl=kl,
            kl_input=kl_input,
            kl_target=kl_target,
            **reference,
        )
        return self.compute(cast_for_autocast(inputs))

    def extra_repr(self) -> str:
        """The parameters, as `torch.nn.Module` prints them."""
        return f"{self.config}, use_ref_model={self.use_ref_model}"
