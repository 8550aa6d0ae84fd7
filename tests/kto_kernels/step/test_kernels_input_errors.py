"""Bad input to the Triton path: one clear error that names what was given and what is accepted."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels import FusedLinearKTOLoss, fused_linear_kto_loss
from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.device import hardware
from ktonum.kernels.loss import KernelOptions
from support.combinations import combinations
from support.kto_inputs import Recipe, draw, mapped, oracle_outcome, tracked

META = torch.device("meta")
BATCH, TOKENS, HIDDEN, VOCABULARY = 3, 5, 7, 11

#: From this every bad input is made by one change.
MODEL = Recipe(dims=(BATCH, TOKENS, HIDDEN, VOCABULARY), dtype=torch.float32, reference="model", kl="sequences")
LOGPS = replace(MODEL, reference="logps")


def refuse(inputs: KTOInputs, *fragments: str, config: KTOConfig | None = None) -> None:
    """The loss raises InputError, with each fragment in its message, on one line."""
    with pytest.raises(InputError) as caught:
        fused_linear_kto_loss(inputs, config)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message


def changed(recipe: Recipe, device: torch.device, **changes: Callable[[Tensor], Any]) -> KTOInputs:
    """Inputs of ``recipe`` with some tensors replaced by a function of themselves."""
    inputs = draw(recipe, device)
    return replace(inputs, **{name: change(getattr(inputs, name)) for name, change in changes.items()})


@pytest.mark.parametrize("recipe", [MODEL, LOGPS], ids=["model", "logps"])
def test_what_the_changes_start_from_is_accepted(recipe: Recipe, device: torch.device) -> None:
    fused_linear_kto_loss(draw(recipe, device))


WRONG_SHAPES: list[tuple[Recipe, str, Callable[[Tensor], Tensor], tuple[str, ...]]] = [
    (MODEL, "input", lambda t: t[0], ("(5, 7)", "(B, T, H)")),
    (MODEL, "input", lambda t: t[..., :6], ("(11, 7)", "(3, 5, 6)", "(V, H)")),
    (MODEL, "weight", lambda t: t.t(), ("(7, 11)", "(V, H)", "H = 7")),
    (MODEL, "weight", lambda t: t[:0], ("(0, 7)", "V >= 1")),
    (MODEL, "weight", lambda t: t.flatten(), ("(77,)", "(V, H)")),
    (MODEL, "bias", lambda t: t[:-1], ("(10,)", "(11,)")),
    (MODEL, "bias", lambda t: t[None], ("(1, 11)", "(11,)")),
    (MODEL, "target", lambda t: t[:, :-1], ("(3, 4)", "(3, 5)")),
    (MODEL, "target", lambda t: t.flatten(), ("(15,)", "(3, 5)")),
    (MODEL, "preference_labels", lambda t: t[:-1], ("(2,)", "(3,)")),
    (MODEL, "preference_labels", lambda t: t[:, None], ("(3, 1)", "(3,)")),
    (MODEL, "ref_input", lambda t: t[:, :-1], ("(3, 4, 7)", "(3, 5, 7)")),
    (MODEL, "ref_input", lambda t: t[..., :-1], ("(11, 7)", "(3, 5, 6)")),
    (MODEL, "ref_weight", lambda t: t[:-1], ("(10, 7)", "(11, 7)")),
    (MODEL, "ref_bias", lambda t: t[:-1], ("(10,)", "(11,)")),
    (MODEL, "kl_input", lambda t: t[..., :-1], ("(4, 5, 6)",)),
    (MODEL, "kl_input", lambda t: t[:0], ("(0, 5, 7)", "at least one")),
    (MODEL, "kl_target", lambda t: t[:-1], ("(3, 5)", "(4, 5)")),
    (MODEL, "kl_ref_input", lambda t: t[:-1], ("(3, 5, 7)", "(4, 5, 7)")),
    (LOGPS, "ref_logps", lambda t: t[:-1], ("(2,)", "(3,)")),
    (LOGPS, "kl_ref_logps", lambda t: t[:-1], ("(3,)", "(4,)")),
    (replace(MODEL, kl="(B,)"), "kl", lambda t: t[:-1], ("(2,)", "(3,)", "scalar")),
]


@pytest.mark.parametrize(("recipe", "name", "change", "fragments"), WRONG_SHAPES)
def test_a_wrong_shape(
    recipe: Recipe, name: str, change: Callable[[Tensor], Tensor], fragments: tuple[str, ...], device: torch.device
) -> None:
    named = "weight" if (name, fragments[0]) == ("input", "(11, 7)") else name
    refuse(changed(recipe, device, **{name: change}), named, *fragments)


FLOATING = ("input", "weight", "bias", "ref_input", "ref_weight", "ref_bias", "kl_input", "kl_ref_input")


@pytest.mark.parametrize("name", FLOATING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.complex64, torch.bool], ids=str)
def test_a_wrong_or_mixed_dtype(name: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs = changed(MODEL, device, **{name: lambda t: t.to(dtype)})
    refuse(inputs, name, str(dtype).removeprefix("torch."), "float32")


@pytest.mark.parametrize("name", ["ref_logps", "kl_ref_logps"])
def test_integer_log_probabilities(name: str, device: torch.device) -> None:
    refuse(changed(LOGPS, device, **{name: Tensor.long}), name, "int64", "float32")


@pytest.mark.parametrize("name", ["target", "kl_target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_targets_that_are_no_integers(name: str, dtype: torch.dtype, device: torch.device) -> None:
    refuse(changed(MODEL, device, **{name: lambda t: t.to(dtype)}), name, str(dtype), "int64")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32], ids=str)
def test_labels_that_are_not_boolean(dtype: torch.dtype, device: torch.device) -> None:
    inputs = changed(MODEL, device, preference_labels=lambda t: t.to(dtype))
    refuse(inputs, "preference_labels", str(dtype), "bool")


def test_an_integer_kl(device: torch.device) -> None:
    refuse(changed(replace(MODEL, kl="scalar"), device, kl=Tensor.long), "kl", "int64", "floating")


@pytest.mark.parametrize("recipe", [MODEL, LOGPS, replace(MODEL, kl="scalar")], ids=["model", "logps", "kl"])
def test_tensors_on_different_devices(recipe: Recipe, device: torch.device) -> None:
    inputs = draw(recipe, device)
    for name in inputs.tensors().keys() - {"input"}:
        refuse(replace(inputs, **{name: getattr(inputs, name).to(META)}), name, "meta", str(inputs.input.device))


@pytest.mark.parametrize("name", ["target", "kl_target"])
@pytest.mark.parametrize("value", [-1, -101, VOCABULARY, 2**40])
def test_a_target_outside_the_vocabulary(name: str, value: int, device: torch.device) -> None:
    def change(target: Tensor) -> Tensor:
        target[1, 3] = value
        return target

    inputs = changed(MODEL, device, **{name: change})
    refuse(inputs, f"{name}[1, 3] = {value}", "[0, 11)", "ignore_index = -100")


def test_the_default_ignore_index_under_another_one(device: torch.device) -> None:
    inputs = draw(MODEL, device)
    inputs.target[0, 0] = -100
    refuse(inputs, "target[0, 0] = -100", "ignore_index = -1", config=KTOConfig(ignore_index=-1))


@combinations("reduction, name", ["mean", "sum", "none"], ["target", "kl_target"])
def test_an_average_over_nothing(name: str, reduction: Any, device: torch.device) -> None:
    inputs = changed(MODEL, device, **{name: lambda t: torch.full_like(t, -100)})
    config = KTOConfig(average_log_prob=True, reduction=reduction)
    refuse(inputs, f"every token of {name}", "ignore_index = -100", "average_log_prob=False", config=config)
    fused_linear_kto_loss(inputs, KTOConfig(reduction=reduction))


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (3, 0)])
def test_an_empty_batch(batch: int, tokens: int, device: torch.device) -> None:
    inputs = KTOInputs(
        input=torch.zeros(batch, tokens, HIDDEN, device=device),
        weight=torch.zeros(VOCABULARY, HIDDEN, device=device),
        target=torch.zeros(batch, tokens, dtype=torch.int64, device=device),
        preference_labels=torch.zeros(batch, dtype=torch.bool, device=device),
    )
    refuse(inputs, f"({batch}, {tokens}, {HIDDEN})", "empty batch", "B, T >= 1")


def test_no_hidden_units(device: torch.device) -> None:
    plain = replace(MODEL, reference="none", kl="none")
    refuse(changed(plain, device, input=lambda t: t[..., :0], weight=lambda t: t[:, :0]), "(3, 5, 0)", ">= 1")


def with_one(tensor: Tensor, value: float) -> Tensor:
    """``value`` in one place, where a target is not masked."""
    planted = tensor.clone()
    planted[(0,) * tensor.dim()] = value
    return planted


#: Recipe and name of each tensor of floating-point numbers.
PLACES = {
    **{name: (MODEL, name) for name in FLOATING},
    **{name: (LOGPS, name) for name in ("ref_logps", "kl_ref_logps")},
    **{f"kl {form}": (replace(MODEL, kl=form), "kl") for form in ("scalar", "(1,)", "(B,)")},
}


@combinations("place, value", PLACES, [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_number_that_is_not_finite(place: tuple[Recipe, str], value: float, device: torch.device) -> None:
    recipe, name = place
    inputs = changed(replace(recipe, masked=0.0), device, **{name: lambda t: with_one(t, value)})
    index = [0] * getattr(inputs, name).dim()
    refuse(inputs, f"{name}{index or ''} is {value}", "finite inputs", "validate=False")
    loss, _ = fused_linear_kto_loss(inputs, options=KernelOptions(validate=False))
    assert loss.shape == ()


@combinations("value, name", [torch.nan, torch.inf], ["input", "ref_input", "kl_input", "kl_ref_input"], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_masked_hidden_state_that_is_not_finite(value: float, name: str, device: torch.device) -> None:
    """No result shows it but the sum of logits, which takes masked tokens in."""
    inputs = draw(MODEL, device)
    target = inputs.kl_target if name.startswith("kl") else inputs.target
    assert target is not None
    target[1, 2] = -100
    getattr(inputs, name)[1, 2, 3] = value
    refuse(inputs, f"{name}[1, 2, 3] is {value}")


@pytest.mark.parametrize("name", ["weight", "bias", "ref_weight", "ref_bias"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_minus_infinity_for_a_token_that_is_no_target(name: str, device: torch.device) -> None:
    """Its probability is 0, and every result finite."""
    inputs = draw(MODEL, device)
    for hidden in (inputs.input, inputs.ref_input, inputs.kl_input, inputs.kl_ref_input):
        hidden.data[..., 0] = 1.0  # type: ignore[union-attr]
    for target in (inputs.target, inputs.kl_target):
        target[target == 7] = 8  # type: ignore[index]
    at = (7, 0) if "weight" in name else (7,)
    with torch.no_grad():
        getattr(inputs, name)[at] = -torch.inf
    refuse(inputs, f"{name}{list(at)} is -inf")


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_products_that_overflow(device: torch.device) -> None:
    inputs = changed(MODEL, device, input=lambda t: t * 1e30, weight=lambda t: t * 1e30)
    refuse(inputs, "not finite", "input and weight", "overflow")


@pytest.mark.parametrize(
    ("parameters", "fragments"),
    [
        ({"loss_type": "dpo"}, ("loss_type", "'dpo'", "'kto'", "'apo_zero_unpaired'")),
        ({"reduction": "max"}, ("reduction", "'max'", "'mean'", "'none'", "'sum'")),
        ({"beta": float("nan")}, ("beta", "nan", "finite")),
        ({"beta": "0.1"}, ("beta", "'0.1'", "finite")),
        ({"beta": True}, ("beta", "True", "finite")),
        ({"desirable_weight": float("inf")}, ("desirable_weight", "inf", "finite")),
        ({"undesirable_weight": None}, ("undesirable_weight", "None", "finite")),
        ({"ignore_index": -100.0}, ("ignore_index", "-100.0", "integer")),
        ({"workspace": 0}, ("workspace", "0", "positive")),
        ({"workspace": 1e6}, ("workspace", "1000000.0", "positive")),
        ({"workspace": True}, ("workspace", "True", "positive")),
    ],
    ids=str,
)
def test_a_wrong_parameter(parameters: dict[str, Any], fragments: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        FusedLinearKTOLoss(**parameters)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def contradictory(device: torch.device) -> dict[str, tuple[KTOInputs, tuple[str, ...]]]:
    """Tensors that exclude or lack each other, with what the error says."""
    model, logps = draw(MODEL, device), draw(LOGPS, device)
    scalar = draw(replace(MODEL, kl="scalar"), device).kl
    plain = draw(replace(MODEL, reference="none", kl="none"), device)
    pairs: dict[str, tuple[KTOInputs, tuple[str, ...]]] = {
        "ref_input alone": (replace(plain, ref_input=model.ref_input), ("ref_input", "without ref_weight")),
        "ref_weight alone": (replace(plain, ref_weight=model.ref_weight), ("ref_weight", "without ref_input")),
        "ref_bias alone": (replace(plain, ref_bias=model.ref_bias), ("ref_bias", "without ref_weight")),
        "two references": (replace(model, ref_logps=logps.ref_logps), ("ref_input", "ref_logps", "both")),
        "two KLs": (replace(model, kl=scalar), ("kl and kl_input", "both")),
        "kl_input alone": (replace(plain, kl_input=model.kl_input), ("kl_input", "without kl_target")),
        "kl_target alone": (replace(plain, kl_target=model.kl_target), ("kl_target", "without kl_input")),
        "kl_ref_logps alone": (replace(plain, kl_ref_logps=logps.kl_ref_logps), ("kl_ref_logps", "without kl_input")),
        "two KL references": (
            replace(model, kl_ref_logps=logps.kl_ref_logps),
            ("kl_ref_input", "kl_ref_logps", "both"),
        ),
        "KL without reference": (replace(model, kl_ref_input=None), ("KL sequences", "kl_ref_input")),
        "no labels": (replace(plain, preference_labels=None), ("preference_labels is None",)),
        "no input": (replace(plain, input=None), ("input is None",)),
        "a list": (replace(plain, target=[[1]]), ("target is a list", "torch.Tensor")),
        "a number for kl": (replace(plain, kl=0.5), ("kl is a float", "torch.Tensor or None")),
        "a number for input": (replace(plain, input=0.5), ("input is a float", "torch.Tensor")),
    }
    return pairs


@pytest.mark.parametrize("name", contradictory(torch.device("cpu")))
def test_a_contradictory_combination(name: str, device: torch.device) -> None:
    inputs, fragments = contradictory(device)[name]
    refuse(inputs, *fragments)


@pytest.mark.parametrize("kl", ["scalar", "sequences"])
def test_a_kl_for_a_loss_that_has_none(kl: str, device: torch.device) -> None:
    config = KTOConfig(loss_type="apo_zero_unpaired")
    refuse(draw(replace(MODEL, kl=kl), device), "apo_zero_unpaired", "kl", config=config)


def test_use_ref_model_without_a_reference(device: torch.device) -> None:
    inputs = draw(replace(MODEL, reference="none", kl="none"), device)
    module = FusedLinearKTOLoss(use_ref_model=True)
    with pytest.raises(InputError, match="use_ref_model=True needs ref_input and ref_weight, or ref_logps"):
        module(inputs.input, inputs.weight, inputs.target, inputs.bias, inputs.preference_labels)


def test_missing_labels(device: torch.device) -> None:
    inputs = draw(MODEL, device)
    with pytest.raises(InputError, match="preference_labels is None"):
        FusedLinearKTOLoss()(inputs.input, inputs.weight, inputs.target)


@pytest.mark.parametrize("name", ["ref_input", "ref_weight", "ref_bias", "ref_logps"])
def test_reference_tensors_that_are_not_used_are_warned_of(name: str, device: torch.device) -> None:
    inputs = draw(replace(LOGPS if name == "ref_logps" else MODEL, kl="none"), device)
    arguments = (inputs.input, inputs.weight, inputs.target, inputs.bias, inputs.preference_labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, _ = FusedLinearKTOLoss()(*arguments)
    with pytest.warns(UserWarning, match="not used, since use_ref_model=False") as record:
        loss, _ = FusedLinearKTOLoss()(*arguments, **{name: getattr(inputs, name)})
    assert torch.equal(loss, expected)
    assert record[0].filename == __file__, "it points at the caller's line"


def test_errors_come_through_torch_compile(device: torch.device) -> None:
    """Values are looked at when the compiled function runs, not when it is traced."""
    inputs = draw(MODEL, device)
    compiled = torch.compile(lambda t: fused_linear_kto_loss(t)[0], fullgraph=True, backend="aot_eager")
    compiled(tracked(inputs))
    inputs.kl_target[0, 0] = 99  # type: ignore[index]
    with pytest.raises(InputError, match=r"kl_target\[0, 0\] = 99"):
        compiled(tracked(inputs))


@pytest.mark.parametrize("name", ["target", "kl_target"])
def test_the_oracle_refuses_the_same(name: str, device: torch.device) -> None:
    inputs = changed(MODEL, device, **{name: lambda t: torch.full_like(t, -100)})
    with pytest.raises(InputError, match=f"every token of {name}"):
        oracle_outcome(inputs, KTOConfig(average_log_prob=True))


def test_tensors_where_triton_cannot_compile() -> None:
    code = """
