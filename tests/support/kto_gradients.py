"""Holding the kernels' gradients to the oracle's, on every path of the backward, and reading off what was computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.device import hardware
from ktonum.kernels.device.formula.launch import FormulaInputs
from ktonum.kernels.device.packing.launch import Packing
from ktonum.kernels.device.slabs import Workspace
from ktonum.kernels.device.trace import Launch
from ktonum.kernels.loss import KernelOptions
from ktonum.kernels.step.autograd import differentiable_formula, sequence_logps
from ktonum.kernels.step.forward_passes import ScoringOptions
from ktonum.kernels.step.sequences import Head
from support.kto_inputs import Outcome, kernel_outcome, oracle_outcome
from support.kto_rounding import objections, spreads

#: Where a backward's exponentials come from: all out of the forward, all computed again, or some of each.
PATHS = ("stored", "recomputed", "partly stored")


def options_of(path: str, inputs: KTOInputs, *, columns: int = 256, validate: bool = True) -> KernelOptions:
    """Options under which the policy's backward takes ``path``, with ``columns`` stored where some are."""
    if path == "stored":
        return KernelOptions(validate=validate)
    if path == "recomputed":
        return KernelOptions(validate=validate, workspace=1)
    size = inputs.target.numel() * columns * hardware.slab_dtype(inputs.input.dtype).itemsize
    return KernelOptions(validate=validate, workspace=size + 1, computed_at_a_time=1)


def hold_gradients(
    inputs: KTOInputs, config: KTOConfig, upstream: Tensor | None = None, options: KernelOptions | None = None
) -> Outcome:
    """The gradients of the kernels are the oracle's within rounding, in the dtype and shape of what they belong to."""
    actual = kernel_outcome(inputs, config, upstream=upstream, options=options)
    expected = oracle_outcome(inputs, config, upstream=upstream)
    spread = spreads(inputs, config, upstream)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == inputs.input.dtype
        assert not (found := objections(gradient, expected.gradients[name], spread[name])), (name, found)
    return actual


@dataclass(frozen=True)
class Work:
    """What was computed, read off a recording of `ktonum.kernels.device.trace`."""

    launches: list[Launch]

    def count(self, name: str) -> int:
        """How often it was launched."""
        return sum(launch.name == name for launch in self.launches)

    def rows(self, *names: str) -> list[int]:
        """The rows of each launch of these names."""
        return [launch.dims["rows"] for launch in self.launches if launch.name in names]

    @property
    def logits(self) -> list[Launch]:
        """The kernels that make softmax statistics or exponentials of logits."""
        return [launch for launch in self.launches if launch.name in ("logits_kernel", "softmax_kernel")]

    @property
    def stored(self) -> list[tuple[int, int]]:
        """(rows, columns) of the slabs that forwards filled for a backward."""
        filled = [launch.dims for launch in self.logits if launch.stored and launch.statistics]
        return [(dims["rows"], dims["columns"]) for dims in filled]

    @property
    def computed_again(self) -> int:
        """How many slabs backwards computed again."""
        return sum(not launch.statistics for launch in self.logits)


@dataclass(frozen=True)
class PolicyPass:
    """The parts of a step from which a test puts the policy's backward together, in order to spoil one of them.

    Attributes:
        head: What is scored.
        packing: Its unmasked tokens.
        upstream: ∂loss/∂log-probability of each sequence, (B,), float64.
    """

    head: Head
    packing: Packing
    upstream: Tensor


def policy_pass(inputs: KTOInputs, config: KTOConfig) -> PolicyPass:
    """Of inputs without KL sequences."""
    head = Head(inputs.input, inputs.weight, inputs.bias, inputs.target, config.ignore_index, False)
    counts = torch.empty(2, dtype=torch.int64, device=inputs.target.device)
    packing = Packing.of(inputs.target, len(inputs.weight), config.ignore_index, counts)
    options = ScoringOptions(
        ignore_index=config.ignore_index, average=False, allow_tf32=False, validate=True, workspace=Workspace()
    )
    logps = sequence_logps(inputs, options)
    policy = logps.policy.detach().requires_grad_()
    formula = FormulaInputs(policy, logps.reference, inputs.kl, inputs.preference_labels, logps.logits)
    loss, _ = differentiable_formula(formula, config, torch.float64)
    (upstream,) = torch.autograd.grad(loss, policy)
    return PolicyPass(head, replace(packing, count=int(counts[0]), known=True), upstream)
