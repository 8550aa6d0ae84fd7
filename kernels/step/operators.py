"""Scoring and its gradients as `torch.library` custom operators, for torch.compile.

How many tokens are unmasked decides what runs on the device, so Dynamo must not look inside. Custom operators hide it,
and work with autograd and fake tensors. They cost the host time, so eager code does without them: see
`ktonum.kernels.step.autograd`.

An operator takes a flat list of tensors and numbers. The dataclasses here say once what is in it, and
`ktonum.kernels.step.flattening` makes schema and lists of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.device.hardware import slab_dtype
from ktonum.kernels.device.packing.launch import Packing
from ktonum.kernels.device.slabs import Workspace
from ktonum.kernels.step.flattening import Layout
from ktonum.kernels.step.forward_passes import PASSES, ScoringOptions, SequenceLogps, forward_passes
from ktonum.kernels.step.sequence_gradients import Wanted, refuse_second_derivative, sequence_gradients
from ktonum.kernels.step.sequences import Head, SequenceSums, Storage, stored_numbers

__all__ = ["FORWARD", "ForwardArguments", "compiled_logps"]


@dataclass(frozen=True)
class ForwardArguments:
    """What the operator ``ktonum::sequence_logps`` takes.

    Attributes:
        inputs: See there. Its preference labels are not read.
        options: See there.
        store: Whether a backward may follow, for which exponentials are kept.
    """

    inputs: KTOInputs
    options: ScoringOptions
    store: bool

    @property
    def stored(self) -> int:
        """How many exponentials are kept."""
        given = self.inputs
        return stored_numbers(given.weight, given.target, self.options.workspace) if self.store else 0


@dataclass(frozen=True)
class _Saved:
    """What a forward leaves to its backward: `SequenceSums` as tensors, none of which is a view of another.

    Attributes:
        statistics, exponentials: As there.
        rows, targets, starts: As in `Packing`.
        count: `Packing`'s count and known, (2,), int64; on the CPU, so that no backward waits for the device to read
            them.
    """

    statistics: Tensor
    rows: Tensor
    targets: Tensor
    starts: Tensor
    count: Tensor
    exponentials: Tensor

    @classmethod
    def of(cls, sums: SequenceSums) -> _Saved:
        packing = sums.packing
        return cls(
            sums.statistics,
            packing.rows,
            packing.targets.clone(),
            packing.starts.clone(),
            torch.tensor((packing.count, packing.known)),
            sums.exponentials,
        )

    def sums(self, logps: Tensor) -> SequenceSums:
        count, known = self.count.tolist()
        packing = Packing(self.rows, self.targets, self.starts, count, bool(known))
        return SequenceSums(logps, self.statistics, packing, self.exponentials)


@dataclass(frozen=True)
class _ForwardResults:
    """The results of that operator. Log-probabilities of passes that were not run are empty tensors."""

    logps: SequenceLogps
    saved: _Saved


@dataclass(frozen=True)
class _BackwardArguments:
    """What ``ktonum::sequence_logps_backward`` takes: the arguments of `sequence_gradients`."""

    upstream: Tensor
    head: Head
    saved: _Saved
    wanted: Wanted
    workspace: Workspace


FORWARD, _SAVED = Layout(ForwardArguments), Layout(_Saved)
_RESULTS, _BACKWARD = Layout(_ForwardResults), Layout(_BackwardArguments)


@torch.library.custom_op("ktonum::sequence_logps", mutates_args=(), schema=f"({FORWARD.schema}) -> Tensor[]")
def _sequence_logps(*flat: Any) -> list[Tensor]:
    """`forward_passes`."""
    given = FORWARD.from_flat(flat)
    # Triton launches on the current device, and the tensors may be on another.
    with torch.cuda.device_of(given.inputs.input):  # type: ignore[no-untyped-call]
        logps, sums = forward_passes(given.inputs, given.options, Storage(given.stored))
    logps = replace(logps, logits=logps.logits.clone())  # An output must not be a view of another.
    results = _RESULTS.to_flat(_ForwardResults(logps, _Saved.of(sums)))
    return [sums.logps.new_empty(0) if tensor is None else tensor for tensor in results]


@_sequence_logps.register_fake
def _(*flat: Any) -> list[Tensor]:
    given = FORWARD.from_flat(flat)
    input, target = given.inputs.input, given.inputs.target
    scored = {name: getattr(given.inputs, hidden_name) for name, (hidden_name, *_) in PASSES.items()}

    def sums(hidden: Tensor | None) -> Tensor:
        return input.new_empty(0 if hidden is None else len(hidden), dtype=torch.float64)

    logps = SequenceLogps(logits=sums(input), **{name: sums(hidden) for name, hidden in scored.items()})
    saved = _Saved(
        statistics=input.new_empty((4, target.numel()), dtype=torch.float64),
        rows=target.new_empty(target.numel()),
        targets=target.new_empty(target.numel()),
        starts=target.new_empty(len(target) + 1),
        count=torch.empty(2, dtype=torch.int64, device="cpu"),
        exponentials=input.new_empty(given.stored, dtype=slab_dtype(input.dtype)),
    )
    return _RESULTS.to_flat(_ForwardResults(logps, saved))


@torch.library.custom_op(
    "ktonum::sequence_logps_backward", mutates_args=(), schema=f"({_BACKWARD.schema}) -> (Tensor, Tensor, Tensor)"
)
def _sequence_logps_backward(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`sequence_gradients`."""
    given = _BACKWARD.from_flat(flat)
    # A backward does not read the forward's log-probabilities.
    sums = given.saved.sums(given.upstream)
    with torch.cuda.device_of(given.upstream):  # type: ignore[no-untyped-call]
        return sequence_gradients(given.head, given.upstream, sums, wanted=given.wanted, workspace=given.workspace)