import torch
from ktonum.errors import InputError
from ktonum.kernels import FusedLinearKTOLoss
x, w, y = torch.zeros(1, 2, 3), torch.zeros(4, 3), torch.zeros(1, 2, dtype=torch.int64)
try:
    FusedLinearKTOLoss()(x, w, y, preference_labels=torch.ones(1, dtype=torch.bool))
except InputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for fragment in ("are on cpu", "CUDA", "TRITON_INTERPRET=1", "before ktonum.kernels is imported"):
        assert fragment in done.stdout, done.stdout


def test_inputs_survive_an_error(device: torch.device) -> None:
    inputs = draw(MODEL, device)
    inputs.target[0, 0] = 99
    before = mapped(inputs, Tensor.clone).tensors()
    refuse(inputs, "99")
    assert all(torch.equal(tensor, before[name]) for name, tensor in inputs.tensors().items())


def test_float64_on_a_triton_without_it() -> None:
    cuda = torch.device("cuda")
    with pytest.raises(InputError, match=r"float64.*Triton 3\.5 on, and this is 3\.4\.1"):
        hardware.check_support(cuda, torch.float64, triton_version="3.4.1")
    hardware.check_support(cuda, torch.float32, triton_version="3.4.1")
    hardware.check_support(cuda, torch.float64, triton_version="3.10.0+git1")
