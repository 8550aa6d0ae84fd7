"""The forward passes of a KTO loss: reference, KL sequences and policy, without idling the device in between.

The host must know how many tokens are unmasked, and whether something is not finite. It fetches both while further work
is under way. The policy's pass comes last: all checks are done long before it ends, and the backward is launched while
it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels.contract.inputs import KTOInputs, refuse_nonfinite
from ktonum.kernels.device.packing.launch import Packing, capturing
from ktonum.kernels.device.slabs import Workspace
from ktonum.kernels.device.sums.launch import column_sums, logit_sums
from ktonum.kernels.step.fetching import Fetch
from ktonum.kernels.step.frozen_heads import kept_column_sums
from ktonum.kernels.step.sequences import Head, SequenceSums, Storage, sequence_sums

__all__ = ["PASSES", "ScoringOptions", "SequenceLogps", "forward_passes"]

#: The tensors of each pass, by their names in `KTOInputs`: input, weight, bias and target.
PASSES = {
    "policy": ("input", "weight", "bias", "target"),
    "reference": ("ref_input", "ref_weight", "ref_bias", "target"),
    "kl": ("kl_input", "weight", "bias", "kl_target"),
    "kl_reference": ("kl_ref_input", "ref_weight", "ref_bias", "kl_target"),
}
#: Small tensors that enter the formula as they are; they are only checked here.
_FINITE = ("ref_logps", "kl", "kl_ref_logps")


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How sequences are scored.

    Attributes:
        ignore_index: Marks masked tokens: they cost no matrix work.
        average: The sums are to be divided by the numbers of unmasked tokens, so there must be one.
        allow_tf32: Let float32 products run in TF32.
        validate: Check targets and finiteness.
        workspace: For the exponentials that the forward stores for the backward, beside what fits into the memory of
            the weight's gradient. The backward computes the others again.
    """

    ignore_index: int
    average: bool
    allow_tf32: bool
    validate: bool
    workspace: Workspace


@dataclass(frozen=True)
class SequenceLogps:
    """Sums of the sequences' unmasked log-probabilities, float64.

    Attributes:
        policy: (B,), differentiable.
        logits: Sums of all logits of the policy, (B,).
        reference: (B,), or None without a reference model.
        kl: Of the KL sequences under the policy, (B',), or None without any.
        kl_reference: Under the reference model, (B',), or None.
    """

    policy: Tensor
    logits: Tensor
    reference: Tensor | None = None
    kl: Tensor | None = None
    kl_reference: Tensor | None = None


def forward_passes(inputs: KTOInputs, options: ScoringOptions, storage: Storage) -> tuple[SequenceLogps, SequenceSums]:
    """Log-probabilities of all sequences, and what the policy's pass leaves to its backward.

    Args:
        inputs: Of the right structure, targets int64.
        options: See there.
        storage: For the policy's exponentials.

    Raises:
        InputError: With ``options.validate``, for targets outside the vocabulary, tensors that are not finite, and an
            average over nothing.
    """
    heads, validate = _heads(inputs, options), options.validate
    policy = heads["policy"]
    if capturing(policy.input) and validate:
        raise InputError(
            "values cannot be validated while a CUDA graph is captured: pass validate=False, after a validated run on "
            "the same inputs"
        )
    described = _by_target(heads)
    counts = torch.empty((len(described), 2), dtype=torch.int64, device=policy.input.device)
    packings = {
        name: Packing.of(head.target, head.weight.shape[0], head.ignore_index, row)
        for (name, head), row in zip(described.items(), counts.unbind(), strict=True)
    }
    fetch = None if capturing(policy.input) else Fetch(counts)
    # The device computes these while the host launches the first pass.
    columns = {"weight": column_sums(policy.weight)}
    logps = {}
    further = [name for name in heads if name != "policy"]
    # In 16 bits, a pass without a backward can take the number of unmasked tokens from the device. The library's
    # products of wider operands need it on the host.
    if further and heads[further[0]].input.dtype.itemsize == 2:
        name = further.pop(0)
        logps[name] = _logps(heads[name], packings[PASSES[name][3]])
    if fetch is not None:
        numbers = fetch.values()
        for (name, head), count, outside in zip(described.items(), numbers[::2], numbers[1::2], strict=True):
            if validate:
                _check_targets(name, head, int(count), int(outside), options.average)
            packings[name] = replace(packings[name], count=int(count), known=True)
    for name in further:
        logps[name] = _logps(heads[name], packings[PASSES[name][3]])
    bounded = [name for name in heads if validate or name == "policy"]
    sound = torch.empty((len(bounded), 2), dtype=torch.float64, device=policy.input.device)
    for name, row in zip(bounded, sound.unbind(), strict=True):
        head, weight_name = heads[name], PASSES[name][1]
        if weight_name not in columns:
            columns[weight_name] = kept_column_sums(head.weight)
        found = logit_sums(head.input, columns[weight_name], None if head.bias is None else head.bias.contiguous(), row)
        if head is policy:
            logits = found
    soundness = None
    finite = {name: tensor for name in _FINITE if (tensor := getattr(inputs, name)) is not None}
    if validate:
        totals = [t.sum(dtype=torch.float64).view(1) for t in finite.values()]
        soundness = Fetch(torch.cat([sound.view(-1), *totals]) if totals else sound)
    sums = sequence_sums(policy, packings["target"], storage)
    logps["policy"] = sums.logps
    if soundness is not None:
        _check(soundness.values(), heads, logps, bounded, finite)
    return SequenceLogps(logits=logits, **logps), sums


