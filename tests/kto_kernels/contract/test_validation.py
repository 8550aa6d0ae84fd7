"""Every argument a KTO loss refuses, and the words that its error must have: what was given, what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.inputs import KTOInputs, check_structure, check_values
from ktonum.kernels.contract.reference import reference_kto_loss

B, T, H, V = 3, 4, 5, 7


def valid(**changes: Any) -> KTOInputs:
    inputs = KTOInputs(
        input=torch.ones(B, T, H),
        weight=torch.ones(V, H),
        target=torch.tensor([[0, 1, -100, 6]] * B),
        preference_labels=torch.tensor([True, False, True]),
    )
    return replace(inputs, **changes)


def reference(**changes: Any) -> dict[str, Any]:
    return {"ref_input": torch.ones(B, T, 9), "ref_weight": torch.ones(V, 9)} | changes


def kl_sequences(**changes: Any) -> dict[str, Any]:
    return {"kl_input": torch.ones(2, 3, H), "kl_target": torch.zeros(2, 3, dtype=torch.long)} | changes


def with_value(value: float, shape: tuple[int, ...], index: tuple[int, ...]) -> Tensor:
    tensor = torch.ones(shape)
    tensor[index] = value
    return tensor


NAN, INFINITY = float("nan"), float("inf")

# What is wrong -> the arguments, and the words that must be in the message.
STRUCTURE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no input": ({"input": None}, ["input is None", "weight, target and preference_labels"]),
    "no labels": ({"preference_labels": None}, ["preference_labels is None"]),
    "a list for a tensor": ({"target": [[0]]}, ["target is a list", "torch.Tensor"]),
    "a number for kl": ({"kl": 0.5}, ["kl is a float", "torch.Tensor or None"]),
    "input of two dimensions": ({"input": torch.ones(B * T, H)}, ["input", "(12, 5)", "(B, T, H)"]),
    "weight of three dimensions": ({"weight": torch.ones(1, V, H)}, ["weight", "(1, 7, 5)", "(V, H)"]),
    "weight transposed": ({"weight": torch.ones(H, V)}, ["weight", "(5, 7)", "(3, 4, 5)", "H = 5"]),
    "no vocabulary": ({"weight": torch.ones(0, H)}, ["weight", "(0, 5)", "V >= 1"]),
    "integer input": ({"input": torch.ones(B, T, H, dtype=torch.int32)}, ["input", "int32", "bfloat16"]),
    "integer weight": ({"weight": torch.ones(V, H, dtype=torch.int64)}, ["weight", "int64", "bfloat16"]),
    "mixed dtypes": ({"weight": torch.ones(V, H).half()}, ["float32", "float16", "cast", "autocast"]),
    "bias of wrong length": ({"bias": torch.ones(V + 1)}, ["bias", "(8,)", "(7,)"]),
    "bias of wrong dtype": ({"bias": torch.ones(V).double()}, ["bias", "float64", "float32"]),
    "empty batch": (
        {"input": torch.ones(0, T, H), "target": torch.ones(0, T), "preference_labels": torch.ones(0)},
        ["(0, 4, 5)", "empty batch", "B, T >= 1"],
    ),
    "empty sequences": ({"input": torch.ones(B, 0, H)}, ["(3, 0, 5)", "empty batch"]),
    "target of wrong shape": ({"target": torch.zeros(B, T + 1).long()}, ["target", "(3, 5)", "(3, 4)"]),
    "target not integer": ({"target": torch.zeros(B, T)}, ["target", "float32", "int64"]),
    "labels of wrong length": ({"preference_labels": torch.ones(B + 1).bool()}, ["preference_labels", "(4,)", "(3,)"]),
    "labels not boolean": ({"preference_labels": torch.ones(B).long()}, ["preference_labels", "int64", "bool"]),
    "ref_input alone": ({"ref_input": torch.ones(B, T, H)}, ["ref_input", "without ref_weight"]),
    "ref_weight alone": ({"ref_weight": torch.ones(V, H)}, ["ref_weight", "without ref_input", "ref_logps"]),
    "ref_bias alone": ({"ref_bias": torch.ones(V)}, ["ref_bias", "without ref_weight"]),
    "ref_input of another length": (
        reference(ref_input=torch.ones(B, T + 1, 9)),
        ["ref_input", "(3, 5, 9)", "(3, 4, 9)"],
    ),
    "ref_weight of another vocabulary": (
        reference(ref_weight=torch.ones(V + 1, 9)),
        ["ref_weight", "(8, 9)", "(7, 9)"],
    ),
    "ref_bias of wrong length": (reference(ref_bias=torch.ones(V + 1)), ["ref_bias", "(8,)", "(7,)"]),
    "reference of mixed dtypes": (reference(ref_weight=torch.ones(V, 9).half()), ["ref_input", "float32", "float16"]),
    "two references": (reference(ref_logps=torch.ones(B)), ["ref_input and ref_logps", "pass one"]),
    "ref_logps of wrong length": ({"ref_logps": torch.ones(B - 1)}, ["ref_logps", "(2,)", "(3,)"]),
    "ref_logps not floating": ({"ref_logps": torch.ones(B).long()}, ["ref_logps", "int64", "float32"]),
    "kl of wrong length": ({"kl": torch.ones(B + 1)}, ["kl", "(4,)", "(1,)", "(3,)"]),
    "kl not floating": ({"kl": torch.ones(1).long()}, ["kl", "int64", "floating"]),
    "two reference points": (kl_sequences(kl=torch.ones(1)), ["kl and kl_input", "pass one"]),
    "kl_input alone": ({"kl_input": torch.ones(2, 3, H)}, ["kl_input", "without kl_target"]),
    "kl_target alone": ({"kl_target": torch.ones(2, 3).long()}, ["kl_target", "without kl_input"]),
    "kl_input of another width": (kl_sequences(kl_input=torch.ones(2, 3, H + 1)), ["(2, 3, 6)", "(7, 5)"]),
    "no KL sequences": (
        kl_sequences(kl_input=torch.ones(0, 3, H), kl_target=torch.ones(0, 3).long()),
        ["kl_input", "(0, 3, 5)", "at least one"],
    ),
    "kl_target of wrong shape": (kl_sequences(kl_target=torch.zeros(2, 4).long()), ["kl_target", "(2, 4)", "(2, 3)"]),
    "kl_target not integer": (kl_sequences(kl_target=torch.zeros(2, 3)), ["kl_target", "float32", "int64"]),
    "kl_ref_input without a reference": (
        kl_sequences(kl_ref_input=torch.ones(2, 3, 9)),
        ["kl_ref_input", "without ref_weight"],
    ),
    "kl_ref_input without KL sequences": (
        reference(kl_ref_input=torch.ones(2, 3, 9)),
        ["kl_ref_input", "without kl_input"],
    ),
    "kl_ref_logps without KL sequences": ({"kl_ref_logps": torch.ones(2)}, ["kl_ref_logps", "without kl_input"]),
    "two KL references": (
        reference(**kl_sequences(kl_ref_input=torch.ones(2, 3, 9), kl_ref_logps=torch.ones(2))),
        ["kl_ref_input and kl_ref_logps", "pass one"],
    ),
    "kl_ref_input of wrong shape": (
        reference(**kl_sequences(kl_ref_input=torch.ones(2, 4, 9))),
        ["kl_ref_input", "(2, 4, 9)", "(2, 3, 9)"],
    ),
    "kl_ref_input of wrong dtype": (
        reference(**kl_sequences(kl_ref_input=torch.ones(2, 3, 9).half())),
        ["kl_ref_input", "float16", "ref_weight", "float32"],
    ),
    "kl_ref_logps of wrong length": (
        kl_sequences(kl_ref_logps=torch.ones(3), ref_logps=torch.ones(B)),
        ["kl_ref_logps", "(3,)", "(2,)"],
    ),
    "a reference for the KL sequences only": (
        kl_sequences(kl_ref_logps=torch.ones(2)),
        ["both have a reference model or both have none", "ref_logps", "kl_ref_logps"],
    ),
    "a reference for the sequences only": (
        reference(**kl_sequences()),
        ["both have a reference model or both have none", "kl_ref_input"],
    ),
    "another device": (
        {"target": torch.zeros(B, T, dtype=torch.long, device="meta")},
        ["target", "meta", "cpu", "move"],
    ),
}

VALUES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "target too large": (
        {"target": torch.tensor([[0, 1, 2, 3], [0, 7, 1, 1], [0] * 4])},
        ["target[1, 1] = 7", "[0, 7)"],
    ),
    "target negative": ({"target": torch.tensor([[0] * 4, [0] * 4, [0, 1, 2, -1]])}, ["target[2, 3] = -1", "-100"]),
    "kl_target too large": (kl_sequences(kl_target=torch.full((2, 3), 9)), ["kl_target[0, 0] = 9", "[0, 7)"]),
    "NaN in input": ({"input": with_value(NAN, (B, T, H), (1, 2, 3))}, ["input[1, 2, 3] is nan", "finite"]),
    "infinite weight": ({"weight": with_value(INFINITY, (V, H), (6, 0))}, ["weight[6, 0] is inf", "finite"]),
    "NaN in kl": ({"kl": torch.tensor(NAN)}, ["kl is nan"]),
    "infinite ref_logps": ({"ref_logps": with_value(-INFINITY, (B,), (2,))}, ["ref_logps[2] is -inf"]),
}


def message_of(check: Callable[[KTOInputs, KTOConfig], None], arguments: dict[str, Any], config: KTOConfig) -> str:
    with pytest.raises(InputError) as raised:
        check(valid(**arguments), config)
    return str(raised.value)


@pytest.mark.parametrize("wrong", STRUCTURE)
def test_structure_that_is_refused(wrong: str) -> None:
    arguments, words = STRUCTURE[wrong]
    message = message_of(check_structure, arguments, KTOConfig())
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


@pytest.mark.parametrize("wrong", VALUES)
def test_values_that_are_refused(wrong: str) -> None:
    arguments, words = VALUES[wrong]
    check_structure(valid(**arguments), KTOConfig())
    message = message_of(check_values, arguments, KTOConfig())
    assert [word for word in words if word not in message] == [], message


def test_a_batch_without_tokens_has_no_average() -> None:
    masked = {"target": torch.full((B, T), 3)}
    message = message_of(check_values, masked, KTOConfig(average_log_prob=True, ignore_index=3))
    for word in ("every token of target", "ignore_index = 3", "average_log_prob=False"):
        assert word in message
    check_values(valid(**masked), KTOConfig(ignore_index=3))


@pytest.mark.parametrize("arguments", [{"kl": torch.ones(1)}, kl_sequences()])
def test_apo_zero_has_no_reference_point(arguments: dict[str, Any]) -> None:
    message = message_of(check_structure, arguments, KTOConfig(loss_type="apo_zero_unpaired"))
    assert "apo_zero_unpaired" in message and "drop kl and kl_input" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_what_is_accepted(dtype: torch.dtype) -> None:
    target = torch.tensor([[0, 1, 100, 6]] * B).to(dtype)
    config = KTOConfig(ignore_index=100)
    for kl in (torch.tensor(0.5), torch.ones(1), torch.ones(B)):
        check_values(valid(target=target, kl=kl, bias=torch.ones(V), **reference(ref_bias=torch.ones(V))), config)
    sequences = kl_sequences(kl_ref_input=torch.ones(2, 3, 9))
    check_values(valid(target=target, **reference(), **sequences), config)
    known = kl_sequences(kl_ref_logps=torch.ones(2, dtype=torch.float64))
    check_values(valid(target=target, ref_logps=torch.ones(B, dtype=torch.float64), **known), config)
    # The reference model may have another hidden size and dtype.
    check_values(valid(target=target, **{n: t.half() for n, t in reference().items()}), config)
    # Being accepted means being computed, to the same value.
    expected, _ = reference_kto_loss(valid(target=target.long()), config)
    assert torch.equal(reference_kto_loss(valid(target=target), config)[0], expected)
