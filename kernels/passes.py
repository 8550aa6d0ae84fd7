"""The forward passes of a KTO loss: reference, KL sequences and policy, without idling the device in between.

What must be known on the host (how many tokens are unmasked, whether something is not finite) is fetched while further
work is under way. The policy's pass comes last: whatever was to be checked is known long before it ends, and the
backward is launched while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels import launch
from ktonum.kernels.fetching import Fetch
from ktonum.kernels.packing import Packing, capturing
from ktonum.kernels.sequences import Head, SequenceSums, sequence_sums
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
    heads: Mapping[str, Head], *, average: bool, validate: bool, store: int
) -> tuple[SequenceSums, Tensor, dict[str, Tensor]]:
    """Log-probabilities of all sequences.

    Args:
        heads: By their names in `PASSES`; ``policy`` at least.
        average: The sums are to be divided by the numbers of unmasked tokens, so there must be one.
        validate: Check targets and finiteness.
        store: For the policy, see `sequence_sums`.

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
        counts = Fetch(found[0] if len(found) == 1 else torch.cat(found))
    # The device sums columns while the host waits for the counts and launches the first pass.
    columns = {PASSES[n][1]: launch.column_sums(h.weight) for n, h in heads.items() if validate or h is policy}
    packings = _packings(heads, counts, average, validate)
    others = {
        name: sequence_sums(head, packings[PASSES[name][3]]).logps for name, head in heads.items() if head is not policy
    }
    flags = None
    logit_sums, largest = _logit_sums(policy, *columns["weight"])
    if validate:
        bounds = {name: _logit_sums(head, *columns[PASSES[name][1]]) for name, head in heads.items() if name in others}
        flags = Fetch(_flags({"policy": (logit_sums, largest), **bounds}, policy.input.dtype))
    sums = sequence_sums(policy, packings["target"], store=store)
    if flags is not None:
        _check_flags(flags.values(), heads, {"policy": sums.logps, **others})
    return sums, logit_sums, others


def _by_target(heads: Mapping[str, Head]) -> dict[str, Head]:
    """One head for each tensor of targets."""
    found: dict[str, Head] = {}
    for name, head in heads.items():
        found.setdefault(PASSES[name][3], head)
    return found


def _counts(head: Head) -> Tensor:
    return launch.count_targets(head.target, head.weight.shape[0], head.ignore_index)


def _packings(heads: Mapping[str, Head], counts: Fetch | None, average: bool, validate: bool) -> dict[str, Packing]:
    packings = {}
    numbers = None if counts is None else iter(counts.values())
    for name, head in _by_target(heads).items():
        target, count = head.target, head.target.numel()
        if numbers is not None:
            count, outside = int(next(numbers)), int(next(numbers))
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


def _logit_sums(head: Head, weight_sums: Tensor, largest_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_t Σ_v z_tv = (Σ_t x_t) · (Σ_v w_v) + T Σ_v b_v, (B,), and a bound on every partial sum of a logit, a scalar.

    float64; no pass over logits; masked tokens included. Where anything is not finite, neither are the sums.
    """
    # In the accumulator's dtype: asked for float64, torch first copies the tensor.
    wide = torch.promote_types(head.input.dtype, torch.float32)
    sums = head.input.sum(1, dtype=wide).double() @ weight_sums
    largest = torch.linalg.vector_norm(head.input, float("inf"), dtype=wide).double() * largest_weight
    largest = largest * head.input.shape[-1]
    if head.bias is not None:
        sums = sums + head.input.shape[1] * head.bias.sum(dtype=torch.float64)
        largest = largest + torch.linalg.vector_norm(head.bias, float("inf"), dtype=wide).double()
    return sums, largest


def _flags(bounds: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """Whether each pass' inputs are finite and no logit of theirs can overflow, from `_logit_sums`: 1 or 0 each."""
    # Far enough from the accumulator's largest number that log₂ e times it is one too.
    top = torch.finfo(torch.promote_types(dtype, torch.float32)).max / 4
    return torch.stack([sums.isfinite().all() & (largest < top) for sums, largest in bounds.values()])


def _check_flags(flags: list[float], heads: Mapping[str, Head], logps: Mapping[str, Tensor]) -> None:
    for name, sound in zip(logps, flags, strict=True):
        if sound:
            continue
        head, (input_name, weight_name, bias_name, _) = heads[name], PASSES[name]
        refuse_nonfinite(**{input_name: head.input, weight_name: head.weight, bias_name: head.bias})
        # Very large inputs might have overflowed; now it is known.
        if not bool(logps[name].isfinite().all()):
            raise InputError(
                f"a log-probability is not finite although {input_name} and {weight_name} are: their products overflow "
                f"float32; scale them down"
            )
