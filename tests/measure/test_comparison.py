"""The error measures, compared with figures computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ktonum.bounds.formats import spacing
from ktonum.declare.cases import torch_dtype
from ktonum.errors import InputError
from ktonum.measure import comparison
from ktonum.measure.comparison import Comparison, blocks, compare
from subjects.planted import ALL


def _doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_equal_tensors_have_no_error() -> None:
    same = _doubles(1.0, -2.0, 0.0)
    assert compare(actual=same, expected=same.clone()) == Comparison(0.0, 0.0, 0.0, 0.0, (0,), 0, 3)


def test_relative_norm_is_that_of_the_error_over_that_of_the_expected() -> None:
    found = compare(actual=_doubles(3.0, 4.5), expected=_doubles(3.0, 4.0))
    assert found.relative_norm == pytest.approx(0.1)
    assert found.max_absolute == 0.5


@pytest.mark.parametrize("factor", [1.01, 0.5, -1.0, 1 - 2**-20])
def test_signed_bias_is_the_share_by_which_all_values_are_too_large(factor: float) -> None:
    expected = torch.linspace(-3.0, 5.0, 1000, dtype=torch.float64)
    found = compare(actual=factor * expected, expected=expected)
    assert found.signed_bias == pytest.approx(factor - 1, rel=1e-9)
    assert found.relative_norm == pytest.approx(abs(factor - 1), rel=1e-9)


def test_signed_bias_does_not_see_an_orthogonal_error() -> None:
    found = compare(actual=_doubles(1.0, 0.25), expected=_doubles(1.0, 0.0))
    assert found.signed_bias == 0.0 and found.relative_norm == 0.25


@pytest.mark.parametrize("dtype", ALL)
def test_an_ulp_is_that_of_the_dtype_at_the_expected(dtype: str) -> None:
    unit = torch_dtype(dtype)
    eps = torch.finfo(unit).eps
    # Above 1 an ulp is eps, just below 1 it is eps / 2, and above 1024 it is 1024 eps.
    for at, ulp in ((1.0, eps), (0.75, eps / 2), (1024.0, 1024 * eps), (-3.0, 2 * eps)):
        found = compare(actual=_doubles(at + 3 * ulp), expected=_doubles(at), dtype=dtype)
        assert found.max_ulp == pytest.approx(3.0)


def test_ulps_default_to_the_dtype_of_the_actual() -> None:
    actual, expected = torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16), _doubles(1.0)
    assert compare(actual=actual, expected=expected).max_ulp == 1.0
    assert compare(actual=actual, expected=expected, dtype=torch.float16).max_ulp == 8.0
    assert compare(actual=actual, expected=expected, dtype="fp32").max_ulp == 2.0**16


@pytest.mark.parametrize("dtype", ALL)
def test_spacing_ends_at_the_smallest_subnormal(dtype: str) -> None:
    info = torch.finfo(torch_dtype(dtype))
    smallest = info.smallest_normal * info.eps
    values = _doubles(0.0, smallest, info.smallest_normal / 2, info.smallest_normal, 2 * info.smallest_normal)
    expected = _doubles(smallest, smallest, smallest, smallest, 2 * smallest)
    assert torch.equal(spacing(values, torch_dtype(dtype)), expected)


def test_the_worst_index_is_that_of_the_largest_error_in_ulps() -> None:
    expected = torch.full((3, 4, 5), 1.0, dtype=torch.float64)
    expected[2, 0, 3] = 1000.0
    actual = expected.clone()
    actual[2, 0, 3] += 1e-6  # larger in absolute terms, but smaller in units in the last place
    actual[1, 3, 2] += 1e-7
    found = compare(actual=actual, expected=expected)
    assert found.worst_index == (1, 3, 2)
    assert found.max_absolute == pytest.approx(1e-6, rel=1e-3)


def test_a_scalar_has_an_index_without_entries() -> None:
    assert compare(actual=torch.tensor(1.5), expected=torch.tensor(1.0)).worst_index == ()


def test_an_empty_tensor_has_no_error() -> None:
    found = compare(actual=torch.empty(0, 3), expected=torch.empty(0, 3))
    assert found.elements == 0 and found.relative_norm == found.max_ulp == 0.0


def test_a_zero_oracle_makes_any_error_infinite() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert compare(actual=zero, expected=zero).relative_norm == 0.0
    found = compare(actual=_doubles(0.0, 1e-300, 0.0), expected=zero)
    assert found.relative_norm == math.inf or found.max_absolute == 1e-300
    found = compare(actual=_doubles(0.0, 1e-3, 0.0), expected=zero)
    assert found.relative_norm == math.inf and found.signed_bias == 0.0
    assert found.max_absolute == 1e-3 and found.worst_index == (1,)


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["actual", "expected"])
def test_an_element_that_is_not_finite_on_one_side_is_an_infinite_error(strange: float, side: str) -> None:
    tensors = {"actual": torch.ones(2, 3), "expected": torch.ones(2, 3)}
    tensors[side][1, 0] = tensors[side][1, 2] = strange
    found = compare(actual=tensors["actual"], expected=tensors["expected"])
    assert found.nonfinite == 2 and found.worst_index == (1, 0)
    for error in (found.relative_norm, found.signed_bias, found.max_absolute, found.max_ulp):
        assert error == math.inf


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_the_same_on_both_sides_is_no_error(strange: float) -> None:
    actual, expected = _doubles(strange, 2.5), _doubles(strange, 2.0)
    found = compare(actual=actual, expected=expected)
    assert found.nonfinite == 0 and found.worst_index == (1,) and found.relative_norm == 0.25


def test_opposite_infinities_are_an_error() -> None:
    assert compare(actual=_doubles(math.inf), expected=_doubles(-math.inf)).nonfinite == 1


def test_blocks_cover_the_tensors_and_do_not_change_the_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(7, 11, generator=generator, dtype=torch.float64)
    actual = expected + 1e-3 * torch.randn(7, 11, generator=generator, dtype=torch.float64)
    actual[6, 9] += 1.0
    whole = compare(actual=actual, expected=expected)
    assert whole.worst_index == (6, 9)
    for size in (1, 10, 76, 77, 78):
        monkeypatch.setattr(comparison, "_BLOCK", size)
        parts = list(blocks(actual, expected))
        assert [start for start, _ in parts] == list(range(0, 77, size))
        assert torch.equal(torch.cat([a for _, (a, _) in parts]), actual.flatten())
        found = compare(actual=actual, expected=expected)
        assert found.worst_index == whole.worst_index and found.max_ulp == whole.max_ulp
        assert found.relative_norm == pytest.approx(whole.relative_norm, rel=1e-12)
        assert found.signed_bias == pytest.approx(whole.signed_bias, rel=1e-12)


def test_the_first_of_several_not_finite_is_named_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_BLOCK", 4)
    actual = torch.ones(3, 5)
    actual[1, 4] = actual[2, 0] = math.nan
    found = compare(actual=actual, expected=torch.ones(3, 5))
    assert found.nonfinite == 2 and found.worst_index == (1, 4)


def test_strides_do_not_matter() -> None:
    expected = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    actual = expected.clone()
    actual[2, 1] += 0.5
    found = compare(actual=actual.t().contiguous().t(), expected=expected)
    assert found == compare(actual=actual, expected=expected) and found.worst_index == (2, 1)


def test_gradients_in_flight_are_measured_as_values() -> None:
    leaf = torch.ones(2, requires_grad=True)
    assert compare(actual=leaf * 2, expected=torch.full((2,), 2.0)).max_absolute == 0.0


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        (lambda: compare(actual=torch.ones(2), expected=torch.ones(3)), ("(2,)", "(3,)")),
        (lambda: compare(actual=torch.ones(2, 1), expected=torch.ones(2)), ("(2, 1)", "(2,)")),
        (lambda: compare(actual=torch.ones(2).long(), expected=torch.ones(2)), ("torch.int64", "floating")),
        (lambda: compare(actual=torch.ones(2), expected=torch.ones(2).bool()), ("torch.bool", "floating")),
        (lambda: compare(actual=torch.ones(2), expected=torch.ones(2), dtype="bf17"), ("bf17", "bf16")),
    ],
)
def test_tensors_that_cannot_be_compared_are_refused(
    call: Callable[[], Comparison], fragments: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_positions_cannot_be_mixed_up() -> None:
    with pytest.raises(TypeError):
        compare(torch.ones(2), torch.ones(2))  # type: ignore[misc]
