"""`ktonum.assert_within`: correct results pass, and planted defects do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ktonum
from ktonum.case.context import CaseContext
from ktonum.declare.cases import DTYPES, Case, torch_dtype
from ktonum.errors import InputError, TableError, ToleranceError
from ktonum.kernels.audit.kto_op import OP
from ktonum.measure.in_roundings import derived_tolerances, measure_errors
from ktonum.results import BoundKind
from ktonum.tolerances.assertion import device_class
from ktonum.tolerances.table_files import find_table, write_table
from support.rounded_oracles import KTO, SUM, gradient, put, truncated


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arguments", [KTO, SUM], ids=["row", "derived"])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e4])
def test_an_oracle_rounded_once_passes_at_any_scale(dtype: str, arguments: dict[str, Any], scale: float) -> None:
    expected = gradient(60, 80, scale=scale)
    measured = ktonum.assert_within(actual=expected.to(torch_dtype(dtype)), expected=expected, **arguments)
    assert [m.measure for m in measured] == ["element", "relative_norm", "signed_bias"]
    assert all(m.value <= m.bound for m in measured)
    # The norm of one rounding. fp16 has only zeros at 1e-30, and fp64 is not rounded.
    if dtype != "fp64" and not (dtype == "fp16" and scale == 1e-30):
        assert measured[1].value == pytest.approx(1 / math.sqrt(3), rel=0.05)


@pytest.fixture(scope="module", params=list(DTYPES))
def kernels(request: pytest.FixtureRequest) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """The dtype, outputs and gradients of the real kernels, and their oracle; on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table, kind = find_table("kto"), device_class(device)
    if table is None or kind not in table.provenance:
        pytest.skip(f"no rows for {kind}: run ktonum calibrate kto --device {device}")
    context = CaseContext(OP, Case("kto", OP.points("quick")[1], request.param, device))
    return request.param, context.result.tensors(), context.expected()


def test_the_kernels_results_pass(kernels: tuple[str, dict[str, Tensor], dict[str, Tensor]]) -> None:
    dtype, actual, expected = kernels
    for name in ("loss", "grad_input", "grad_weight", "grad_bias"):
        measured = ktonum.assert_within(
            actual=actual[name], expected=expected[name], op="kto", output=name, dtype=dtype
        )
        assert any(m.value > 0 for m in measured)


# In 16 bits, the final rounding hides a smaller scale. In the other dtypes, it is within the rows' tolerances.
SMALLEST_FLAGGED = {"bf16": 2**-7, "fp16": 2**-10, "fp32": 2**-20, "fp64": 2**-46}