def _heads(inputs: KTOInputs, options: ScoringOptions) -> dict[str, Head]:
    """The head of each pass, by its name in `PASSES`; the policy's comes first."""
    heads = {}
    for name, names in PASSES.items():
        hidden, weight, bias, target = (getattr(inputs, n) for n in names)
        if hidden is not None:
            heads[name] = Head(hidden, weight, bias, target, options.ignore_index, options.allow_tf32)
    return heads


def _logps(head: Head, packing: Packing) -> Tensor:
    return sequence_sums(head, packing).logps


def _check(
    found: list[float],
    heads: Mapping[str, Head],
    logps: Mapping[str, Tensor],
    bounded: Sequence[str],
    finite: Mapping[str, Tensor],
) -> None:
    """Refuse what is not finite.

    Args:
        found: Two numbers from `logit_sums` for each pass in ``bounded``, then the sum of each tensor in ``finite``.
        heads, logps: By the passes' names.
        bounded: Names of passes.
        finite: Tensors by name.
    """
    further = found[2 * len(bounded) :]
    # log₂ e times a logit must still be a number of the accumulator.
    top = torch.finfo(torch.promote_types(heads["policy"].input.dtype, torch.float32)).max / 4
    for name, bound, total in zip(bounded, found[::2], found[1::2], strict=False):
        if not (bound < top and math.isfinite(total)):
            _refuse(name, heads[name], logps[name])
    for (name, tensor), total in zip(finite.items(), further, strict=True):
        if not math.isfinite(total):
            refuse_nonfinite(**{name: tensor})


def _by_target(heads: Mapping[str, Head]) -> dict[str, Head]:
    """The first head that scores each tensor of targets, by the name of the targets."""
    found: dict[str, Head] = {}
    for name, head in heads.items():
        found.setdefault(PASSES[name][3], head)
    return found


def _check_targets(name: str, head: Head, count: int, outside: int, average: bool) -> None:
    """Refuse targets outside the vocabulary, and averages of nothing; of ``count`` unmasked ones ``outside`` are."""
    if outside:
        _refuse_target(name, head)
    if average and count == 0:
        raise InputError(
            f"every token of {name} is masked by ignore_index = {head.ignore_index}: with average_log_prob=True the "
            f"loss is 0/0; drop the batch or pass average_log_prob=False"
        )


def _refuse_target(name: str, head: Head) -> None:
    target, vocabulary = head.target, head.weight.shape[0]
    wrong = (target != head.ignore_index) & ((target < 0) | (target >= vocabulary))
    row, column = (int(i) for i in wrong.nonzero()[0])
    raise InputError(
        f"{name}[{row}, {column}] = {int(target[row, column])} is outside the vocabulary [0, {vocabulary}) and is not "
        f"ignore_index = {head.ignore_index}; mask the token or mend the target"
    )


def _refuse(name: str, head: Head, logps: Tensor) -> None:
    """Refuse what is not finite in a pass, if anything is. Large inputs may have made only the bound overflow."""
    input_name, weight_name, bias_name, _ = PASSES[name]
    refuse_nonfinite(**{input_name: head.input, weight_name: head.weight, bias_name: head.bias})
    if not bool(logps.isfinite().all()):
        raise InputError(
            f"a log-probability is not finite although {input_name} and {weight_name} are: their products overflow "
            f"float32; scale them down"
        )
