"""Every candidate gets a verdict, and the verdict does not depend on earlier runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.auditing.devices import resolve_device
from ktonum.auditing.in_process import audit, audit_items
from ktonum.auditing.judge import check_named, run_check
from ktonum.case.context import CaseContext
from ktonum.checks import Check, checks_for
from ktonum.declare.cases import Case, Point, seed_of
from ktonum.declare.op import Op
from ktonum.errors import InputError, UsageError
from ktonum.kernels.audit.kto_op import OP
from ktonum.report.sentences import reason_words
from ktonum.results import BoundKind, BoundSource, Cause, CheckResult, Measurement, Power, Report, Verdict
from subjects.mutants import MODEL, ClearsInputInBackward, ClearsMaskedInPlace, ScalesUpstreamInPlace
from subjects.plain_kto import PlainKTO
from subjects.planted import ALL
from subjects.small_ops import LOSS_POINT, RMS_NORM, SOFTMAX_LOSS, rms_norm_with, softmax_loss_with
from support.combinations import combinations


def _run(candidate: Any, name: str, dtype: str = "fp32", op: Op = SOFTMAX_LOSS) -> CheckResult:
    planted = replace(op, candidate=candidate)
    (case,) = planted.cases(profile="quick", dtypes=[dtype], device="cpu")
    return run_check(check_named(planted, case, name), CaseContext(planted, case))


def _raising(error: Exception) -> Callable[..., Any]:
    def candidate(**inputs: Any) -> Any:
        raise error

    return candidate


def test_a_candidate_that_raises_is_an_error_with_its_traceback() -> None:
    result = _run(_raising(ZeroDivisionError("by nought")), "forward")
    assert result.verdict is Verdict.ERROR and result.failed
    assert "ZeroDivisionError: by nought" in result.reason and "\n" not in result.reason
    assert "Traceback" in result.details and "test_judge.py" in result.details


def test_a_backward_that_raises_is_an_error_with_its_traceback() -> None:
    def refuse(gradient: Tensor) -> Tensor:
        raise ZeroDivisionError("backward")

    result = _run(softmax_loss_with(upstream=refuse), "gradients")
    assert result.verdict is Verdict.ERROR and "ZeroDivisionError: backward" in result.reason
    assert "Traceback" in result.details


def test_a_candidate_that_raises_fails_gradcheck_alike() -> None:
    result = _run(_raising(ZeroDivisionError("by nought")), "gradcheck", "fp64")
    assert result.verdict is Verdict.ERROR and "ZeroDivisionError: by nought" in result.reason
    assert "Traceback" in result.details


def test_a_candidate_that_refuses_the_case_is_an_error_that_says_so() -> None:
    result = _run(_raising(InputError("N = 9: use a multiple of 16")), "forward")
    assert result.verdict is Verdict.ERROR and result.cause is Cause.CANDIDATE_REFUSED
    assert "refused" in reason_words(result) and "multiple of 16" in result.reason


def test_a_candidate_that_lacks_something_is_inconclusive() -> None:
    result = _run(_raising(UsageError("it knows no masks")), "forward")
    assert result.verdict is Verdict.INCONCLUSIVE and not result.failed and "it knows no masks" in result.reason


@pytest.mark.parametrize(("name", "dtype"), [("forward", "fp32"), ("gradients", "bf16"), ("gradcheck", "fp64")])
def test_running_out_of_memory_is_inconclusive(name: str, dtype: str) -> None:
    result = _run(_raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")), name, dtype)
    assert result.verdict is Verdict.INCONCLUSIVE, result.reason
    assert "memory" in result.reason and "\n" not in result.reason


@pytest.mark.parametrize(
    "message", ["CUDA error: out of memory\nCUDA kernel errors ...", "Triton Error [CUDA]: out of memory"]
)
@pytest.mark.parametrize("name", ["forward", "linearity"])
def test_running_out_of_memory_in_the_driver_is_inconclusive(name: str, message: str) -> None:
    result = _run(_raising(RuntimeError(message)), name)
    assert result.verdict is Verdict.INCONCLUSIVE, result.reason
    assert "out of memory" in result.reason and "\n" not in result.reason


def test_another_error_that_mentions_memory_is_an_error() -> None:
    result = _run(_raising(RuntimeError("the candidate's pool is out of memory")), "forward")
    assert result.verdict is Verdict.ERROR


def test_an_oracle_out_of_memory_is_inconclusive() -> None:
    op = replace(SOFTMAX_LOSS, reference=_raising(torch.OutOfMemoryError("CUDA out of memory.")))
    result = _run(softmax_loss_with(), "forward", op=op)
    assert result.verdict is Verdict.INCONCLUSIVE and "memory" in result.reason


@pytest.mark.parametrize(
    ("returned", "fragment"),
    [
        (lambda loss: 3.0, "float"),
        (lambda loss: {"loss": 3.0}, "float"),
        (lambda loss: [loss, "text"], "str"),
        (lambda loss: {}, "loss"),
        (lambda loss: {"los": loss}, "los"),
        (lambda loss: {"loss": None}, "loss"),
        (lambda loss: loss, "output"),
        (lambda loss: {"loss": loss.view(1)}, "(1,)"),
        (lambda loss: {"loss": loss.detach()}, "without requires_grad"),
    ],
)
def test_a_wrong_structure_is_an_error_that_names_it(returned: Callable[[Tensor], Any], fragment: str) -> None:
    right = softmax_loss_with()
    result = _run(lambda **inputs: returned(right(**inputs)["loss"]), "forward")
    assert result.verdict is Verdict.ERROR and fragment in result.reason


def test_an_output_that_is_not_differentiated_must_be_there_too() -> None:
    def reference(**inputs: Any) -> dict[str, Tensor]:
        return {**SOFTMAX_LOSS.reference(**inputs), "rows": torch.ones(9)}

    result = _run(softmax_loss_with(), "forward", op=replace(SOFTMAX_LOSS, reference=reference, error_model=None))
    assert result.verdict is Verdict.ERROR and "rows" in result.reason


def test_a_lost_gradient_is_an_error_that_names_the_input() -> None:
    def detached(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**inputs, "weight": inputs["weight"].detach()}

    result = _run(rms_norm_with(receive=detached), "gradients", op=RMS_NORM)
    assert result.verdict is Verdict.ERROR and "weight" in result.reason and "gradient" in result.reason


def test_a_failure_names_tensor_place_and_bound() -> None:
    def one_wrong(gradient: Tensor) -> Tensor:
        wrong = gradient.clone()
        wrong[4, 7] += 1.0
        return wrong

    result = _run(softmax_loss_with(gradient={"x": one_wrong}), "gradients")
    assert result.verdict is Verdict.FAIL and result.meets == ()
    words = reason_words(result)
    assert result.cause is Cause.BEYOND_BOUND
    assert "grad_x/element" in words and "[4, 7]" in words and "analysis" in words
    assert result.worst is not None and result.worst.where == (4, 7)


def test_a_check_that_fails_itself_is_an_error_not_a_crash() -> None:
    def broken(context: CaseContext) -> list[Any]:
        raise IndexError("in the check")

    (case,) = SOFTMAX_LOSS.cases(profile="quick", dtypes=["fp32"], device="cpu")
    result = run_check(Check("broken", "nothing", broken), CaseContext(SOFTMAX_LOSS, case))
    assert result.verdict is Verdict.ERROR and "IndexError" in result.reason and "Traceback" in result.details


def test_a_check_without_anything_to_measure_is_inconclusive() -> None:
    (case,) = SOFTMAX_LOSS.cases(profile="quick", dtypes=["fp32"], device="cpu")
    result = run_check(Check("empty", "nothing", lambda context: []), CaseContext(SOFTMAX_LOSS, case))
    assert result.verdict is Verdict.INCONCLUSIVE and result.cause is Cause.NOTHING_MEASURED and reason_words(result)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"dtypes": ["bf17"]}, ("bf17", "bf16, fp16, fp32, fp64")),
        ({"dtypes": "fp32,half"}, ("half", "fp16")),
        ({"dtypes": []}, ("none given", "bf16")),
        ({"profile": "fast"}, ("fast", "quick or full")),
        ({"device": "gpu"}, ("gpu", "cuda")),
        ({"device": "cuda:x"}, ("cuda:x", "cuda:N")),
        ({"device": "cuda:99"}, ("cuda:99", "use ")),
        ({"standard": "exact"}, ("exact", "precise or eager")),
    ],
)
def test_an_audit_refuses_what_it_does_not_know(arguments: dict[str, Any], fragments: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        audit(SOFTMAX_LOSS, **{"device": "cpu", **arguments})
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["checks", "without"])
def test_a_point_that_names_no_check_is_refused(field: str) -> None:
    op = replace(SOFTMAX_LOSS, dims=[replace(LOSS_POINT, **{field: ("gradient",)})])
    with pytest.raises(UsageError, match="'?gradient'?.*gradients"):
        audit(op, device="cpu")


def test_an_unknown_check_or_standard_is_refused() -> None:
    (case,) = SOFTMAX_LOSS.cases(profile="quick", dtypes=["fp32"], device="cpu")
    with pytest.raises(UsageError, match="gradients"):
        check_named(SOFTMAX_LOSS, case, "gradient")
    with pytest.raises(UsageError, match="precise or eager"):
        run_check(check_named(SOFTMAX_LOSS, case, "forward"), CaseContext(SOFTMAX_LOSS, case), "exact")


def test_devices_resolve() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_an_audit_runs_every_check_on_every_case_and_passes_on_each_result() -> None:
    told: list[CheckResult] = []
    report = audit(RMS_NORM, device="cpu", on_result=told.append)
    assert tuple(told) == report.results and report.ok
    items = audit_items(RMS_NORM, profile="quick", dtypes=ALL, device="cpu")
    assert [(r.case, r.check) for r in report.results] == [(case.name, name) for case, name in items]
    # gradcheck is for float64 only.
    assert sum(name == "gradcheck" for _, name in items) == 1


def _records(op: Op, case: Case, order: Callable[[list[Check]], Iterator[Check] | list[Check]]) -> dict[str, Any]:
    context = CaseContext(op, case)
    checks = order(list(checks_for(op, case)))
    return {c.name: {**run_check(c, context).to_record(), "seconds": 0, "details": ""} for c in checks}


#: Without the checks on long reductions and many draws, which take most of the time.
SHORT = replace(MODEL, without=("growth", "bias"))
LONG_TOO = pytest.param(MODEL, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("point", [SHORT, LONG_TOO], ids=["short", "all"])
@combinations(
    "candidate, dtype", [PlainKTO, ClearsMaskedInPlace, ClearsInputInBackward, ScalesUpstreamInPlace], ["bf16", "fp64"]
)
def test_results_do_not_depend_on_what_ran_before(candidate: Any, dtype: str, point: Point) -> None:
    op = replace(OP, candidate=candidate, dims=[point])
    (case,) = op.cases(profile="quick", dtypes=[dtype], device="cpu")
    forwards = _records(op, case, list)
    assert _records(op, case, reversed) == forwards
    alone = {}
    for check in checks_for(op, case):
        alone.update(_records(op, case, lambda checks, name=check.name: [c for c in checks if c.name == name]))
    assert alone == forwards


def test_a_context_keeps_its_tensors_from_the_candidate() -> None:
    for candidate in (ClearsMaskedInPlace, ClearsInputInBackward, ScalesUpstreamInPlace):
        op = replace(OP, candidate=candidate, dims=[SHORT])
        (case,) = op.cases(profile="quick", dtypes=["fp32"], device="cpu")
        context = CaseContext(op, case)
        before = {k: v.clone() for k, v in {**context.inputs, **context.upstream}.items()}
        for check in checks_for(op, case):
            run_check(check, context)
        for name, tensor in {**context.inputs, **context.upstream}.items():
            assert torch.equal(tensor, before[name]), name


def test_seeds_derive_from_names_alone() -> None:
    op = replace(OP, dims={"quick": OP.points("quick"), "full": OP.points("full")})
    cases = [c for d in ("cpu", "cuda") for c in op.cases(profile="full", dtypes=ALL, device=d)]
    assert len({c.name for c in cases}) == len(cases) == len({c.seed for c in cases})
    for case in cases:
        assert case.seed == seed_of(case.name) == replace(case).seed
        assert 0 <= case.seed < 2**63
    assert (
        seed_of("kto") == 603968977963316029
    )  # the same for every version and machine, because a gate compares their reports


def _odd_result() -> CheckResult:
    return CheckResult(
        "op[N=1]-bf16-cpu",
        "forward",
        Verdict.FAIL,
        (
            Measurement("a", "element", math.inf, 1.0, "bound", BoundSource(BoundKind.DERIVED, "eager"), (0, 1)),
            Measurement("b", "element", -math.inf, math.inf),
            Measurement("c", "element", math.nan, 0.0),
        ),
        (Power("a", "scaling", "by 1 + size", 0.01), Power("a", "one element", "", None)),
        "because",
        "eager",
        ("eager",),
        1.5,
        "several\nlines",
    )


def test_a_report_survives_json(tmp_path: Path) -> None:
    report = Report((_odd_result(), CheckResult("c", "d", Verdict.INCONCLUSIVE)), {"torch": "2", "n": math.inf})
    report.to_json(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text  # strict JSON parsers refuse them
    again = Report.from_json(tmp_path / "report.json")
    # NaN is not equal to itself. In records it is text, so the records are compared.
    assert [r.to_record() for r in again.results] == [r.to_record() for r in report.results]
    first = again.results[0]
    assert first.measurements[0].value == math.inf and first.measurements[1].bound == math.inf
    assert math.isnan(first.measurements[2].value) and first.power[1].size is None
    assert first.verdict is Verdict.FAIL and again.counts() == report.counts()


@pytest.mark.parametrize("text", ["{}", "[]", '{"schema": "other"}'])
def test_a_file_that_is_not_a_report_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"not a ktonum report.*'ktonum-report/2' or 'ktonum-report/1' is accepted"):
        Report.from_json(tmp_path / "other.json")


def test_nan_is_beyond_every_bound() -> None:
    nan, none = Measurement("t", "m", math.nan, math.inf), Measurement("t", "m", 1e-30, 0.0)
    assert not nan.within and nan.use == math.inf
    assert not none.within and none.use == math.inf
    assert Measurement("t", "m", 0.0, 0.0).within and Measurement("t", "m", 0.0, 0.0).use == 0.0


def test_reports_are_ok_only_with_results_and_without_failures() -> None:
    passed = CheckResult("c", "d", Verdict.PASS, power=(Power("x", "scaling", "by 1 + size", 0.1),))
    assert Report((passed,)).ok and not Report(()).ok
    assert Report((passed, CheckResult("c", "e", Verdict.INCONCLUSIVE))).ok
    for verdict in (Verdict.FAIL, Verdict.ERROR):
        assert not Report((passed, CheckResult("c", "e", verdict))).ok
    assert not Report((CheckResult("c", "e", Verdict.PASS),)).ok


def test_gradcheck_of_an_output_that_is_rightly_not_finite_is_inconclusive() -> None:
    """The logarithm of a number below 0 is NaN, and NaN has no finite differences."""

    def logarithm(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x)) == 0, -x.abs(), x.abs() + 1).log()

    op = Op(name="logarithm", candidate=logarithm, reference=logarithm, sample=lambda d: {"x": d.normal(9)}, dims=[{}])
    (case,) = op.cases(profile="quick", dtypes=["fp64"], device="cpu")
    result = run_check(check_named(op, case, "gradcheck"), CaseContext(op, case))
    assert result.verdict is Verdict.INCONCLUSIVE and "not finite" in result.reason
