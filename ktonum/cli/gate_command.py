"""``ktonum gate``: read two audits, compare them, and print the decision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ktonum.cli.option_checks import check_file
from ktonum.errors import UsageError
from ktonum.gate.decision import hold_against
from ktonum.gate.decision_report import print_gate, write_json
from ktonum.gate.report_reading import read_report
from ktonum.report.terminal import make_console

__all__ = ["GateRequest", "gate_command"]


@dataclass(frozen=True)
class GateRequest:
    """A command line of ``ktonum gate``.

    Attributes:
        current, baseline: Files that ``ktonum audit --json`` wrote.
        json: A file to write; None for none.
        false_alarm: See `ktonum.gate.grown_errors`.
        strict: Whether growth on a new device fails, and a check that became INCONCLUSIVE.
    """

    current: str
    baseline: str
    json: str | None
    false_alarm: float
    strict: bool


def gate_command(request: GateRequest) -> int:
    """Compare one audit with the other and print the decision.

    Returns:
        The exit status: 0 when nothing is worse than in the baseline, else 1.

    Raises:
        UsageError: A file is not an audit's JSON, the two cannot be compared, or an option is not among those accepted.
    """
    if not 0 < request.false_alarm < 1:
        raise UsageError(f"invalid --false-alarm {request.false_alarm:g}: use a number between 0 and 1, e.g. 0.01")
    if request.json is not None:
        check_file("--json", Path(request.json))
    baseline = read_report(request.baseline, "--baseline")
    current = read_report(request.current, "CURRENT")
    gate = hold_against(baseline=baseline, current=current, false_alarm=request.false_alarm, strict=request.strict)
    console = make_console()
    print_gate(console, gate)
    if request.json is not None:
        write_json(gate, request.json)
        console.print(f"Written: {request.json}", markup=False, soft_wrap=True)
    return 0 if gate.passed else 1
