"""``ktonum calibrate``: measure errors, then write the tables or compare the errors with them."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktonum.auditing.audit_process import AuditProcess
from ktonum.auditing.plan import Plan
from ktonum.calibrate.calibration_settings import CalibrationSettings
from ktonum.cli.option_checks import check_file, check_workers
from ktonum.errors import TableError, UsageError
from ktonum.results import CheckResult, Verdict

if TYPE_CHECKING:
    from rich.console import Console

    from ktonum.calibrate.planned_block import PlannedBlock
    from ktonum.calibrate.seed_blocks import Block
    from ktonum.calibrate.table_rows import Pool
    from ktonum.declare.op import Op
    from ktonum.tolerances.tables import Table

__all__ = ["CalibrationRequest", "calibrate_command"]


@dataclass(frozen=True)
class CalibrationRequest:
    """A command line of ``ktonum calibrate``.

    Attributes:
        ops: The ops as the user called them.
        settings: What to measure.
        tables: The directory that tables are written to.
        workers: ``auto`` or a number.
        reason: Why tolerances may grow; empty where they may not.
        false_alarm: The probability that a right result exceeds a tolerance.
        check: Compare the errors with the tables and write none.
    """

    ops: tuple[str, ...]
    settings: CalibrationSettings
    tables: str = "tolerance_tables"
    workers: str = "auto"
    reason: str = ""
    false_alarm: float = 1e-6
    check: bool = False

    def check_options(self) -> None:
        """Check what can be checked without running anything.

        Raises:
            UsageError: An option is not among those accepted, or a folder is missing.
        """
        self.settings.check()
        check_workers(self.workers)
        if not 0 < self.false_alarm < 0.1:
            raise UsageError(f"invalid --false-alarm {self.false_alarm:g}: use a probability below 0.1, e.g. 1e-6")
        if not Path(self.tables).is_dir():
            raise UsageError(f"--table {self.tables} is not a directory: create it, or name one that exists")
        check_file("--samples", Path(self.settings.samples))


def calibrate_command(request: CalibrationRequest) -> int:
    """Measure errors and write tables, or check them.

    Returns:
        The exit status: 0 when every table was written, or every error was within its tolerance; 1 when not; 130 when
        it was interrupted.

    Raises:
        UsageError: The request cannot be carried out; nothing was run.
    """
    started = time.monotonic()
    request.check_options()
    with AuditProcess.begin(request.settings.device, import_from=os.getcwd()) as process:
        plan = request.settings.make_plan(process.device)
        for op in plan.ops:
            _read_table(op, request.tables)  # a damaged one is reported before the measuring, not after it

        from ktonum.auditing.pytest_session import run_session, worker_count
        from ktonum.calibrate.progress import SamplingView
        from ktonum.report.environment import describe_environment
        from ktonum.report.terminal import make_console

        console = make_console()
        workers = worker_count(request.workers, plan, len(process.gpus), "quick")
        console.print(_headline(request, plan, workers), markup=False, soft_wrap=True)
        failed: list[CheckResult] = []
        with SamplingView(console, len(plan.items)) as view:

            def on_result(result: CheckResult) -> None:
                view.show(result)
                if result.verdict is not Verdict.INCONCLUSIVE:
                    failed.append(result)

            outcome = run_session(request.settings, plan, process, workers=workers, on_result=on_result)
    if outcome.interrupted:
        console.print(f"Interrupted; {request.settings.samples} keeps what was measured.", markup=False)
        return 130
    # An error beyond its bound has samples, and its table is refused below; other failures have none.
    if any(result.verdict is Verdict.ERROR for result in failed):
        console.print("Not everything was measured; no table was written.", markup=False)
        return 1
    # Not before the workers have ended, because this initialises CUDA in this process; and before a table is written,
    # because git would then report changes.
    environment = describe_environment(plan.device)
    done = [_finish(_Finished(request, plan, op, environment, console)) for op in plan.ops]
    console.print(f"{time.monotonic() - started:.0f} s.", markup=False)
    return 0 if all(done) else 1


@dataclass(frozen=True)
class _Finished:
    """An op whose blocks are all measured."""

    request: CalibrationRequest
    plan: Plan[PlannedBlock]
    op: Op
    environment: Mapping[str, Any]
    console: Console

    @cached_property
    def blocks(self) -> list[Block]:
        """The op's blocks; found by name, because an op with another candidate is another object."""
        return [item.block for item in self.plan.items if item.block.op.name == self.op.name]

    @cached_property
    def pools(self) -> dict[tuple[str, str, str], Pool]:
        """Their samples."""
        from ktonum.calibrate.samples_file import read_samples
        from ktonum.calibrate.table_rows import pool_samples

        kept = read_samples(Path(self.request.settings.samples))
        return pool_samples((block, kept[block.name][1]) for block in self.blocks)

    def say(self, heading: str, *lines: str) -> None:
        """Print a line, and others below it."""
        self.console.print("\n  ".join([heading, *lines]), markup=False, soft_wrap=True)


