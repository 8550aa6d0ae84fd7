"""The forward passes of a KTO loss: reference, KL sequences and policy, without idling the device in between.

What must be known on the host (how many tokens are unmasked, whether something is not finite) is fetched while further
work is under way. The policy's pass comes last: whatever was to be checked is known long before it ends, and the
backward is launched while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels.fetching import Fetch
from ktonum.kernels.frozen_heads import kept_column_sums
from ktonum.kernels.launch_rows import ColumnSums, column_sums, count_targets, logit_sums
from ktonum.kernels.packing import Packing, capturing
from ktonum.kernels.sequences import Head, SequenceSums, Storage, sequence_sums
from ktonum.kernels.validation import refuse_nonfinite

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
    counts = None
    if not capturing(policy.input):
        found = [_counts(head) for head in _by_target(heads).values()]
        # Nothing else is under way that this would wait for.
        counts = (found[0] if len(found) == 1 else torch.cat(found)).tolist()
    # The device sums columns while the host launches the first pass.
    columns = {"weight": column_sums(policy.weight)}
    for name, head in heads.items():
        if validate and PASSES[name][1] not in columns:
            columns[PASSES[name][1]] = kept_column_sums(head.weight)
    packings = _packings(heads, counts, average, validate)
    others = {
        name: sequence_sums(head, packings[PASSES[name][3]]).logps for name, head in heads.items() if head is not policy
    }
    bounded = {
        name: _logit_sums(head, columns[PASSES[name][1]]) for name, head in heads.items() if validate or head is policy
    }
    soundness = None
    if validate:
        # A sum is finite if and only if each term is: they are far from float64's largest.
        totals = [t.sum(dtype=torch.float64) for t in (*(sums for sums, _ in bounded.values()), *finite.values())]
        soundness = Fetch(torch.stack([*(largest for _, largest in bounded.values()), *totals]))
    sums = sequence_sums(policy, packings["target"], storage)
    if soundness is not None:
        _check(soundness.values(), heads, {"policy": sums.logps, **others}, list(bounded), finite)
    return sums, bounded["policy"][0], others


def _logit_sums(head: Head, columns: ColumnSums) -> tuple[Tensor, Tensor]:
    return logit_sums(head.input, columns, None if head.bias is None else head.bias.contiguous())


def _check(
    found: list[float],
    heads: Mapping[str, Head],
    logps: Mapping[str, Tensor],
    bounded: Sequence[str],
    finite: Mapping[str, Tensor],
) -> None:
    """Refuse what is not finite. ``found``: bounds of the passes ``bounded``, their totals, totals of ``finite``."""
    largest, totals, further = found[: len(bounded)], found[len(bounded) : 2 * len(bounded)], found[2 * len(bounded) :]
    # Far enough from the accumulator's largest number that log₂ e times it is one too.
    top = torch.finfo(torch.promote_types(heads["policy"].input.dtype, torch.float32)).max / 4
    for name, bound, total in zip(bounded, largest, totals, strict=True):
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


def _counts(head: Head) -> Tensor:
    return count_targets(head.target, head.weight.shape[0], head.ignore_index)


def _packings(heads: Mapping[str, Head], counts: list[int] | None, average: bool, validate: bool) -> dict[str, Packing]:
    packings = {}
    numbers = None if counts is None else iter(counts)
    for name, head in _by_target(heads).items():
        target, count = head.target, head.target.numel()
        if numbers is not None:
            count, outside = next(numbers), next(numbers)
            if validate and outside:
                _refuse_target(name, head)
            if validate and average and count == 0:
                raise InputError(
                    f"every token of {name} is masked by ignore_index = {head.ignore_index}: with "
                    f"average_log_prob=True the loss is 0/0; drop the batch or pass average_log_prob=False"
                )
        packings[name] = Packing.of(target, head.ignore_index, count)
    return packings


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
