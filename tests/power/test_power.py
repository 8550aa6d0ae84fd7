"""The stated power is right: a defect of that size is flagged, and one of half the size is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ktonum.auditing.judge import run_check
from ktonum.bounds import ErrorBound
from ktonum.case.context import CaseContext
from ktonum.checks import CHECKS, Check, checks_for
from ktonum.declare.cases import torch_dtype
from ktonum.declare.op import Op
from ktonum.measure.probe import Probe, bounded_probe, equality_probe
from ktonum.power.defect import Sound, signs
from ktonum.power.planting import power_of
from ktonum.report.sentences import reason_words
from ktonum.results import STANDARDS, BoundKind, BoundSource, Measurement, Power, Report, Verdict
from subjects.planted import ALL
from subjects.small_ops import RMS_NORM, SOFTMAX_LOSS
from support.combinations import combinations


def _flagged(probe: Probe, planted: Tensor, standard: str) -> bool:
    return any(not m.within for m in probe.measure(planted.to(probe.actual.dtype), standard))


def _planted(probe: Probe, defect: str, size: float) -> Tensor:
    """The defect that the power's words describe, planted by code that is independent of `power_of`."""
    double = probe.actual.double()
    if "scaling, by 1 + size" in defect:
        return double + size * double
    if "one row, scaled by 1 + size" in defect:
        # The defect chooses which row of middle size it changes.
        row = Sound(probe.actual).row
        rows = torch.arange(double.shape[:-1].numel()).view(*double.shape[:-1], 1)
        return torch.where(rows == row, double + size * double, double)
    if "a term missing" in defect:
        return double - size * double * signs(0, double.numel(), double.device).view(double.shape)
    unit = 1.0 if "× one" in defect else float(double.norm()) / math.sqrt(double.numel())
    one = torch.zeros(double.numel(), dtype=torch.float64)
    one[double.numel() // 2] = size * unit
    return double + one.view(double.shape)


def _context(op: Op, dtype: str) -> CaseContext:
    (case,) = op.cases(profile="quick", dtypes=[dtype], device="cpu")
    return CaseContext(op, case)


@combinations("op, dtype, standard", [SOFTMAX_LOSS, RMS_NORM], ALL, STANDARDS, ids=lambda v: getattr(v, "name", None))
def test_a_defect_of_the_stated_size_is_flagged_and_half_of_it_is_not(op: Op, dtype: str, standard: str) -> None:
    context = _context(op, dtype)
    stated = 0
    for check in checks_for(op, context.case):
        for probe in () if check.probes is None else check.probes(context):
            assert not _flagged(probe, probe.actual, standard), (check.name, probe.tensor)
            for power in power_of(probe, standard):
                if power.size is None or not power.unit:
                    continue
                # Smaller sizes than float64's roundoff cannot be planted by addition.
                if power.size < 1e-15:
                    continue
                stated += 1
                where = (check.name, power)
                # The search has this resolution. Near the roundoff, the planted values are rounded too.
                assert _flagged(probe, _planted(probe, power.defect, 1.5 * power.size), standard), where
                assert not _flagged(probe, _planted(probe, power.defect, power.size / 2), standard), where
    assert stated > 4


def _bounded(actual: Tensor, expected: Tensor, independent: float) -> Probe:
    amplitude = torch.full(expected.shape, independent, dtype=torch.float64)
    bound = ErrorBound(amplitude, torch.zeros_like(amplitude), actual.dtype, BoundSource(BoundKind.DERIVED))
    return bounded_probe("t", actual=actual, expected=expected, bound=lambda standard: bound)


def _sizes(probe: Probe) -> dict[str, float | None]:
    """The smallest flagged size of each kind that has a size."""
    return {p.kind: p.size for p in power_of(probe, "precise") if p.unit}


def _flags(probe: Probe) -> dict[str, bool]:
    """Whether each kind without a size is flagged."""
    return {p.kind: p.size is not None for p in power_of(probe, "precise") if not p.unit}


def test_a_wider_bound_has_less_power() -> None:
    expected = torch.linspace(0.5, 1.5, 100, dtype=torch.float64)
    sizes = [list(_sizes(_bounded(expected, expected, independent)).values()) for independent in (1e-9, 1e-6, 1e-3)]
    for narrow, wide in zip(sizes, sizes[1:], strict=False):
        for small, large in zip(narrow, wide, strict=True):
            assert small is not None and large is not None
            assert 300 < large / small < 3000


@pytest.mark.parametrize("dtype", ALL)
def test_a_defect_that_rounding_undoes_is_none(dtype: str) -> None:
    tensor = torch.full((64,), 1.0, dtype=torch_dtype(dtype))
    probe = equality_probe("t", actual=tensor, expected=tensor.clone(), law="test")
    eps = torch.finfo(tensor.dtype).eps
    sizes = _sizes(probe)
    assert set(sizes) == {"scaling", "one element", "a term missing"}
    for kind, size in sizes.items():
        # Above 1, a tie at half an ulp goes to 1. Below 1, ulps are half as large.
        least = eps / 4 if kind == "a term missing" else eps / 2
        assert size is not None and least <= size < 1.6 * eps


def test_zero_tensors_have_power_in_absolute_terms() -> None:
    zero = torch.zeros(8, dtype=torch.float64)
    (power,) = power_of(_bounded(zero, zero, 1e-3), "precise")
    assert power.defect == "t: one element, off by size × one"
    assert power.size is not None and 1e-3 < power.size < 2e-2


def test_a_scalar_has_a_scale_alone() -> None:
    probe = _bounded(torch.tensor(1.0), torch.tensor(1.1, dtype=torch.float64), 0.1)
    assert set(_sizes(probe)) == {"scaling"}
    assert set(_flags(probe)) == {"sign flipped", "halved"}, "1 is the same in every precision"


def test_a_tensor_with_a_hole_has_the_power_of_its_finite_part() -> None:
    values = torch.linspace(0.5, 1.5, 9, dtype=torch.float64)
    holed = values.clone()
    holed[4] = math.nan  # the middle, where a defect would be planted
    sizes = _sizes(_bounded(holed, holed.clone(), 1e-6))
    assert set(sizes) == {"scaling", "one element", "a term missing"}
    assert all(size is not None and 1e-6 < size < 1e-4 for size in sizes.values())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_integers_have_the_power_of_one(dtype: torch.dtype) -> None:
    tensor = torch.arange(5).to(dtype)
    (power,) = power_of(equality_probe("t", actual=tensor, expected=tensor.clone(), law="test"), "precise")
    assert power == Power("t", "one element off by one", "", 1.0)


def _matrix(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _by_norm_alone(actual: Tensor, granted: float) -> Probe:
    """A probe that measures a relative norm, as most tests of kernels do."""

    def measure(tensor: Tensor, standard: str) -> tuple[Measurement, ...]:
        return (Measurement("t", "norm", float((tensor - actual).norm() / actual.norm()), granted),)

    return Probe("t", actual, measure)


def test_a_norm_is_blind_to_what_befalls_a_row() -> None:
    flagged = _flags(_by_norm_alone(_matrix(1000), 0.1))
    assert flagged["sign flipped"] and flagged["halved"] and flagged["last tile stale"]
    assert not flagged["one row zero"] and not flagged["one row's sign flipped"]
    assert not flagged["one element's sign flipped"] and not flagged["rounded to fp32"]
    assert _flags(_by_norm_alone(_matrix(20), 0.1))["one row zero"]


def test_a_bound_by_element_sees_a_row() -> None:
    matrix = _matrix(1000)
    flagged = _flags(_bounded(matrix, matrix, 1e-3))
    assert flagged["one row zero"] and flagged["one row's sign flipped"] and flagged["one element's sign flipped"]
    assert not flagged["rounded to fp32"] and _flags(_bounded(matrix, matrix, 1e-10))["rounded to fp32"]


def test_the_size_of_a_missing_term_is_what_a_norm_sees() -> None:
    sizes = _sizes(_by_norm_alone(_matrix(1000), 1e-3))
    for kind in ("scaling", "a term missing"):
        assert sizes[kind] == pytest.approx(1.2e-3, rel=0.25)
    # One of a thousand rows, and it is of middle size.
    assert sizes["one row"] == pytest.approx(1e-3 * math.sqrt(1000), rel=0.7)


@pytest.mark.parametrize("exponent", [0, 5, 9])
def test_errors_that_do_not_grow_in_proportion_are_searched_all_the_same(exponent: int) -> None:
    """One measure grows with the square of the size, the other has only two values."""
    tensor = torch.ones(8, dtype=torch.float64)
    size = 10.0**-exponent

    def squared(planted: Tensor, standard: str) -> tuple[Measurement, ...]:
        return (Measurement("t", "square", float((planted - tensor).square().amax()), size**2),)

    def told(planted: Tensor, standard: str) -> tuple[Measurement, ...]:
        return (Measurement("t", "told", 1.0 if float((planted - tensor).abs().amax()) > size else 0.0, 0.0),)

    for measure in (squared, told):
        for kind, found in _sizes(Probe("t", tensor, measure)).items():
            assert found is not None and 0.99 * size < found < 1.6 * size, (kind, measure)


def _blind(context: CaseContext) -> list[Probe]:
    within = (Measurement("t", "nothing", 0.0, 1.0),)
    return [Probe(name, t, lambda tensor, standard: within) for name, t in context.result.tensors().items()]


def test_a_check_that_no_defect_can_fail_is_vacuous_and_fails_the_report() -> None:
    context = _context(SOFTMAX_LOSS, "fp32")
    result = run_check(Check("blind", "nothing", _blind), context)
    assert result.verdict is Verdict.PASS and result.power and all(p.size is None for p in result.power)
    assert result.vacuous and result.failed and "proves nothing" in reason_words(result)
    sound = run_check(CHECKS[0], context)
    report = Report((sound, result))
    assert Report((sound,)).ok and not report.ok
    assert report.failures == (result,) and report.counts()["vacuous"] == 1


def test_an_infinite_bound_is_vacuous() -> None:
    expected = torch.linspace(0.5, 1.5, 9, dtype=torch.float64)
    assert all(p.size is None for p in power_of(_bounded(expected, expected, math.inf), "precise"))
