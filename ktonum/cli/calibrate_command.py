"""``ktonum calibrate``: measure what was asked for, and write the tables or hold the errors against them."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktonum.auditing.plan import AuditPlan, AuditSettings, make_plan
from ktonum.errors import TableError, UsageError
from ktonum.results import CheckResult, Verdict

if TYPE_CHECKING:
    from rich.console import Console

    from ktonum.calibrate.seed_blocks import Block
    from ktonum.calibrate.table_rows import Pool
    from ktonum.declare.op import Op
    from ktonum.tolerances.tables import Table

__all__ = ["CalibrationRequest", "calibrate_command"]

# Inputs at each point and dtype: what Triton's interpreter manages for kto in minutes, and a GPU in about as long.
_SEEDS = {"cpu": 36, "cuda": 200}


@dataclass(frozen=True)
class CalibrationRequest:
    """A command line of ``ktonum calibrate``.

    Attributes:
        ops: The ops as the user called them.
        settings: What to measure; ``seeds`` may be 0 for as many as the device is worth, ``samples`` empty for a file
            beside the tables.
        tables: The directory that tables are written to.
        workers: ``auto`` or a number.
        reason: Why tolerances may grow; empty where they may not.
        false_alarm: The budget of one tolerance.
        check: Hold the errors against the tables and write none.
        timeout: Seconds a worker may take over a block; 0 for no limit.
    """

    ops: tuple[str, ...]
    settings: AuditSettings
    tables: str = "tolerance_tables"
    workers: str = "auto"
    reason: str = ""
    false_alarm: float = 1e-6
    check: bool = False
    timeout: float = 600.0

    def checked(self, device: str) -> CalibrationRequest:
        """The request with what was left open filled in.

        Raises:
            UsageError: Something is none of what is accepted.
        """
        from ktonum.calibrate.seed_blocks import FIRST_FRESH_SEED, FIRST_SEED

        self.settings.check()
        if self.settings.seeds < 0:
            raise UsageError(f"--seeds is {self.settings.seeds}: draw one or more")
        if self.workers != "auto" and not self.workers.isdecimal():
            raise UsageError(f"-n {self.workers!r} is no number of workers: use auto, 0 for this process, or 1, 2, ...")
        if not 0 < self.false_alarm < 0.1:
            raise UsageError(f"--false-alarm is {self.false_alarm:g}: use a probability below 0.1, e.g. 1e-6")
        folder = Path(self.tables)
        if not folder.is_dir():
            raise UsageError(f"--table {self.tables} is no directory: make it, or name one that tables may be kept in")
        samples = Path(self.settings.samples or folder / "samples.jsonl").absolute()
        if not samples.parent.is_dir():
            raise UsageError(f"--samples {samples}: there is no folder {samples.parent}; create it first")
        seeds = self.settings.seeds or _SEEDS[device]
        first = FIRST_FRESH_SEED if self.check else FIRST_SEED
        return replace(self, settings=replace(self.settings, seeds=seeds, first_seed=first, samples=str(samples)))


def calibrate_command(request: CalibrationRequest) -> int:
    """Measure errors and write tables, or check them.

    Returns:
        The exit status: 0 when every table was written, or every error was within its tolerance; 1 when not; 130 when
        it was interrupted.

    Raises:
        UsageError: Something was asked for that cannot be done; nothing was run.
    """
    from ktonum.auditing.gpu_slots import visible_gpus
    from ktonum.auditing.worker_process import resolve_device_kind

    started = time.monotonic()
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)  # before xdist is imported, which then takes sys.path for its workers
    device = resolve_device_kind(request.settings.device)
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels
    request = request.checked(device)
    plan = make_plan(request.settings, device, (Path(folder),))
    for op in plan.ops:
        _read_table(op, request.tables)  # a damaged one is no news for after the measuring

    from ktonum.auditing.pytest_session import run_session, worker_count
    from ktonum.calibrate.progress import SamplingView
    from ktonum.report.environment import describe_environment
    from ktonum.report.terminal import make_console

    console = make_console()
    gpus = len(visible_gpus()) if device == "cuda" else 0
    workers = worker_count(request.workers, plan, gpus, "quick")
    console.print(_headline(request, plan, workers), markup=False, soft_wrap=True)
    failed: list[CheckResult] = []
    with SamplingView(console, len(plan.items)) as view:

        def on_result(result: CheckResult) -> None:
            view.show(result)
            if result.verdict is not Verdict.INCONCLUSIVE:
                failed.append(result)

        outcome = run_session(
            request.settings, plan, workers=workers, junit=None, timeout=request.timeout, on_result=on_result
        )
    if outcome.interrupted:
        console.print(f"Interrupted; {request.settings.samples} keeps what was measured.", markup=False)
        return 130
    # An error beyond its bound has samples, and its table is refused below; other failures have none.
    if any(result.verdict is Verdict.ERROR for result in failed):
        console.print("Not everything was measured; no table was written.", markup=False)
        return 1
    # Only now that the workers are gone, for it initialises CUDA in this process; and before a table is written, which
    # would make the checkout one with changes.
    environment = describe_environment(device)
    done = [_finish(_Finished(request, plan, op, environment, console)) for op in plan.ops]
    console.print(f"{time.monotonic() - started:.0f} s.", markup=False)
    return 0 if all(done) else 1


@dataclass(frozen=True)
class _Finished:
    """An op whose blocks are all measured."""

    request: CalibrationRequest
    plan: AuditPlan
    op: Op
    environment: Mapping[str, Any]
    console: Console

    @cached_property
    def blocks(self) -> list[Block]:
        """The op's blocks; by name, for with another candidate it is another op."""
        from ktonum.calibrate.block_items import BlockWork

        works = [item.work for item in self.plan.items if isinstance(item.work, BlockWork)]
        return [work.block for work in works if work.block.op.name == self.op.name]

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
    """Write or check the table of one op; whether that could be done."""
    beyond = [text for pool in done.pools.values() for text in pool.beyond]
    if beyond:
        done.say(f"{done.op.name}: errors beyond the derived bound, no basis for a tolerance", *beyond)
    elif not done.pools:
        done.say(f"{done.op.name}: nothing to measure: every output is zero or may cancel to nothing")
    else:
        return _check(done) if done.request.check else _write(done)
    return False


