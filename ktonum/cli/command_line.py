"""The command line: ``ktonum``.

Commands parse their arguments here. Their work is in other modules, which are imported when they are needed:
``ktonum --help`` loads neither torch nor pytest.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ktonum import __version__
from ktonum.auditing.audit_settings import AuditSettings
from ktonum.cli.audit_command import AuditRequest, audit_command
from ktonum.errors import UsageError
from ktonum.ready_ops import SHIPPED

__all__ = ["app", "main"]

app = typer.Typer(
    help="Numerics audits for GPU kernels: is it right, and would the test have noticed if it were not?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ktonum {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def audit(
    op: Annotated[str, typer.Argument(help=f"{', '.join(SHIPPED)}, module:attr or path/file.py:attr.")] = "kto",
    candidate: Annotated[
        str | None, typer.Option(help="Audit this instead: a name the op knows, module:attr or path/file.py:attr.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16, fp32, fp64, comma-separated [default: all]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    profile: Annotated[str, typer.Option(help="quick or full")] = "quick",
    standard: Annotated[str, typer.Option(help="precise or eager")] = "precise",
    workers: Annotated[
        str, typer.Option("-n", metavar="N", help="Worker processes: 0, 1, 2, ... or auto (by GPUs, else by cores)")
    ] = "auto",
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the report as JSON.")] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write the report as one HTML page.")] = None,
    junit: Annotated[str | None, typer.Option(metavar="FILE", help="Write the report as JUnit XML.")] = None,
    reproductions: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write a script for each failure, at the smallest dims found.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="INCONCLUSIVE verdicts fail.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Only items whose CASE::CHECK contains TEXT; repeatable.")
    ] = None,
    timeout: Annotated[
        str, typer.Option(metavar="SECONDS", help="Time limit of one item in a worker; 0: no limit.")
    ] = "600",
) -> None:
    """Run every check on every case of an op. Exit status 0: all passed; 1: not all; 2: wrong usage."""
    settings = AuditSettings(
        targets=(_op_target(op),),
        candidate=candidate,
        dtypes=dtype,
        device=device,
        profile=profile,
        standard=standard,
        strict=strict,
        only=tuple(only or ()),
        folders=(os.getcwd(),),
        timeout=_seconds(timeout),
    )
    request = AuditRequest(
        settings,
        op=op,
        workers=workers,
        json=json,
        html=html,
        junit=junit,
        reproductions=reproductions,
    )
    raise typer.Exit(audit_command(request))


@app.command()
def calibrate(
    op: Annotated[
        list[str] | None, typer.Argument(help=f"{', '.join(SHIPPED)}, module:attr or path/file.py:attr.")
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="A candidate that is right, as for audit; repeatable [default: the op's own, or upcast]"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16, fp32, fp64, comma-separated [default: all]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    profile: Annotated[str, typer.Option(help="quick or full")] = "quick",
    seeds: Annotated[int, typer.Option(metavar="N", help="Inputs drawn at each point; 0: 36 on a CPU, else 200")] = 0,
    table: Annotated[str, typer.Option(metavar="DIR", help="Where tables are.")] = "tolerance_tables",
    samples: Annotated[
        str, typer.Option(metavar="FILE", help="Samples are kept here for later runs [default: DIR/samples.jsonl]")
    ] = "",
    workers: Annotated[
        str, typer.Option("-n", metavar="N", help="Worker processes: 0, 1, 2, ... or auto (by GPUs, else by cores)")
    ] = "auto",
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why tolerances may grow; kept in the table.")] = "",
    false_alarm: Annotated[
        float, typer.Option(metavar="P", help="Probability that a right result exceeds a tolerance.")
    ] = 1e-6,
    check: Annotated[bool, typer.Option("--check", help="Compare new errors with the tables; write none.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Only cases whose name contains TEXT; repeatable.")
    ] = None,
    timeout: Annotated[
        str, typer.Option(metavar="SECONDS", help="Time limit of one block in a worker; 0: no limit.")
    ] = "600",
) -> None:
    """Measure tolerances on right implementations and write their tables. Exit statuses are those of audit."""
    from ktonum.calibrate.calibration_settings import FIRST_FRESH_SEED, FIRST_SEED, CalibrationSettings
    from ktonum.cli.calibrate_command import CalibrationRequest, calibrate_command

    ops = tuple(op or ("kto",))
    settings = CalibrationSettings(
        targets=tuple(_op_target(name) for name in ops),
        dtypes=dtype,
        device=device,
        profile=profile,
        only=tuple(only or ()),
        folders=(os.getcwd(),),
        timeout=_seconds(timeout),
        candidates=tuple(candidate or ()),
        seeds=seeds,
        first_seed=FIRST_FRESH_SEED if check else FIRST_SEED,
        samples=os.path.abspath(samples or os.path.join(table, "samples.jsonl")),
    )
    request = CalibrationRequest(
        ops,
        settings,
        tables=table,
        workers=workers,
        reason=reason.strip(),
        false_alarm=false_alarm,
        check=check,
    )
    raise typer.Exit(calibrate_command(request))


@app.command()
def bench(
    case: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A case or a group of cases; repeatable [default: all]")
    ] = None,
    contender: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Repeatable [default: every one installed]")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each contender.")] = 8,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the results as JSON.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw time, memory and growth.")] = None,
    show: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Show the results in this JSON instead; repeatable.")
    ] = None,
) -> None:
    """Time, memory and errors of KTO losses on a GPU, compared with the matrix products that every loss needs."""
    import importlib

    command = importlib.import_module("ktonum.kernels.bench.bench_command")
    request = command.BenchmarkRequest(tuple(case or ()), tuple(contender or ()), rounds, json, plot, tuple(show or ()))
    from ktonum.report.environment import describe_environment

    raise typer.Exit(command.benchmark_command(request, describe_environment(_device_type())))


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@app.command()
def gate(
    current: Annotated[
        str, typer.Argument(metavar="CURRENT", help="The audit to decide about, as its --json wrote it.")
    ],
    baseline: Annotated[str, typer.Option(metavar="FILE", help="The audit to compare it with.")],
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write everything that changed as JSON.")] = None,
    false_alarm: Annotated[
        float, typer.Option(metavar="P", help="Probability that a rank test takes chance for growth.")
    ] = 0.01,
    strict: Annotated[
        bool, typer.Option("--strict", help="Growth on a new device fails, and so does a new INCONCLUSIVE.")
    ] = False,
) -> None:
    """Compare an audit with a baseline. Exit status 0: nothing is worse; 1: something is; 2: wrong usage."""
    from ktonum.cli.gate_command import GateRequest, gate_command

    raise typer.Exit(gate_command(GateRequest(current, baseline, json, false_alarm, strict)))


@app.command()
def doctor() -> None:
    """Say what this machine has and lacks for audits. Exit status 1: an audit cannot run here."""
    from ktonum.cli.doctor_command import examine

    raise typer.Exit(examine())


def _op_target(op: str) -> str:
    if op in SHIPPED:
        return SHIPPED[op]
    if ":" not in op:
        near = difflib.get_close_matches(op, SHIPPED, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(
            f"unknown op {op!r}: use one of {', '.join(SHIPPED)}, or name yours as module:attr or "
            f"path/file.py:attr{hint}"
        )
    return op


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds < 1e9:
        raise UsageError(f"invalid --timeout {text!r}: use a number of seconds, e.g. 600, or 0 for no limit")
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: Instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: Always; with status 2 after one line on standard error when the usage was wrong.
    """
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="ktonum", standalone_mode=False)
    except UsageError as error:
        sys.exit(_refuse(str(error)))
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        # The parser's own errors: an unknown option, a missing value. Its class has moved between typer's versions.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        message = describe()
        if not message:  # no_args_is_help has printed the help
            sys.exit(2)
        sys.exit(_refuse(f"{message.rstrip('.')}; see ktonum --help"))
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str) -> int:
    line = " ".join(message.split())
    typer.echo(f"ktonum: {line}", err=True)
    return 2
