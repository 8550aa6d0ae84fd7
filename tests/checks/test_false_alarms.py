"""Right candidates over many seeds: they raise no alarm, and bounds are not much larger than errors."""

from __future__ import annotations

import importlib
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ktonum.case.context import CaseContext
from ktonum.case.variants import further_runs
from ktonum.checks import Inapplicable, bias, checks_for
from ktonum.declare.cases import Case, Point
from ktonum.declare.op import Op
from ktonum.kernels.audit.kto_op import OP
from ktonum.kernels.contract.reference import ReferenceKTOLoss
from ktonum.measure.over_draws import drawn_errors, typical_errors
from ktonum.results import Measurement
from subjects.mutants import KL_NEGATIVE, POINTS
from subjects.plain_kto import PlainKTO
from subjects.planted import ALL
from subjects.small_ops import RMS_NORM, SOFTMAX_LOSS
from support.combinations import few_or_many

KTO = replace(OP, candidate=PlainKTO)


@dataclass(frozen=True)
class Taken:
    """A measurement, with its case and check."""

    case: str
    check: str
    measurement: Measurement

    @property
    def kind(self) -> str:
        tensor, measure = self.measurement.tensor, self.measurement.measure
        return f"{tensor if tensor.startswith('grad_') else 'output'}/{measure}"


def _reseeded(op: Op, point: Point, seed: int) -> Op:
    """The op with a dummy parameter, which changes the case's name and therefore the seed."""
    return replace(op, dims=[replace(point, parameters={**point.parameters, "draw": seed})])


def _without_draw(op: Op) -> Op:
    """The op, whose functions ignore the dummy parameter."""
    candidate, reference = op.candidate, op.reference
    assert callable(candidate)
    return replace(
        op,
        candidate=lambda draw, **inputs: candidate(**inputs),
        reference=lambda draw, **inputs: reference(**inputs),
    )


#: Checks whose measurements show how near the bounds are to the errors.
PLAIN = ("forward", "gradients")


def measurements(
    op: Op, points: Iterable[Point], dtype: str, seeds: int, standard: str, checks: Collection[str] = ()
) -> Iterator[Taken]:
    """Every measurement of the checks with probes, or only of ``checks``. gradcheck has its own tests."""
    # Without `growth`, whose many long runs have their own seeds in tests/checks/test_growth.py.
    op = replace(op, reductions=())
    for point in points:
        for seed in range(seeds):
            reseeded = _reseeded(op, point, seed)
            (case,) = reseeded.cases(profile="quick", dtypes=[dtype], device="cpu")
            context = CaseContext(reseeded, case)
            for check in (c for c in checks_for(reseeded, case) if not checks or c.name in checks):
                try:
                    probes = () if check.probes is None else check.probes(context)
                except Inapplicable:
                    continue
                for probe in probes:
                    for measurement in probe.measure(probe.actual, standard):
                        yield Taken(case.name, check.name, measurement)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(("seeds", "checks"), [(2, PLAIN), pytest.param(12, (), marks=pytest.mark.exhaustive)])
def test_a_right_kto_loss_raises_no_alarm_and_uses_its_bounds(seeds: int, checks: tuple[str, ...], dtype: str) -> None:
    uses: dict[str, list[float]] = defaultdict(list)
    for taken in measurements(KTO, POINTS, dtype, seeds, "precise", checks):
        assert taken.measurement.within, taken
        if taken.check in PLAIN:
            uses[taken.kind].append(taken.measurement.use)
    gradients = {kind: statistics.median(found) for kind, found in uses.items() if kind.startswith("grad_")}
    assert {kind.partition("/")[0] for kind in gradients} == {"grad_input", "grad_weight", "grad_bias"}
    # A bound of a hundred times the typical error would hide defects. A projection may be small by chance.
    for kind, median in gradients.items():
        assert median > (1 / 1000 if kind.endswith("signed_bias") else 1 / 100), (kind, median)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("op", [SOFTMAX_LOSS, RMS_NORM], ids=lambda op: op.name)
@few_or_many("seeds", 3, 25)
def test_right_small_ops_raise_no_alarm(op: Op, dtype: str, seeds: int) -> None:
    for taken in measurements(_without_draw(op), op.points("quick"), dtype, seeds, "precise"):
        assert taken.measurement.within, taken


@pytest.mark.parametrize("standard", ["precise", "eager"])
@pytest.mark.parametrize("dtype", ALL)
@few_or_many("seeds", 2, 25)
def test_a_measured_bound_of_many_elements_raises_no_alarm(dtype: str, standard: str, seeds: int) -> None:
    op = replace(RMS_NORM, error_model=None)
    for taken in measurements(_without_draw(op), op.points("quick"), dtype, seeds, standard):
        assert taken.measurement.within, taken


@few_or_many("seeds", 4, 60)
def test_a_measured_bound_of_one_element_raises_no_alarm(seeds: int) -> None:
    op = replace(SOFTMAX_LOSS, error_model=None)
    wide = (Point({"N": 64, "V": 501}, {"scale": 1.7}),)
    for dtype in ("fp32", "fp64"):
        for taken in measurements(_without_draw(op), wide, dtype, seeds, "precise"):
            assert taken.measurement.within, taken


@few_or_many("seeds", 2, 8)
def test_plain_pytorch_meets_eager_where_sigmoids_saturate(seeds: int) -> None:
    op = replace(OP, candidate=ReferenceKTOLoss)
    for taken in measurements(op, (KL_NEGATIVE,), "fp32", seeds, "eager"):
        assert taken.measurement.within, taken