def _finish(done: _Finished) -> bool:
    """Write or check the table of one op. Returns whether that succeeded."""
    beyond = [text for pool in done.pools.values() for text in pool.beyond]
    if beyond:
        done.say(f"{done.op.name}: errors beyond the derived bound, which are no basis for a tolerance", *beyond)
    elif not done.pools:
        done.say(f"{done.op.name}: no tolerance to calibrate: every output is exactly zero or declared `cancelling`")
    else:
        return _check(done) if done.request.check else _write(done)
    return False


def _write(done: _Finished) -> bool:
    from ktonum.calibrate.provenance import provenance_of
    from ktonum.calibrate.table_revision import revise_rows
    from ktonum.calibrate.table_rows import RULE, row_of
    from ktonum.tolerances.assertion import device_class
    from ktonum.tolerances.table_files import write_table
    from ktonum.tolerances.tables import Table

    request, op, device = done.request, done.op, done.plan.device
    wanted, kind = request.settings.wanted(device), device_class(device)
    made = provenance_of(
        op,
        wanted,
        done.blocks,
        environment=done.environment,
        command=_command(request, wanted.seeds),
        false_alarm=request.false_alarm,
    )
    measured = [
        row_of(key, pool, device=device, device_class=kind, false_alarm=request.false_alarm)
        for key, pool in sorted(done.pools.items())
    ]
    table = _read_table(op, request.tables)
    revision = revise_rows(table, measured, device_class=kind, reason=request.reason, date=made.date)
    for line in revision.tightened:
        done.say(f"looser than the data need: {line}")
    if revision.loosened and not request.reason:
        heading = f"{op.name}: no table written, because tolerances would grow; give a --reason, which the table keeps"
        done.say(heading, *revision.loosened)
        return False
    for line in revision.loosened:
        done.say(f"loosened: {line}")
    others = tuple(row for row in (table.rows if table else ()) if row.device_class != kind)
    provenance = {**(table.provenance if table else {}), kind: made}
    file = Path(request.tables) / f"{op.name}.toml"
    write_table(Table(op.name, RULE, (*others, *revision.rows), provenance), file)
    bounds = sum(row.errors.decided_by.startswith("bound") for row in measured)
    words = f"{len(measured) - bounds} tolerances by a fitted tail, {bounds} by the bound alone"
    done.say(f"Written: {file}: {len(measured)} rows for {kind}, {words}")
    return True


def _check(done: _Finished) -> bool:
    from ktonum.calibrate.against_table import hold_against_rows
    from ktonum.tolerances.assertion import device_class

    name, kind = done.environment["device"]["name"], device_class(done.plan.device)
    table = _read_table(done.op, done.request.tables)
    held = hold_against_rows(done.pools, table, device_class=kind, device=name)
    for one in held:
        done.say(one.said)
    beyond = sum(not one.within for one in held)
    rows = sum(one.measured for one in held)
    carried = table.carried_over(kind, name) if table is not None and rows else ""
    done.say(
        f"{done.op.name}: {rows} compared with a row, {len(held) - rows} with the derived bound; {beyond} beyond"
        + (f"; all rows {carried}" if carried else "")
    )
    return not beyond


def _read_table(op: Op, folder: str) -> Table | None:
    """The op's table in the folder. Not a shipped table: another op may have the same name."""
    from ktonum.tolerances.table_files import load_table

    file = Path(folder) / f"{op.name}.toml"
    try:
        return load_table(file) if file.exists() else None
    except TableError as error:
        raise UsageError(f"{error}; correct or remove the file") from error


def _headline(request: CalibrationRequest, plan: Plan[PlannedBlock], workers: int) -> str:
    from ktonum import __version__

    settings = request.settings
    spread = f"{workers} worker{'s' * (workers != 1)}" if workers else "this process"
    return (
        f"ktonum {__version__}: calibrating {', '.join(request.ops)} on {plan.device} ({spread}); profile "
        f"{settings.profile}, {settings.wanted(plan.device).seeds} seeds a point: {len(plan.items)} blocks; samples in "
        f"{settings.samples}"
    )


def _command(request: CalibrationRequest, seeds: int) -> str:
    """The command line without the names of files."""
    settings = request.settings
    words = ["ktonum", "calibrate", *request.ops]
    for option, value, usual in (
        ("--dtype", settings.dtypes, None),
        ("--device", settings.device, "auto"),
        ("--profile", settings.profile, "quick"),
        ("--seeds", seeds, None),
        ("--false-alarm", request.false_alarm, 1e-6),
        ("--reason", request.reason, ""),
    ):
        if value != usual:
            words += [option, str(value)]
    for option, values in (("--candidate", settings.candidates), ("--only", settings.only)):
        for value in values:
            words += [option, value]
    return shlex.join(words)