def _write(done: _Finished) -> bool:
    from ktonum.calibrate.provenance import provenance_of
    from ktonum.calibrate.seed_blocks import Wanted
    from ktonum.calibrate.table_revision import revise_rows
    from ktonum.calibrate.table_rows import RULE, row_of
    from ktonum.declare.cases import parse_dtypes
    from ktonum.tolerances.assertion import device_class
    from ktonum.tolerances.table_files import write_table
    from ktonum.tolerances.tables import Table

    request, op, device = done.request, done.op, done.plan.device
    settings, kind = request.settings, device_class(device)
    dtypes = parse_dtypes(settings.dtypes)
    wanted = Wanted(settings.candidates, settings.profile, dtypes, device, settings.first_seed, settings.seeds)
    made = provenance_of(
        op,
        wanted,
        done.blocks,
        environment=done.environment,
        command=_command(request),
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
        heading = f"{op.name}: no table written, for tolerances would grow; give a --reason to keep in the table"
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
        f"{done.op.name}: {rows} rows held, {len(held) - rows} derived bounds for want of a row; {beyond} beyond"
        + (f"; all rows {carried}" if carried else "")
    )
    return not beyond


def _read_table(op: Op, folder: str) -> Table | None:
    """The op's table in the folder as it is before this run; not a shipped one, which another op's name may equal."""
    from ktonum.tolerances.table_files import load_table

    file = Path(folder) / f"{op.name}.toml"
    try:
        return load_table(file) if file.exists() else None
    except TableError as error:
        raise UsageError(f"{error}; mend or remove the file") from error


def _headline(request: CalibrationRequest, plan: AuditPlan, workers: int) -> str:
    from ktonum import __version__

    settings = request.settings
    spread = f"{workers} worker{'s' * (workers != 1)}" if workers else "this process"
    return (
        f"ktonum {__version__}: calibrating {', '.join(request.ops)} on {plan.device} ({spread}); profile "
        f"{settings.profile}, {settings.seeds} seeds a point: {len(plan.items)} blocks; samples in {settings.samples}"
    )


def _command(request: CalibrationRequest) -> str:
    """The command line, without files and what they are called."""
    settings = request.settings
    words = ["ktonum", "calibrate", *request.ops]
    for option, value, usual in (
        ("--dtype", settings.dtypes, None),
        ("--device", settings.device, "auto"),
        ("--profile", settings.profile, "quick"),
        ("--seeds", settings.seeds, None),
        ("--false-alarm", request.false_alarm, 1e-6),
        ("--reason", request.reason, ""),
    ):
        if value != usual:
            words += [option, str(value)]
    for option, values in (("--candidate", settings.candidates), ("--only", settings.only)):
        for value in values:
            words += [option, value]
    return shlex.join(words)