@pytest.fixture(scope="module")
def count() -> ModuleType:
    return importlib.import_module("count_false_alarms")


# Other blocks than those recorded in benchmarks/results/false_alarms.jsonl.
@pytest.mark.parametrize(
    ("number", "cases"), [(12000, 6), *(pytest.param(n, 50, marks=pytest.mark.exhaustive) for n in (1000, 1001))]
)
def test_a_block_of_the_long_count_raises_no_alarm(
    count: ModuleType, number: int, cases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(count, "BLOCK", cases)
    block = count.run_block(number)
    assert sum(block.cases.values()) == count.BLOCK and block.measurements > 10 * count.BLOCK
    assert block.alarms == ()


def test_the_long_count_raises_alarms_and_goes_on_where_it_stopped(
    count: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(RMS_NORM, candidate=lambda x, weight, eps: {"y": 1.01 * x * weight})
    monkeypatch.setattr(count, "subjects", lambda: (count.Subject(wrong, "precise", "wrong"),))
    monkeypatch.setattr(count, "BLOCK", 8)
    block = count.run_block(0)
    assert any("::forward y/element" in text for text in block.alarms)
    state = tmp_path / "state.jsonl"
    state.write_text(count.json.dumps(count.asdict(block)) + "\n", encoding="utf-8")
    page = tmp_path / "page.md"
    status = count.main(["--cases", str(count.BLOCK), "--jobs", "1", "--state", str(state), "--out", str(page)])
    assert status == 1 and len(state.read_text("utf-8").splitlines()) == 1
    assert f"{count.BLOCK} cases" in page.read_text("utf-8") and "::forward y/element" in page.read_text("utf-8")


def test_the_cases_of_the_long_count_differ(count: ModuleType) -> None:
    names = [(s.label, case.name) for s, _, case in map(count.case_number, range(600))]
    assert len(set(names)) > 0.97 * len(names)
    assert {case.dtype for _, _, case in map(count.case_number, range(100))} == set(ALL)


# 416, 6432, 12576: autocast made the candidate's log-probabilities bfloat16.
# 2398, 8350, 8734: all smoothed classes lose the same amount among float16's subnormals.
# 12128: sequences with gradients of one sign are added before those of the other sign.
# 32761: half of float64's smallest number, which the bound had rounded to zero.
@pytest.mark.parametrize("number", [416, 6432, 12576, 2398, 8350, 8734, 12128, 32761])
def test_cases_that_once_raised_an_alarm_raise_none(count: ModuleType, number: int) -> None:
    found = list(count.alarms_of(*count.case_number(number)))
    assert found and not any(found), found


def test_right_values_at_their_limits_pass_and_a_planted_fault_there_does_not(count: ModuleType) -> None:
    cases = [c for c in map(count.case_number, range(160)) if c[0].standard == "precise"]
    assert len({op.name for _, op, _ in cases}) == 6 and len({case.dtype for *_, case in cases}) == len(ALL)
    for subject, op, case in cases:
        found = list(count.alarms_at_its_limits(subject, op, case))
        assert found and not any(found), found
    wrong = replace(RMS_NORM, candidate=lambda x, weight, eps: {"y": 1.01 * x * weight})
    (case,) = wrong.cases(profile="quick", dtypes=["fp32"], device="cpu")[:1]
    assert any(count.alarms_at_its_limits(count.Subject(wrong, "precise", "wrong"), wrong, case))
    assert not list(count.alarms_at_its_limits(count.Subject(wrong, "eager", "wrong"), wrong, case))


def test_a_signed_error_of_zeros_is_inconclusive() -> None:
    op = replace(SOFTMAX_LOSS, dims=[Point({"N": 3, "V": 1}, {"scale": 1.7})])
    (case,) = op.cases(profile="quick", dtypes=["fp32"], device="cpu")
    assert bias.CHECK.probes is not None
    with pytest.raises(Inapplicable, match="exactly zero or missing"):
        bias.CHECK.probes(CaseContext(op, case))


def test_the_typical_error_of_a_cancelling_output_is_absolute_too() -> None:
    op = Op(
        name="total",
        candidate=lambda x: x.sum(),
        reference=lambda x: x.sum(),
        sample=lambda draw: {"x": draw.normal(64)},
        dims=[{"N": 1}],
        cancelling=("output",),
    )
    (case,) = op.cases(profile="quick", dtypes=["fp32"], device="cpu")

    def size(case: Case) -> float:
        return float(CaseContext(op, case).oracle.tensors()["output"].abs())

    def typical(op: Op, case: Case) -> float:
        context = CaseContext(op, case)
        errors = drawn_errors(
            lambda x: x.sum() + 1e-3,
            torch.float32,
            reference=context.reference,
            runs=further_runs(context, 16),
            differentiable=context.differentiable,
        )
        found = typical_errors(errors, here=context.oracle.tensors(), cancelling=op.cancelling)
        return found["output"] * size(case)

    by_size = sorted((replace(case, offset=i) for i in range(20)), key=size)
    plain = replace(op, cancelling=())
    assert typical(plain, by_size[0]) < 5e-4 and typical(op, by_size[0]) == pytest.approx(1e-3, rel=0.05)
    assert typical(plain, by_size[-1]) > 1.2e-3 and typical(op, by_size[-1]) == typical(plain, by_size[-1])