@_sequence_logps_backward.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = _BACKWARD.from_flat(flat)
    input, weight, wanted = given.head.input, given.head.weight, given.wanted
    return (
        input.new_empty(input.shape if wanted.input else (0,)),
        weight.new_empty(weight.shape if wanted.weight else (0,)),
        weight.new_empty((weight.shape[0] if wanted.bias else 0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    given, saved = FORWARD.from_flat(inputs), _RESULTS.from_flat(output).saved
    of_head = (given.inputs.input, given.inputs.weight, given.inputs.bias, given.inputs.target)
    ctx.save_for_backward(*of_head, *_SAVED.to_flat(saved))
    ctx.options = given.options
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    needed = FORWARD.by_name(ctx.needs_input_grad)
    wanted = Wanted(needed["inputs_input"], needed["inputs_weight"], needed["inputs_bias"])
    of_policy = _RESULTS.by_name(upstream)["logps_policy"]
    gradients: dict[str, Tensor | None] = {}
    if of_policy is not None and wanted.any:
        input, weight, bias, target, *saved = ctx.saved_tensors
        options: ScoringOptions = ctx.options
        head = Head(input, weight, bias, target, options.ignore_index, options.allow_tf32)
        arguments = _BackwardArguments(of_policy, head, _SAVED.from_flat(saved), wanted, options.workspace)
        found = torch.ops.ktonum.sequence_logps_backward(*_BACKWARD.to_flat(arguments))
        gradients = dict(zip(("inputs_input", "inputs_weight", "inputs_bias"), wanted.select(found), strict=True))
    return tuple(map(gradients.get, FORWARD.names))


_sequence_logps.register_autograd(_backward, setup_context=_setup_context)
_sequence_logps_backward.register_autograd(refuse_second_derivative)


def compiled_logps(inputs: KTOInputs, options: ScoringOptions, *, store: bool) -> SequenceLogps:
    """`forward_passes` in a graph of torch.compile; the policy's log-probabilities are differentiable.

    Args:
        inputs: Those without a gradient are detached.
        options: See there.
        store: Whether a backward may follow.
    """
    flat = FORWARD.to_flat(ForwardArguments(inputs, options, store))
    logps = _RESULTS.from_flat(torch.ops.ktonum.sequence_logps(*flat)).logps
    further: dict[str, Any] = {
        name: None if getattr(inputs, hidden_name) is None else getattr(logps, name).detach()
        for name, (hidden_name, *_) in PASSES.items()
        if name != "policy"
    }
    return replace(logps, logits=logps.logits.detach(), **further)
