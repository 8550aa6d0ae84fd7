"""The op under audit: KTO losses with the interface of Liger-Kernel's ``LigerFusedLinearKTOLoss``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ktonum.declare.cases import torch_dtype
from ktonum.declare.drawing import Draw
from ktonum.declare.op import Op
from ktonum.declare.special_inputs import SpecialInputs
from ktonum.errors import CandidateError, UsageError
from ktonum.kernels.audit.kto_error_model import kto_error_model
from ktonum.kernels.audit.kto_laws import KTO_LAWS
from ktonum.kernels.audit.kto_points import KTO_POINTS
from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.formula import METRICS
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.contract.reference import reference_kto_loss

__all__ = ["OP"]

_CONFIG = {f.name: f.default for f in fields(KTOConfig)}
# Parameters of the constructor on which results must not depend.
_IMPLEMENTATION = ("chunk_size",)
# Names of the tensors in Liger-Kernel's forward, where they differ from ours.
_LIGER_NAMES = {"input": "_input", "weight": "lin_weight"}
# The largest share of a sequence that is prompt, unless a point says otherwise.
_MASKED = 0.3


def _sample(draw: Draw) -> dict[str, Any]:
    """Inputs of realistic scale: logits of standard deviation 1.5, a reference model near the policy.

    These parameters only shape the inputs: ``with_bias``; ``reference_from`` (``model``, ``logps`` or ``none``);
    ``kl_from`` (``none``, ``scalar``, ``batch`` or ``sequences``); and ``masked``, the largest share of a sequence that
    is prompt.
    """
    B, T, H, V = (draw.dims[k] for k in "BTHV")
    p = draw.parameters

    def head(hidden: Tensor, noise: float) -> Tensor:
        return (hidden.float() + noise * draw.normal(*hidden.shape).float()).to(draw.dtype)

    def targets(batch: int) -> Tensor:
        target = draw.integers(batch, T, high=V)
        prompt = (draw.uniform(batch, 1, high=p.get("masked", _MASKED)).float() * T).long()
        return torch.where(torch.arange(T, device=draw.device) < prompt, p.get("ignore_index", -100), target)

    inputs: dict[str, Any] = {
        "input": draw.normal(B, T, H),
        "weight": draw.normal(V, H, scale=1.5 * H**-0.5),
        "target": targets(B),
        "preference_labels": draw.booleans(B),
    }
    if p.get("with_bias", False):
        inputs["bias"] = draw.normal(V, scale=0.5)
    reference, kl = p.get("reference_from", "model"), p.get("kl_from", "none")
    if reference == "model":
        inputs["ref_input"] = head(inputs["input"], 0.1)
        inputs["ref_weight"] = head(inputs["weight"], 0.1 * H**-0.5)
        if "bias" in inputs:
            inputs["ref_bias"] = head(inputs["bias"], 0.1)
    elif reference == "logps":
        # A model with logits of standard deviation 1.5 gives about −log V − 1.5²/2 for each token.
        inputs["ref_logps"] = draw.normal(B, scale=0.3) - draw.uniform(B, low=0.9, high=1.1) * (
            (torch.tensor(float(V)).log().item() + 1.1) * (1 if p.get("average_log_prob") else T)
        )
    if kl in ("scalar", "batch"):
        inputs["kl"] = draw.uniform(1 if kl == "scalar" else B, high=2.0)
    elif kl == "sequences":
        inputs["kl_input"], inputs["kl_target"] = draw.normal(B, T, H), targets(B)
        if reference == "model":
            inputs["kl_ref_input"] = head(inputs["kl_input"], 0.1)
        elif reference == "logps":
            inputs["kl_ref_logps"] = inputs["ref_logps"].clone()
    return inputs


def _config(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in parameters.items() if k in _CONFIG}


def _named(returned: Any) -> dict[str, Tensor | None]:
    """The outputs by name, from (loss, (six metrics)).

    Raises:
        CandidateError: The result has another structure.
    """
    try:
        loss, metrics = returned
        named = dict(zip(METRICS, metrics, strict=True))
    except (TypeError, ValueError) as error:
        raise CandidateError(
            f"returned {type(returned).__name__}: a KTO loss returns (loss, ({', '.join(METRICS)}))"
        ) from error
    # Only the loss is differentiated. Whether a metric carries a gradient is not part of the contract.
    return {"loss": loss, **{k: None if v is None else v.detach() for k, v in named.items()}}


def _reference(*, input: Tensor, **rest: Any) -> dict[str, Tensor | None]:
    names = {f.name for f in fields(KTOInputs)}
    tensors = {k: v for k, v in rest.items() if k in names}
    return _named(reference_kto_loss(KTOInputs(input=input, **tensors), KTOConfig(**_config(rest))))


def _adapt(candidate: Any, parameters: Mapping[str, Any]) -> Callable[..., dict[str, Tensor | None]]:
    """A class with Liger-Kernel's constructor and forward, as a function of the inputs.

    A constructor that takes ``compiled`` gets False, because the loss is audited and not torch.compile, which takes
    longer than the audit.
    """
    if not callable(candidate):
        raise UsageError(f"the candidate is a {type(candidate).__name__}: name a class like LigerFusedLinearKTOLoss")
    constructor = inspect.signature(candidate).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in constructor.values())
    config = _config(parameters)
    lacking = [k for k, v in config.items() if k not in constructor and not open_ended and v != _CONFIG[k]]
    if lacking:
        raise UsageError(f"its constructor takes no {', '.join(lacking)}")
    arguments = {k: v for k, v in config.items() if k in constructor or open_ended}
    arguments |= {k: v for k, v in parameters.items() if k in _IMPLEMENTATION and k in constructor}
    if "compiled" in constructor:
        arguments["compiled"] = False

    def run(**inputs: Any) -> dict[str, Tensor | None]:
        loss = candidate(**arguments, use_ref_model=bool({"ref_input", "ref_logps"} & set(inputs)))
        accepted = inspect.signature(loss.forward).parameters
        named = {_LIGER_NAMES.get(k, k): v for k, v in inputs.items()}
        open_call = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        missing = [k for k in named if k not in accepted and not open_call]
        if missing:
            raise UsageError(f"its forward takes no {', '.join(missing)}")
        return _named(loss(**named))

    return run


def _as_reference(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The policy as its own reference model, so that no sigmoid saturates, however large logits are."""
    return {**inputs, **{f"ref_{k}": inputs[k] for k in ("input", "weight", "bias") if f"ref_{k}" in inputs}}


