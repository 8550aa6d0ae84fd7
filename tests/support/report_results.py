"""Results as an audit gives them, and what a terminal shows of them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from types import MappingProxyType

from rich.console import Console

from ktonum.declare.cases import Case, Point
from ktonum.report.terminal import print_summary
from ktonum.results import (
    BoundKind,
    BoundSource,
    CheckResult,
    Measurement,
    Power,
    Report,
    Verdict,
)

ANALYSIS = BoundSource(BoundKind.DERIVED, "precise")


def result(
    verdict: Verdict = Verdict.PASS,
    *,
    check: str = "forward",
    dtype: str = "bf16",
    dims: Mapping[str, int] = MappingProxyType({"B": 3, "T": 65}),
    value: float = 0.25,
    power: float | None = 3e-5,
    reason: str = "",
    details: str = "",
    meets: tuple[str, ...] = ("precise", "eager"),
) -> CheckResult:
    undecided = verdict in (Verdict.ERROR, Verdict.INCONCLUSIVE)
    case = Case("kto", Point(dims), dtype, "cpu")
    return CheckResult(
        case.name,
        check,
        verdict,
        () if undecided else (Measurement("loss", "relative_norm", value, 0.5, "1", ANALYSIS, (3, 17)),),
        ()
        if undecided
        else (Power("loss", "scaling", "by 1 + size", power), Power("loss", "one element", "off by size", power)),
        reason=reason,
        details=details,
        meets=() if undecided else meets,
        parts=case.parts,
    )


MANY = {f"B{i}": 3 for i in range(30)}


def text_of(*results: CheckResult, width: int = 120, planned: int | None = None, strict: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_summary(
        console,
        Report(results),
        standard="precise",
        planned=planned,
        strict=strict,
        command="ktonum audit kto",
        seconds=1.25,
    )
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


FAIL = result(Verdict.FAIL, value=325.0, meets=("eager",))