def test_the_kernels_gradients_scaled_are_flagged(
    kernels: tuple[str, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    dtype, actual, expected = kernels
    for name in ("grad_input", "grad_weight", "grad_bias"):
        scaled = (actual[name].double() * (1 + SMALLEST_FLAGGED[dtype])).to(actual[name].dtype)
        with pytest.raises(ToleranceError, match=rf"BEYOND {name}/(relative_norm|signed_bias)"):
            ktonum.assert_within(actual=scaled, expected=expected[name], op="kto", output=name)


def test_a_bf16_loss_is_not_excused_by_its_dtype(
    kernels: tuple[str, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    dtype, actual, expected = kernels
    with pytest.raises(ToleranceError, match="loss/element"):
        ktonum.assert_within(
            actual=actual["loss"].bfloat16(),
            expected=expected["loss"],
            op="kto",
            output="loss",
            dtype=dtype,
        )


def by(factor: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda exact: (factor * exact).to(dtype)


def off(share: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """One element is wrong by a share of its row's root mean square."""
    return lambda e: put(e, (7, 5), float(e[7, 5]) + share * float(e[7].square().mean().sqrt()), dtype)


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DEFECTS = [
    pytest.param(truncated, "signed_bias", id="truncating bf16 store"),
    pytest.param(by(1.01, BF16), "signed_bias", id="1 % too long in bf16"),
    pytest.param(by(0.995, BF16), "signed_bias", id="half a per cent too short in bf16"),
    pytest.param(by(1.001, FP16), "signed_bias", id="0.1 % too long in fp16"),
    pytest.param(by(1 + 1e-4, FP32), "signed_bias", id="1e-4 too long in fp32"),
    pytest.param(by(1 + 1e-13, FP64), "signed_bias", id="1e-13 too long in fp64"),
    pytest.param(off(0.15, BF16), "element", id="one element in bf16"),
    pytest.param(off(0.02, FP16), "element", id="one element in fp16"),
    pytest.param(off(1e-4, FP32), "element", id="one element in fp32"),
    pytest.param(off(1e-12, FP64), "element", id="one element in fp64"),
    pytest.param(lambda e: put(e, 3, 0.0, BF16), "element", id="a row of zeros in bf16"),
    pytest.param(
        lambda e: put(e, int(e.norm(dim=1).argmin()), 0.0, FP32), "element", id="the smallest row zero in fp32"
    ),
    pytest.param(lambda e: put(e, (3, 4), math.nan, FP32), "element", id="NaN"),
    pytest.param(lambda e: put(e, (3, 4), -math.inf, BF16), "element", id="infinity"),
    pytest.param(lambda e: e.to(BF16).to(FP32), "relative_norm", id="fp32 that went through bf16"),
    pytest.param(lambda e: e.to(FP32).to(FP64), "relative_norm", id="fp64 that went through fp32"),
    pytest.param(torch.zeros_like, "relative_norm", id="nothing at all"),
    pytest.param(lambda e: -e.to(BF16), "signed_bias", id="the sign flipped"),
]


# At 1e-6, an absolute tolerance would pass them all. fp16 has only five bits left there, which hide small defects.
SCALED = [
    pytest.param(*p.values, scale, id=f"{p.id} at {scale:g}")
    for p in DEFECTS
    for scale in ((1e-3, 1.0) if "fp16" in str(p.id) else (1e-6, 1.0))
]


@pytest.mark.parametrize("arguments", [KTO, SUM], ids=["row", "derived"])
@pytest.mark.parametrize(("defect", "measure", "scale"), SCALED)
def test_a_defect_is_flagged(
    defect: Callable[[Tensor], Tensor], measure: str, arguments: dict[str, Any], scale: float
) -> None:
    expected = gradient(60, 80, scale=scale)
    actual = defect(expected.clone())
    with pytest.raises(ToleranceError, match=f"BEYOND {arguments['output']}/{measure}"):
        ktonum.assert_within(actual=actual, expected=expected, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arguments", [KTO, SUM], ids=["row", "derived"])
def test_ten_per_cent_of_a_gradient_of_1e6th_is_flagged(dtype: str, arguments: dict[str, Any]) -> None:
    expected = gradient(60, 80, scale=1e-6)
    actual = (1.1 * expected).to(torch_dtype(dtype))
    assert torch.allclose(actual.double(), expected, atol=1e-5), "an absolute tolerance should pass it"
    with pytest.raises(ToleranceError, match="signed_bias"):
        ktonum.assert_within(actual=actual, expected=expected, **arguments)


@pytest.mark.parametrize(("arguments", "share"), [(KTO, 1e-4), (SUM, 1e-5)], ids=["row", "derived"])
def test_one_element_of_millions_is_flagged(arguments: dict[str, Any], share: float) -> None:
    expected = gradient(1700, 2500)
    actual = expected.float()
    ktonum.assert_within(actual=actual, expected=expected, **arguments)
    actual[1699, 2400] += share
    with pytest.raises(ToleranceError) as caught:
        ktonum.assert_within(actual=actual, expected=expected, **arguments)
    assert "[1699, 2400] of [1700, 2500]" in str(caught.value)
    assert f"ok     {arguments['output']}/relative_norm" in str(caught.value), "the norm does not see it"


def test_a_matrix_product_is_within_its_derivation_and_no_further() -> None:
    """Real float32 accumulation with rows and columns of very unequal size. Rounding an operand is flagged."""
    draw = torch.Generator().manual_seed(3)
    for terms in (16, 256, 4096):
        a = torch.randn(40, terms, generator=draw) * torch.logspace(-3, 3, 40)[:, None]
        b = torch.randn(terms, 50, generator=draw) * torch.logspace(-2, 2, 50)
        expected = a.double() @ b.double()
        one_by_one = torch.zeros(40, 50)
        for k in range(terms):
            one_by_one += a[:, k, None] * b[k]
        for actual in (a @ b, one_by_one):
            ktonum.assert_within(actual=actual, expected=expected, op="matmul", output="c", terms=terms)
        rounded = a.bfloat16().float() @ b
        with pytest.raises(ToleranceError):
            ktonum.assert_within(actual=rounded, expected=expected, op="matmul", output="c", terms=terms)
        # With operand_roundings=1, the same rounding passes.
        measured = ktonum.assert_within(
            actual=rounded.bfloat16(), expected=expected, op="matmul", output="c", terms=terms, operand_roundings=1
        )
        assert measured[0].value > 0.5


def test_a_row_of_zeros_is_held_to_zero() -> None:
    """Rows of masked tokens are zero. An error in them is flagged, however small it is."""
    expected = gradient(60, 80)
    expected[5] = 0.0
    ktonum.assert_within(actual=expected.bfloat16(), expected=expected, **KTO)
    with pytest.raises(ToleranceError, match=r"\[5, 6\]"):
        ktonum.assert_within(actual=put(expected, (5, 6), 1e-30, BF16), expected=expected, **KTO)


def test_nan_where_the_oracle_has_nan_is_agreement_and_elsewhere_is_not() -> None:
    expected = put(gradient(60, 80), (0, 0), math.nan, FP64)
    ktonum.assert_within(actual=expected.float(), expected=expected, **KTO)
    with pytest.raises(ToleranceError, match=r"1 of 4800 elements are wrongly NaN or infinite, the first at \[0, 0\]"):
        ktonum.assert_within(actual=expected.nan_to_num().float(), expected=expected, **KTO)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (63,), (64,), (3, 4, 5), (1, 1)])
def test_any_shape_has_the_measures_that_it_can_have(shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    measured = ktonum.assert_within(actual=expected.float(), expected=expected, **SUM)
    assert len(measured) == 1 + (expected.numel() > 1) + (expected.numel() >= 64)
    with pytest.raises(ToleranceError):
        ktonum.assert_within(actual=1.001 * expected.float(), expected=expected, **SUM)


def test_rows_measured_on_other_sizes_are_adapted_and_say_so() -> None:
    table = find_table("kto")
    assert table is not None
    rows = {r.measure: r for r in table.rows if r.key[0] == "grad_weight" and r.key[2:] == ("fp32", "interpreter")}
    few, many = gradient(4, 20), gradient(600, 100)
    small = ktonum.assert_within(actual=few.float(), expected=few, **KTO)
    large = ktonum.assert_within(actual=many.float(), expected=many, **KTO)
    assert small[0].bound == rows["element"].tolerance and large[0].bound > rows["element"].tolerance
    assert small[1].bound > rows["relative_norm"].tolerance == large[1].bound
    assert small[2].bound == pytest.approx(
        rows["signed_bias"].tolerance * math.sqrt(rows["signed_bias"].elements_min / 80)
    )
    assert "for 60000 elements" in large[0].bound_source.text and "pass dims=" in large[0].bound_source.text


def test_sizes_beyond_a_row_use_the_derivation() -> None:
    expected = gradient(60, 80)
    within = ktonum.assert_within(actual=expected.float(), expected=expected, dims={"V": 60, "H": 80}, terms=9, **KTO)
    beyond = ktonum.assert_within(actual=expected.float(), expected=expected, dims={"V": 999}, terms=9, **KTO)
    assert {m.bound_source.kind for m in within} == {BoundKind.TABLE}
    assert all(m.bound_source.text.startswith("row grad_weight/") for m in within)
    assert {m.bound_source.kind for m in beyond} == {BoundKind.DERIVED}
    words = [m.bound_source.text for m in beyond]
    assert all(w.startswith("derived for 9 terms") and "V=999 is larger" in w for w in words)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"actual": torch.ones(3)}, r"actual is torch.float32 \(3,\), expected torch.float64 \(2,\): .* one shape"),
        ({"expected": torch.ones(2)}, "compute expected in float64"),
        ({"actual": torch.ones(2).to(torch.int32)}, "actual may be bfloat16, float16, float32, float64"),
        ({"expected": torch.full((2,), math.nan, dtype=FP64)}, "no finite element"),
        ({"actual": torch.ones(0), "expected": torch.ones(0, dtype=FP64)}, "no finite element"),
        ({"dtype": "float33"}, "unknown dtype 'float33': use bf16"),
        ({"dtype": torch.int8}, "unknown dtype 'int8'"),
        ({"op": "../kto"}, r"op = '../kto': an op's name is a word"),
        ({"terms": 0}, "terms is 0: pass an integer, 1 or more"),
        ({"terms": 2.5}, "terms is 2.5"),
        ({"operand_roundings": -1}, "operand_roundings is -1"),
        (
            {"op": "unheard_of"},
            r"unheard_of/loss in fp32 on interpreter: there is no table unheard_of.toml. Pass terms=",
        ),
        ({"output": "grad_ref"}, r"kto.toml has no row for output 'grad_ref': it has .*loss.*Pass terms="),
        ({"device": "sm_42"}, r"no row for device class 'sm_42' .*: it has .*interpreter.*Pass terms="),
        ({"tables": "/nowhere"}, "no directory '/nowhere'"),
    ],
)
def test_what_cannot_be_decided_says_what_to_pass(changed: dict[str, Any], said: str) -> None:
    arguments = {"actual": torch.ones(2), "expected": torch.ones(2, dtype=FP64), "op": "kto", "output": "loss"}
    ktonum.assert_within(**{**arguments, "device": "interpreter"})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=said):
        ktonum.assert_within(**{**arguments, "device": "interpreter", **changed})  # type: ignore[arg-type]


def test_tables_of_ones_own_decide_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    shipped = find_table("kto")
    assert shipped is not None
    wanted = ("grad_weight", "element", "fp32", "interpreter")
    halved = {r: min(r.bound, max(r.errors.maximum, r.tolerance / 2)) for r in shipped.rows if r.key == wanted}
    rows = tuple(replace(r, errors=replace(r.errors, tolerance=t, decided_by="tail")) for r, t in halved.items())
    strict = replace(shipped, rows=rows)
    write_table(strict, tmp_path / "kto.toml")
    expected = gradient(60, 80)
    arguments = {"actual": expected.float(), "expected": expected, **KTO}
    mine, theirs = ktonum.assert_within(**arguments, tables=tmp_path), ktonum.assert_within(**arguments)
    assert mine[0].bound == pytest.approx(theirs[0].bound / 2)
    (tmp_path / "kto.toml").write_text("schema = 'another/1'")
    with pytest.raises(TableError, match="another/1"):
        ktonum.assert_within(**arguments, tables=tmp_path)


def test_triton_interpreting_makes_the_cpu_another_device_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert device_class(torch.device("cpu")) == device_class("cpu") == "interpreter"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert device_class(torch.device("cpu")) == "cpu"
    assert device_class("sm_90") == "sm_90"


def test_blocks_do_not_change_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradient(7, 60, 80)
    actual = put(expected, (6, 2, 1), 50.0, BF16)
    arguments: dict[str, Any] = {"expected": expected, "stored": BF16}

    def measured() -> tuple[dict[str, float], tuple[int, ...], dict[str, float]]:
        errors = measure_errors(actual=actual, **arguments)
        granted = derived_tolerances(model=lambda s: (s.typical, s.expected.abs()), **arguments)
        return dict(errors.values), errors.worst, granted

    whole = measured()
    monkeypatch.setattr("ktonum.measure.in_roundings._BLOCK", 1000)
    parts = measured()
    assert parts[1] == whole[1] == (6, 2, 1)
    assert parts[0] == pytest.approx(whole[0]) and parts[2] == pytest.approx(whole[2])
