"""Equations that every KTO loss satisfies: its sequences are independent, given the KL reference point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ktonum.declare.evaluation import Evaluation, Run
from ktonum.declare.op import Law
from ktonum.kernels.contract.formula import METRICS

__all__ = ["KTO_LAWS"]

# Inputs with one entry for each sequence. The KL sequences are a batch of their own.
_BY_SEQUENCE = ("input", "target", "preference_labels", "ref_input", "ref_logps")
_BY_TOKEN = ("input", "target", "ref_input")
# Sums over all tokens, masked ones included.
_LOGIT_SUMS = ("chosen_logits_sum", "rejected_logits_sum")


def _selected(run: Run, index: Tensor) -> Run:
    """The run on the sequences of ``index`` alone."""
    inputs = {k: v.index_select(0, index) if k in _BY_SEQUENCE else v for k, v in run.inputs.items()}
    kl = inputs.get("kl")
    if kl is not None and kl.dim() == 1 and kl.shape[0] == run.inputs["target"].shape[0] > 1:
        inputs["kl"] = kl.index_select(0, index)
    upstream = {k: v.index_select(0, index) if v.dim() else v for k, v in run.upstream.items()}
    return Run(inputs, run.parameters, upstream)


def _halves(run: Run) -> tuple[Tensor, Tensor]:
    batch = run.inputs["target"].shape[0]
    index = torch.arange(batch, device=run.inputs["target"].device)
    return index[: batch // 2], index[batch // 2 :]


def _split(run: Run) -> list[Run] | None:
    return None if run.inputs["target"].shape[0] < 2 else [_selected(run, half) for half in _halves(run)]


def _sequences_with_loss(run: Run, index: Tensor) -> int:
    """How many sequences a mean is taken over. Those without unmasked tokens have no average log-probability."""
    if not run.parameters.get("average_log_prob", False):
        return index.numel()
    target = run.inputs["target"].index_select(0, index)
    return int((target != run.parameters.get("ignore_index", -100)).any(1).sum())


def _joined(parts: Sequence[Evaluation], run: Run) -> Evaluation:
    counts = [_sequences_with_loss(run, half) for half in _halves(run)]
    mean = run.parameters.get("reduction", "mean") == "mean"
    weights = [n / sum(counts) if mean else 1.0 for n in counts]

    def weighted(tensors: Sequence[Tensor | None]) -> Tensor | None:
        # A half in which no sequence has a loss is 0/0 alone, so it is left out.
        terms = [w * t.double() for w, t in zip(weights, tensors, strict=True) if t is not None and w > 0]
        return torch.stack(terms).sum(0) if terms else None

    outputs: dict[str, Tensor | None] = {}
    for name in parts[0].outputs:
        tensors = [p.outputs[name] for p in parts]
        present = [t for t in tensors if t is not None]
        if len(present) < len(parts):
            continue
        if name == "loss":
            outputs[name] = torch.cat(present) if present[0].dim() else weighted(tensors)
        else:
            outputs[name] = torch.stack([t.double() for t in present]).sum(0)
    gradients: dict[str, Tensor | None] = {}
    for name in parts[0].gradients:
        tensors = [p.gradients[name] for p in parts]
        if name == "input":
            scaled = [w * t.double() for w, t in zip(weights, tensors, strict=True) if t is not None]
            gradients[name] = torch.cat(scaled) if len(scaled) == len(parts) else None
        else:
            gradients[name] = weighted(tensors)
    return Evaluation(outputs, gradients)


def _reversal(run: Run) -> Tensor:
    batch = run.inputs["target"].shape[0]
    return torch.arange(batch - 1, -1, -1, device=run.inputs["target"].device)


def _permuted(run: Run) -> list[Run] | None:
    return None if run.inputs["target"].shape[0] < 2 else [_selected(run, _reversal(run))]


def _unpermuted(parts: Sequence[Evaluation], run: Run) -> Evaluation:
    (part,), index = parts, _reversal(run)
    outputs = {k: v.index_select(0, index) if v is not None and v.dim() else v for k, v in part.outputs.items()}
    gradients = {
        k: v.index_select(0, index) if v is not None and k == "input" else v for k, v in part.gradients.items()
    }
    return Evaluation(outputs, gradients)


def _padded(run: Run) -> list[Run]:
    """The run with three masked tokens behind every sequence."""
    ignore_index = run.parameters.get("ignore_index", -100)
    inputs: dict[str, Any] = dict(run.inputs)
    for name in _BY_TOKEN:
        tensor = inputs.get(name)
        if tensor is not None:
            padding = torch.full_like(tensor[:, :1], ignore_index if name == "target" else 1).expand(
                -1, 3, *tensor.shape[2:]
            )
            inputs[name] = torch.cat([tensor, padding], 1)
    return [replace(run, inputs=inputs)]


def _unpadded(parts: Sequence[Evaluation], run: Run) -> Evaluation:
    (part,) = parts
    tokens = run.inputs["target"].shape[1]
    gradients = {k: v[:, :tokens] if v is not None and k == "input" else v for k, v in part.gradients.items()}
    return Evaluation(_without_logit_sums(part.outputs), gradients)


def _other_masked_tokens(run: Run) -> list[Run] | None:
    """The run with other hidden states where the target is masked."""
    masked = run.inputs["target"] == run.parameters.get("ignore_index", -100)
    if not bool(masked.any()):
        return None
    inputs = dict(run.inputs)
    for name in ("input", "ref_input"):
        if inputs.get(name) is not None:
            inputs[name] = torch.where(masked.unsqueeze(-1), -3.0 * inputs[name] + 1.0, inputs[name])
    return [replace(run, inputs=inputs)]


def _unchanged(parts: Sequence[Evaluation], run: Run) -> Evaluation:
    (part,) = parts
    return Evaluation(_without_logit_sums(part.outputs), part.gradients)


def _without_logit_sums(outputs: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    assert set(_LOGIT_SUMS) < set(METRICS)  # two names from another file's list
    return {k: v for k, v in outputs.items() if k not in _LOGIT_SUMS}


def _one_by_one(run: Run) -> list[Run]:
    target = run.inputs["target"]
    return [_selected(run, torch.tensor([i], device=target.device)) for i in range(target.shape[0])]


def _one_after_the_other(parts: Sequence[Evaluation], run: Run) -> Evaluation:
    """The results that belong to one sequence: its gradient, and under ``none`` its loss."""
    outputs, gradients = {}, {}
    losses, inputs = [p.outputs["loss"] for p in parts], [p.gradients["input"] for p in parts]
    if run.parameters.get("reduction") == "none":
        outputs["loss"] = torch.cat([t for t in losses if t is not None])
    gradients["input"] = torch.cat([t for t in inputs if t is not None])
    return Evaluation(outputs, gradients)


def _sequences_are_independent(parameters: Mapping[str, Any]) -> bool:
    """Whether no result depends on the batch: a mean divides by its size and rounds, a KL estimate averages over it."""
    return parameters.get("reduction") in ("none", "sum") and parameters.get("kl_from") != "sequences"


KTO_LAWS = (
    Law("batch split", _split, _joined),
    Law("permutation", _permuted, _unpermuted),
    Law("padding", _padded, _unpadded),
    Law("masked tokens", _other_masked_tokens, _unchanged),
    Law(
        "batch invariance",
        _one_by_one,
        _one_after_the_other,
        exact=True,
        promised=False,
        applies=_sequences_are_independent,
    ),
)
