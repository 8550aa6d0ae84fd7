"""The forward passes of a KTO loss: reference, KL sequences and policy, without idling the device in between.

What must be known on the host (how many tokens are unmasked, whether something is not finite) is fetched while further
work is under way. The policy's pass comes last: whatever was to be checked is known long before it ends, and the
backward is launched while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels.contract.inputs import refuse_nonfinite
from ktonum.kernels.device.packing.launch import Packing, capturing
from ktonum.kernels.device.sums.launch import column_sums, logit_sums
from ktonum.kernels.step.fetching import Fetch
from ktonum.kernels.step.frozen_heads import kept_column_sums
from ktonum.kernels.step.sequences import Head, SequenceSums, Storage, sequence_sums

__all__ = ["PASSES", "forward_passes"]

#: What messages call the tensors of each pass: input, weight, bias and target.
PASSES = {
    "policy": ("input", "weight", "bias", "target"),
    "reference": ("ref_input", "ref_weight", "ref_bias", "target"),
    "kl": ("kl_input", "weight", "bias", "kl_target"),
    "kl_reference": ("kl_ref_input", "ref_weight", "ref_bias", "kl_target"),
}


def forward_passes(
    heads: Mapping[str, Head], finite: Mapping[str, Tensor], *, average: bool, validate: bool, storage: Storage
) -> tuple[SequenceSums, Tensor, dict[str, Tensor]]:
    """Log-probabilities of all sequences.

    Args:
        heads: By their names in `PASSES`; ``policy`` at least.
        finite: Further tensors that must be finite, by name.
        average: The sums are to be divided by the numbers of unmasked tokens, so there must be one.
        validate: Check targets and finiteness.
        storage: For the policy's exponentials.

    Returns:
        The policy's sums; its sums of all logits, (B,), float64; and the other passes' log-probabilities, (B,) each.

    Raises:
        InputError: With ``validate``, for targets outside the vocabulary, tensors that are not finite, and an average
            over nothing.
    """
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
    # The device sums columns while the host launches the first pass.
    columns = {"weight": column_sums(policy.weight)}
    others = {}
    further = [name for name in heads if name != "policy"]
    # A pass without a backward needs nothing that the device does not know; the library's products do.
    if further and heads[further[0]].input.dtype.itemsize == 2:
        name = further.pop(0)
        others[name] = _logps(heads[name], packings[PASSES[name][3]])
    if fetch is not None:
        numbers = fetch.values()
        for (name, head), count, outside in zip(described.items(), numbers[::2], numbers[1::2], strict=True):
            if validate:
                _check_targets(name, head, int(count), int(outside), average)
            packings[name] = replace(packings[name], count=int(count), known=True)
    for name in further:
        others[name] = _logps(heads[name], packings[PASSES[name][3]])
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
    if validate:
        totals = [t.sum(dtype=torch.float64).view(1) for t in finite.values()]
        soundness = Fetch(torch.cat([sound.view(-1), *totals]) if totals else sound)
    sums = sequence_sums(policy, packings["target"], storage)
    if soundness is not None:
        _check(soundness.values(), heads, {"policy": sums.logps, **others}, bounded, finite)
    return sums, logits, others


def _logps(head: Head, packing: Packing) -> Tensor:
    return sequence_sums(head, packing).logps


def _check(
    found: list[float],
    heads: Mapping[str, Head],
    logps: Mapping[str, Tensor],
    bounded: Sequence[str],
    finite: Mapping[str, Tensor],
) -> None:
    """Refuse what is not finite. ``found``: what `logit_sums` says of the passes ``bounded``, totals of ``finite``."""
    further = found[2 * len(bounded) :]
    # Far enough from the accumulator's largest number that log₂ e times it is one too.
    top = torch.finfo(torch.promote_types(heads["policy"].input.dtype, torch.float32)).max / 4
    for name, bound, total in zip(bounded, found[::2], found[1::2], strict=False):
        if not (bound < top and math.isfinite(total)):
            _refuse(name, heads[name], logps[name])
    for (name, tensor), total in zip(finite.items(), further, strict=True):
        if not math.isfinite(total):
            refuse_nonfinite(**{name: tensor})


def _by_target(heads: Mapping[str, Head]) -> dict[str, Head]:
    """One head for each tensor of targets."""
    found: dict[str, Head] = {}
    for name, head in heads.items():
        found.setdefault(PASSES[name][3], head)
    return found


def _check_targets(name: str, head: Head, count: int, outside: int, average: bool) -> None:
    """Of ``count`` unmasked targets ``outside`` are outside the vocabulary."""
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
    """Say what of a pass is not finite, if anything is: very large inputs may have overflowed; now it is known."""
    input_name, weight_name, bias_name, _ = PASSES[name]
    refuse_nonfinite(**{input_name: head.input, weight_name: head.weight, bias_name: head.bias})
    if not bool(logps.isfinite().all()):
        raise InputError(
            f"a log-probability is not finite although {input_name} and {weight_name} are: their products overflow "
            f"float32; scale them down"
        )
