"""What `ktonum bench` compares: the bare matrix products, this package's loss, and the published losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.formula import kl_estimate, kto_losses, reduce_losses
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.device.products import full_precision_products
from ktonum.kernels.loss import KernelOptions, fused_linear_kto_loss

__all__ = ["LEAN_WORKSPACE", "LIMIT", "Contender", "contenders", "limit"]

LIMIT = "limit"
#: Bytes that `ktonum, lean` may store in memory of its own: next to nothing. It also uses that of the head's gradient.
LEAN_WORKSPACE = 4 * 2**20

Loss = Callable[[KTOInputs], Tensor]


@dataclass(frozen=True)
class Contender:
    """A loss under measurement.

    Attributes:
        name: What the table calls it.
        package: The distribution it comes from.
        make: Builds it. It is built for each case, so that no case has the caches and compiled code of another.
        kl_sequences: Whether it takes KL sequences.
        captured: Whether a CUDA graph of its step is timed. Only cases that name it run it.
    """

    name: str
    package: str
    make: Callable[[], Loss]
    kl_sequences: bool = False
    captured: bool = False

    @property
    def version(self) -> str | None:
        """The installed version of its package, None if it is not installed."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def limit(inputs: KTOInputs) -> Callable[[], None]:
    """The matrix products that any loss with materialised logits needs, in the dtype of the inputs, and nothing else.

    Over the unmasked tokens these are the policy's logits, the reference's logits, and the gradients of hidden states
    and head. KL sequences need two more products of logits.
    """

    def unmasked(hidden: Tensor | None, target: Tensor | None) -> Tensor | None:
        if hidden is None or target is None:
            return None
        return hidden.detach().reshape(-1, hidden.shape[-1])[(target != -100).reshape(-1)]

    weight, ref_weight = inputs.weight.detach(), inputs.ref_weight
    x, ref_x = unmasked(inputs.input, inputs.target), unmasked(inputs.ref_input, inputs.target)
    kl_x, kl_ref_x = unmasked(inputs.kl_input, inputs.kl_target), unmasked(inputs.kl_ref_input, inputs.kl_target)
    pairs = [
        (a, w) for a, w in ((x, weight), (ref_x, ref_weight), (kl_x, weight), (kl_ref_x, ref_weight)) if a is not None
    ]
    rows = max(len(a) for a, _ in pairs)
    logits = torch.empty(rows, len(weight), dtype=weight.dtype, device=weight.device)
    assert x is not None  # inputs always have hidden states

    def run() -> None:
        with full_precision_products(weight.device, allow_tf32=False):
            for a, w in pairs:
                torch.mm(a, w.t(), out=logits[: len(a)])  # type: ignore[union-attr]  # every case has a reference model
            torch.mm(logits[: len(x)], weight)
            torch.mm(logits[: len(x)].t(), x)

    return run


def _ours(options: KernelOptions) -> Loss:
    config = KTOConfig()
    return lambda inputs: fused_linear_kto_loss(inputs, config, options)[0]


def _on_log_probabilities(logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """The loss around a function from hidden states, head and targets to sequences' log-probabilities."""
    config = KTOConfig()

    def loss(inputs: KTOInputs) -> Tensor:
        with torch.no_grad():
            reference = logps(inputs.ref_input, inputs.ref_weight, inputs.target)  # type: ignore[arg-type]
            kl = None
            if inputs.kl_input is not None and inputs.kl_target is not None:
                policy_kl = logps(inputs.kl_input, inputs.weight, inputs.kl_target)
                kl = kl_estimate(policy_kl, logps(inputs.kl_ref_input, inputs.ref_weight, inputs.kl_target))  # type: ignore[arg-type]
        policy = logps(inputs.input, inputs.weight, inputs.target)
        return reduce_losses(kto_losses(policy, reference, inputs.preference_labels, kl, config), config)

    return loss


def _plain_logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight).float()
    unmasked = target != -100
    index = torch.where(unmasked, target, 0).unsqueeze(-1)
    return torch.where(unmasked, logits.log_softmax(-1).gather(-1, index).squeeze(-1), 0.0).sum(1)


def _plain() -> Loss:
    return _on_log_probabilities(_plain_logps)


def _compiled() -> Loss:
    return _on_log_probabilities(torch.compile(_plain_logps, dynamic=False))


def _cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        losses: Tensor = linear_cross_entropy(hidden, weight, target, ignore_index=-100, reduction="none")
        # Not a bare sum, whose gradient is an expanded tensor: cut-cross-entropy 25.1 takes a view that it does not
        # have.
        return -torch.where(target != -100, losses.float(), 0.0).sum(1)

    return _on_log_probabilities(logps)


def _module(module: Any) -> Loss:
    """A loss with Liger-Kernel's interface."""

    def loss(inputs: KTOInputs) -> Tensor:
        further = {k: v for k, v in inputs.tensors().items() if k.startswith("kl_")}
        value: Tensor = module(
            inputs.input,
            inputs.weight,
            inputs.target,
            preference_labels=inputs.preference_labels,
            ref_input=inputs.ref_input,
            ref_weight=inputs.ref_weight,
            **further,
        )[0]
        return value

    return loss


def _liger() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    return _module(LigerFusedLinearKTOLoss(use_ref_model=True))


def _trl() -> Loss:
    from ktonum.kernels.peers.trl_loss import TRLKTOLoss

    return _module(TRLKTOLoss(use_ref_model=True))


def contenders() -> tuple[Contender, ...]:
    """Every contender, installed or not; ours first."""
    return (
        Contender("ktonum", "torch", functools.partial(_ours, KernelOptions()), True),
        Contender("ktonum, lean", "torch", functools.partial(_ours, KernelOptions(workspace=LEAN_WORKSPACE)), True),
        Contender("plain PyTorch", "torch", _plain, True),
        Contender("torch.compile", "torch", _compiled, True),
        Contender("Liger-Kernel", "liger-kernel", _liger),
        Contender("TRL", "trl", _trl, True),
        Contender("cut-cross-entropy", "cut-cross-entropy", _cut_cross_entropy, True),
        Contender(
            # During a capture nothing can be read from the device.
            "ktonum, CUDA graph",
            "torch",
            functools.partial(_ours, KernelOptions(validate=False)),
            True,
            captured=True,
        ),
        Contender("plain PyTorch, CUDA graph", "torch", _plain, True, captured=True),
    )
