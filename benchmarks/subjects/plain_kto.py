"""KTO in plain PyTorch that meets `precise` in every dtype.

It calculates in float32 (float64 for float64) and rounds once. Each step is a method, so that a subclass with one other
method has one planted defect.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.formula import kl_estimate, kto_losses, reduce_losses, sequence_means, split_sums
from ktonum.kernels.contract.inputs import KTOInputs
from subjects.planted import wide, with_gradient

Result = tuple[Tensor, tuple[Tensor, ...]]


class PlainKTO(torch.nn.Module):
    """The constructor and ``forward`` of Liger-Kernel's ``LigerFusedLinearKTOLoss``, and this project's keywords."""

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, use_ref_model: bool = False, **config: object
    ) -> None:
        super().__init__()
        self.config = KTOConfig(ignore_index=ignore_index, beta=beta, **config)  # type: ignore[arg-type]

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        **tensors: Tensor | None,
    ) -> Result:
        assert preference_labels is not None  # the op always gives them
        given = {"input": _input, "weight": lin_weight, "target": target, "bias": bias, **tensors}
        read = self.receive({k: v for k, v in given.items() if v is not None})
        t = KTOInputs(**{k: self.read(k, v) for k, v in read.items()}, preference_labels=preference_labels)
        logps, logits = self.logps(t.input, t.weight, t.bias, t.target)
        with torch.no_grad():
            reference = t.ref_logps
            if t.ref_input is not None and t.ref_weight is not None:
                reference, _ = self.logps(t.ref_input, t.ref_weight, t.ref_bias, t.target)
        kl = self.reference_point(t)
        losses = with_gradient(self.losses(logps, reference, preference_labels, kl), self.by_sequence)
        loss = with_gradient(self.reduced(losses), self.upstream)
        with torch.no_grad():
            rewards = self.config.beta * (logps if reference is None else logps - reference)
            sums = [s for v in (logps, logits, rewards) for s in split_sums(v, preference_labels)]
        return self.returned(loss, tuple(sums))

    def receive(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors before they are read."""
        return given

    def read(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the accumulator's dtype."""
        return with_gradient(wide(tensor), lambda g: self.gradient(name, g)) if tensor.is_floating_point() else tensor

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient of an input, before it is rounded to the input's dtype."""
        return gradient

    def unmasked(self, target: Tensor) -> Tensor:
        return target != self.config.ignore_index

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # In two halves, as a tiled kernel adds them up. One product would repeat the float64 reference bit for bit.
        half = (x.shape[-1] + 1) // 2
        first = torch.nn.functional.linear(x[..., :half], weight[:, :half], bias)
        second = torch.nn.functional.linear(x[..., half:], weight[:, half:])
        # Autocast gives bfloat16, in which log-probabilities are 25 times as wrong as those of the reference.
        return wide(first) + wide(second)

    def logps(self, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each sequence, and the sum of its logits."""
        logits = self.logits(x, weight, bias)
        unmasked = self.unmasked(target)
        index = torch.where(target == self.config.ignore_index, 0, target).unsqueeze(-1)
        tokens = torch.where(unmasked, logits.log_softmax(-1).gather(-1, index).squeeze(-1), 0.0)
        return self.means(tokens.sum(1), unmasked.sum(1), target), logits.detach().sum((-2, -1))

    def means(self, sums: Tensor, counts: Tensor, target: Tensor) -> Tensor:
        return sequence_means(sums, counts, self.config)

    def reference_point(self, t: KTOInputs) -> Tensor | None:
        """The KL reference point; without gradient."""
        if t.kl_input is None or t.kl_target is None:
            return None if t.kl is None else t.kl.detach()
        policy, _ = self.logps(t.kl_input, t.weight, t.bias, t.kl_target)
        with torch.no_grad():
            reference = torch.zeros_like(policy) if t.kl_ref_logps is None else t.kl_ref_logps
            if t.kl_ref_input is not None and t.ref_weight is not None:
                reference, _ = self.logps(t.kl_ref_input, t.ref_weight, t.ref_bias, t.kl_target)
        return self.estimate(policy, reference)

    def estimate(self, policy: Tensor, reference: Tensor) -> Tensor:
        return kl_estimate(policy, reference)

    def losses(self, logps: Tensor, reference: Tensor | None, labels: Tensor, kl: Tensor | None) -> Tensor:
        # In float64, which is cheap for B numbers: autograd differentiates a sigmoid y as y (1 − y), and 1 − y cancels
        # where y is near one.
        reference, kl = (None if t is None else t.double() for t in (reference, kl))
        return kto_losses(logps.double(), reference, labels, kl, self.config).to(logps.dtype)

    def by_sequence(self, gradient: Tensor) -> Tensor:
        """The gradient of each sequence's loss."""
        return gradient

    def reduced(self, losses: Tensor) -> Tensor:
        return reduce_losses(losses, self.config)

    def upstream(self, gradient: Tensor) -> Tensor:
        return gradient

    def returned(self, loss: Tensor, sums: tuple[Tensor, ...]) -> Result:
        return loss, sums
