"""Power is what it says: a defect of that size is flagged, and one half as large is not."""

from __future__ import annotations

import math

import pytest
import torch
from planted import ALL
from small_ops import RMS_NORM, SOFTMAX_LOSS
from torch import Tensor

from ktonum.bounds import STANDARDS, ErrorBound
from ktonum.cases import torch_dtype
from ktonum.checks import CHECKS, Check, checks_for
from ktonum.context import CaseContext
from ktonum.op import Op
from ktonum.power import power_of
from ktonum.probe import Probe, bounded_probe, equality_probe
from ktonum.results import Measurement, Report, Verdict
from ktonum.runner import run_check


def _flagged(probe: Probe, planted: Tensor, standard: str) -> bool:
    return any(not m.within for m in probe.measure(planted.to(probe.actual.dtype), standard))


def _planted(probe: Probe, defect: str, size: float) -> Tensor:
    """The defect that the power's words describe, planted by other means than `power_of`'s."""
    double = probe.actual.double()
    if "scaled by 1 + size" in defect:
        return double + size * double
    unit = 1.0 if "× one" in defect else float(double.norm()) / math.sqrt(double.numel())
    one = torch.zeros(double.numel(), dtype=torch.float64)
    one[double.numel() // 2] = size * unit
    return double + one.view(double.shape)


def _context(op: Op, dtype: str) -> CaseContext:
    (case,) = op.cases(profile="quick", dtypes=[dtype], device="cpu")
    return CaseContext(op, case)


@pytest.mark.parametrize("standard", STANDARDS)
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("op", [SOFTMAX_LOSS, RMS_NORM], ids=lambda op: op.name)
def test_a_defect_of_the_stated_size_is_flagged_and_half_of_it_is_not(op: Op, dtype: str, standard: str) -> None:
    context = _context(op, dtype)
    stated = 0
    for check in checks_for(op, context.case):
        for probe in () if check.probes is None else check.probes(context):
            assert not _flagged(probe, probe.actual, standard), (check.name, probe.name)
            for power in power_of(probe, standard):
                if power.size is None or not probe.actual.is_floating_point():
                    continue
                # Sizes below the float64 roundoff cannot be planted by adding.
                if power.size < 1e-15:
                    continue
                stated += 1
                where = (check.name, power)
                # The search's own resolution: near the roundoff, what is planted is itself rounded.
                assert _flagged(probe, _planted(probe, power.defect, 1.5 * power.size), standard), where
                assert not _flagged(probe, _planted(probe, power.defect, power.size / 2), standard), where
    assert stated > 4


def _bounded(actual: Tensor, expected: Tensor, independent: float) -> Probe:
    amplitude = torch.full(expected.shape, independent, dtype=torch.float64)
    bound = ErrorBound(amplitude, torch.zeros_like(amplitude), actual.dtype, "test")
    return bounded_probe("t", actual=actual, expected=expected, bound=lambda standard: bound)


def test_a_wider_bound_has_less_power() -> None:
    expected = torch.linspace(0.5, 1.5, 100, dtype=torch.float64)
    sizes = [
        [p.size for p in power_of(_bounded(expected, expected, independent), "precise")]
        for independent in (1e-9, 1e-6, 1e-3)
    ]
    for narrow, wide in zip(sizes, sizes[1:], strict=False):
        for small, large in zip(narrow, wide, strict=True):
            assert small is not None and large is not None
            assert 300 < large / small < 3000


@pytest.mark.parametrize("dtype", ALL)
def test_a_defect_that_rounding_undoes_is_none(dtype: str) -> None:
    tensor = torch.full((64,), 1.0, dtype=torch_dtype(dtype))
    probe = equality_probe("t", actual=tensor, expected=tensor.clone(), law="test")
    eps = torch.finfo(tensor.dtype).eps
    for power in power_of(probe, "precise"):
        # Half an ulp upwards, where a tie goes to the even neighbour below.
        assert power.size is not None and eps / 2 <= power.size < 1.6 * eps


def test_zero_tensors_have_power_in_absolute_terms() -> None:
    zero = torch.zeros(8, dtype=torch.float64)
    (power,) = power_of(_bounded(zero, zero, 1e-3), "precise")
    assert "× one" in power.defect and power.size is not None and 1e-3 < power.size < 2e-2


def test_a_scalar_has_a_scale_alone() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    (power,) = power_of(_bounded(one, one, 1e-6), "precise")
    assert "scaled" in power.defect


def test_a_tensor_with_a_hole_has_the_power_of_its_finite_part() -> None:
    values = torch.linspace(0.5, 1.5, 9, dtype=torch.float64)
    holed = values.clone()
    holed[4] = math.nan  # the middle, where a defect would be planted
    for power in power_of(_bounded(holed, holed.clone(), 1e-6), "precise"):
        assert power.size is not None and 1e-6 < power.size < 1e-4


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_integers_have_the_power_of_one(dtype: torch.dtype) -> None:
    tensor = torch.arange(5).to(dtype)
    (power,) = power_of(equality_probe("t", actual=tensor, expected=tensor.clone(), law="test"), "precise")
    assert power.size == 1.0


def _blind(context: CaseContext) -> list[Probe]:
    within = (Measurement("t/nothing", 0.0, 1.0),)
    return [Probe(name, t, lambda tensor, standard: within) for name, t in context.result.tensors().items()]


def test_a_check_that_no_defect_can_fail_is_vacuous_and_fails_the_report() -> None:
    context = _context(SOFTMAX_LOSS, "fp32")
    result = run_check(Check("blind", "nothing", _blind), context)
    assert result.verdict is Verdict.PASS and result.power and all(p.size is None for p in result.power)
    assert result.vacuous and result.failed and "vacuous" in result.reason
    sound = run_check(CHECKS[0], context)
    report = Report((sound, result))
    assert Report((sound,)).ok and not report.ok
    assert report.failures == (result,) and report.counts()["vacuous"] == 1


def test_an_infinite_bound_is_vacuous() -> None:
    expected = torch.linspace(0.5, 1.5, 9, dtype=torch.float64)
    assert all(p.size is None for p in power_of(_bounded(expected, expected, math.inf), "precise"))