def _large_logits(inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Logits of standard deviation 3,000, in (−15,000, 15,000)."""
    changed = {**inputs, "weight": inputs["weight"] * 2.0**11}
    return _as_reference(changed) if "kl_input" not in inputs else changed


def _sure_tokens(inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Hidden states along their targets' rows of the head: the targets' logits are 12 or more, gradients near zero."""
    weight, target = inputs["weight"].double(), inputs["target"]
    rows = weight[torch.where(target == parameters.get("ignore_index", -100), 0, target)]
    along = 12.0 * rows / rows.square().sum(-1, keepdim=True)
    return {**inputs, "input": along.to(inputs["input"].dtype)}


def _zero(name: str) -> SpecialInputs:
    return lambda inputs, parameters: {**inputs, name: torch.zeros_like(inputs[name])}


def _peak_memory(dims: Mapping[str, int], parameters: Mapping[str, Any], dtype: str) -> float:
    """The bytes that our kernels plan to take on the current GPU."""
    # Imported here, because it imports the kernels, which need Triton. The bound is used only where there is a GPU.
    from ktonum.kernels.audit.planned_memory import Step, peak_memory

    B, T, H, V = (dims[k] for k in "BTHV")
    sixteen_bit = torch_dtype(dtype).itemsize == 2
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    packed = parameters.get("masked", _MASKED) > 0
    return float(peak_memory(Step(B * T, H, V, torch_dtype(dtype), packed, sixteen_bit and hopper and H % 8 == 0)))


_SPECIAL_INPUTS: dict[str, SpecialInputs] = {
    "logits to 10,000": _large_logits,
    "sure tokens": _sure_tokens,
    "a head of zeros": _zero("weight"),
    "hidden states of zeros": _zero("input"),
}


OP = Op(
    name="kto",
    candidate="ktonum.kernels.loss:FusedLinearKTOLoss",
    candidates={
        "ktonum": "ktonum.kernels.loss:FusedLinearKTOLoss",
        "liger": "liger_kernel.chunked_loss:LigerFusedLinearKTOLoss",
        "trl": "ktonum.kernels.peers.trl_loss:TRLKTOLoss",
        "torch": "ktonum.kernels.contract.reference:ReferenceKTOLoss",
    },
    reference=_reference,
    sample=_sample,
    dims=KTO_POINTS,
    laws=KTO_LAWS,
    differentiable=("input", "weight", "bias"),
    error_model=kto_error_model,
    special_inputs=_SPECIAL_INPUTS,
    reductions=("T", "H", "V"),
    peak_memory=_peak_memory,
    # Sums over sequences of logits and of rewards. Both have either sign.
    cancelling=METRICS[2:],
    adapt=_adapt,
)
