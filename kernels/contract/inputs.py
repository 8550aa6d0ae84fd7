"""What a KTO loss accepts; it is checked before any kernel runs.

Checking the structure (shapes, dtypes, devices, which tensors exclude each other) does not synchronise with the device.
Checking values (targets inside the vocabulary, at least one unmasked token, finite numbers) does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels.contract.config import KTOConfig

__all__ = ["KTOInputs", "check_finite", "check_structure", "check_targets", "check_values", "refuse_nonfinite"]

_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGER = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@dataclass(frozen=True, kw_only=True)
class KTOInputs:
    """The tensors of one KTO loss. B sequences of T tokens, hidden size H, vocabulary V.

    Attributes:
        input: Policy hidden states, (B, T, H), bf16, fp16, fp32 or fp64.
        weight: Policy head, (V, H), dtype of ``input``.
        target: Token ids in [0, V) or the ``ignore_index``, (B, T), integer.
        preference_labels: True for desirable sequences, (B,), bool.
        bias: Policy head's bias, (V,), dtype of ``input``.
        ref_input: Reference hidden states, (B, T, H'); H' and the dtype may differ from the policy's.
        ref_weight: Reference head, (V, H').
        ref_bias: Reference head's bias, (V,).
        ref_logps: Log-probabilities of the sequences under a reference model, (B,), floating; in place of the model.
        kl: The KL reference point, a scalar, (1,) or (B,), floating. No gradient flows into it.
        kl_input: Policy hidden states of the mismatched sequences, (B', T', H); in place of ``kl``.
        kl_target: Their targets, (B', T').
        kl_ref_input: Reference hidden states of the mismatched sequences, (B', T', H').
        kl_ref_logps: Their log-probabilities under a reference model, (B',); in place of ``kl_ref_input``.
    """

    input: Tensor
    weight: Tensor
    target: Tensor
    preference_labels: Tensor
    bias: Tensor | None = None
    ref_input: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None
    ref_logps: Tensor | None = None
    kl: Tensor | None = None
    kl_input: Tensor | None = None
    kl_target: Tensor | None = None
    kl_ref_input: Tensor | None = None
    kl_ref_logps: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that were given, by name."""
        return {name: value for name in _NAMES if (value := getattr(self, name)) is not None}


_NAMES = tuple(f.name for f in fields(KTOInputs))


def check_structure(inputs: KTOInputs, config: KTOConfig) -> None:
    """Check shapes, dtypes, devices and combinations, without synchronising with the device.

    Raises:
        InputError: An argument does not fit; the message says which, what was given and what is accepted.
    """
    _require_tensors(inputs)
    _check_combinations(inputs, config)
    batch, tokens, hidden = _check_head("input", inputs.input, "weight", inputs.weight, "bias", inputs.bias)
    vocabulary = inputs.weight.shape[0]
    if batch * tokens == 0:
        raise InputError(f"input has shape {tuple(inputs.input.shape)}: an empty batch has no loss; pass B, T >= 1")
    _check("target", inputs.target, (batch, tokens), _INTEGER)
    _check("preference_labels", inputs.preference_labels, (batch,), (torch.bool,))
    if inputs.ref_input is not None and inputs.ref_weight is not None:
        # The bias comes last and is compared with the policy's vocabulary: if the head has another size, the error must
        # name the head.
        _check_head("ref_input", inputs.ref_input, "ref_weight", inputs.ref_weight, "ref_bias", None)
        _check("ref_input", inputs.ref_input, (batch, tokens, inputs.ref_input.shape[-1]), _FLOATING)
        _check("ref_weight", inputs.ref_weight, (vocabulary, inputs.ref_input.shape[-1]), _FLOATING)
        if inputs.ref_bias is not None:
            _check("ref_bias", inputs.ref_bias, (vocabulary,), (inputs.ref_input.dtype,))
    if inputs.ref_logps is not None:
        _check("ref_logps", inputs.ref_logps, (batch,), _FLOATING)
    if inputs.kl is not None:
        accepted = ((), (1,), (batch,))
        if tuple(inputs.kl.shape) not in accepted or inputs.kl.dtype not in _FLOATING:
            raise InputError(
                f"kl has shape {tuple(inputs.kl.shape)} and dtype {inputs.kl.dtype}: pass a floating scalar, "
                f"(1,) or (B,) = {(batch,)}"
            )
    if inputs.kl_input is not None and inputs.kl_target is not None:
        kl_batch, kl_tokens, _ = _check_head("kl_input", inputs.kl_input, "weight", inputs.weight, "bias", inputs.bias)
        if kl_batch * kl_tokens == 0:
            raise InputError(f"kl_input has shape {tuple(inputs.kl_input.shape)}: pass at least one sequence and token")
        _check("kl_target", inputs.kl_target, (kl_batch, kl_tokens), _INTEGER)
        if inputs.kl_ref_input is not None and inputs.ref_weight is not None:
            _check("kl_ref_input", inputs.kl_ref_input, (kl_batch, kl_tokens, inputs.ref_weight.shape[1]), _FLOATING)
            if inputs.kl_ref_input.dtype != inputs.ref_weight.dtype:
                raise InputError(
                    f"kl_ref_input is {inputs.kl_ref_input.dtype} but ref_weight is {inputs.ref_weight.dtype}: "
                    f"cast one of them"
                )
        if inputs.kl_ref_logps is not None:
            _check("kl_ref_logps", inputs.kl_ref_logps, (kl_batch,), _FLOATING)
    _check_devices(inputs)


def check_targets(target: Tensor, vocabulary: int, config: KTOConfig, name: str = "target") -> None:
    """Check that every target is in [0, V) or the ``ignore_index``. Synchronises with the device.

    Raises:
        InputError: A target is not; the message has the first such value and its place. Or an average was asked for and
            everything is masked.
    """
    unmasked = target != config.ignore_index
    wrong = unmasked & ((target < 0) | (target >= vocabulary))
    if wrong.any():
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise InputError(
            f"{name}[{row}, {column}] = {int(target[row, column])} is outside the vocabulary [0, {vocabulary}) and is "
            f"not ignore_index = {config.ignore_index}; mask the token or mend the target"
        )
    if config.average_log_prob and not unmasked.any():
        raise InputError(
            f"every token of {name} is masked by ignore_index = {config.ignore_index}: with average_log_prob=True the "
            f"loss is 0/0; drop the batch or pass average_log_prob=False"
        )


def check_finite(inputs: KTOInputs) -> None:
    """Check that no floating tensor has a NaN or an infinity. Synchronises with the device.

    Raises:
        InputError: One has; the message has its name and the first such index.
    """
    refuse_nonfinite(**inputs.tensors())


def refuse_nonfinite(**tensors: Tensor | None) -> None:
    """Check that ``tensors`` have no NaN or infinity. Synchronises with the device.

    Raises:
        InputError: One has; the message has its name and the first such index.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not bool((finite := tensor.isfinite()).all()):
            index = [int(i) for i in finite.logical_not().nonzero()[0]]
            raise InputError(
                f"{name}{index or ''} is {tensor[tuple(index)].item()}: the loss needs finite inputs; look upstream "
                f"for an overflow (validate=False lets NaN through)"
            )


def check_values(inputs: KTOInputs, config: KTOConfig) -> None:
    """`check_structure`, `check_targets` and `check_finite` in turn."""
    check_structure(inputs, config)
    check_targets(inputs.target, inputs.weight.shape[0], config)
    if inputs.kl_target is not None:
        check_targets(inputs.kl_target, inputs.weight.shape[0], config, "kl_target")
    check_finite(inputs)


def _require_tensors(inputs: KTOInputs) -> None:
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        required = field.name in ("input", "weight", "target", "preference_labels")
        if value is None and required:
            raise InputError(f"{field.name} is None: a KTO loss needs input, weight, target and preference_labels")
        if value is not None and not isinstance(value, Tensor):
            raise InputError(
                f"{field.name} is a {type(value).__name__}: pass a torch.Tensor" + (" or None" * (not required))
            )


def _check_combinations(inputs: KTOInputs, config: KTOConfig) -> None:
    """Check which tensors come together, and which exclude each other."""
    given = inputs.tensors()

    def together(first: str, second: str) -> None:
        if first in given and second not in given:
            raise InputError(f"{first} was given without {second}: pass both or neither")

    def apart(first: str, second: str) -> None:
        if first in given and second in given:
            raise InputError(f"{first} and {second} were both given, and each determines the same thing: pass one")

    together("ref_input", "ref_weight")
    together("ref_bias", "ref_weight")
    together("kl_input", "kl_target")
    together("kl_target", "kl_input")
    together("kl_ref_input", "ref_weight")
    for name in ("kl_ref_input", "kl_ref_logps"):
        together(name, "kl_input")
    apart("ref_input", "ref_logps")
    apart("kl", "kl_input")
    apart("kl_ref_input", "kl_ref_logps")
    if "ref_weight" in given and not {"ref_input", "kl_ref_input"} & set(given):
        raise InputError("ref_weight was given without ref_input: pass both, or ref_logps alone")
    has_reference = bool({"ref_input", "ref_logps"} & set(given))
    has_kl_reference = bool({"kl_ref_input", "kl_ref_logps"} & set(given))
    if "kl_input" in given and has_reference != has_kl_reference:
        raise InputError(
            "the KL sequences and the sequences themselves must both have a reference model or both have none: pass "
            "ref_input (or ref_logps) together with kl_ref_input (or kl_ref_logps)"
        )
    if config.loss_type == "apo_zero_unpaired" and {"kl", "kl_input"} & set(given):
        raise InputError("loss_type 'apo_zero_unpaired' has no KL reference point: drop kl and kl_input")


def _check_head(
    input_name: str, input: Tensor, weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None
) -> tuple[int, int, int]:
    """Check hidden states against the head that projects them, and return their (batch, tokens, hidden)."""
    for name, tensor, rank, letters in ((input_name, input, 3, "(B, T, H)"), (weight_name, weight, 2, "(V, H)")):
        if tensor.dim() != rank:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}: pass {letters}")
        if tensor.dtype not in _FLOATING:
            raise InputError(f"{name} has dtype {tensor.dtype}: pass bfloat16, float16, float32 or float64")
    batch, tokens, hidden = input.shape
    vocabulary = weight.shape[0]
    if weight.shape[1] != hidden or vocabulary == 0 or hidden == 0:
        raise InputError(
            f"{weight_name} has shape {tuple(weight.shape)} and {input_name} {tuple(input.shape)}: pass (V, H) with "
            f"V >= 1 and H = {hidden} >= 1"
        )
    if weight.dtype != input.dtype:
        raise InputError(
            f"{input_name} is {input.dtype} but {weight_name} is {weight.dtype}: cast one of them, or run under "
            f"torch.autocast"
        )
    if bias is not None:
        _check(bias_name, bias, (vocabulary,), (input.dtype,))
    return batch, tokens, hidden


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}: expected {shape}")
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputError(f"{name} has dtype {tensor.dtype}: expected {accepted}")


def _check_devices(inputs: KTOInputs) -> None:
    for name, tensor in inputs.tensors().items():
        if tensor.device != inputs.input.device:
            raise InputError(f"{name} is on {tensor.device} but input is on {inputs.input.device}: move one of them")
