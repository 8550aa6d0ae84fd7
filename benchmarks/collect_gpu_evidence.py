"""Runs everything that needs a GPU: tests, audits, published candidates, benchmarks, tolerances.

Run it from a checkout on a machine with a CUDA device. ktonum need not be installed, but its requirements must be::

    python benchmarks/collect_gpu_evidence.py [--out FOLDER] [--only NAME ...] [--liger-checkout PATH]

Each stage writes a log to the folder, by default ``gpu_evidence``; an audit also writes its JSON report. The folder's
``README.md`` states device, versions, commit and date, the exit status and the time of each stage, and the errors at
production size. A folder whose ``README.md`` has another origin, such as ``benchmarks/results``, is refused.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout that this file is in, whether ktonum is installed or not

from ktonum.errors import UsageError  # noqa: E402
from ktonum.report.environment import describe_environment  # noqa: E402
from ktonum.results import CheckResult, Report  # noqa: E402
from subjects.op_defects import OPS  # noqa: E402

#: The line by which this script knows a page that it wrote.
COLLECTED = "Collected by `python benchmarks/collect_gpu_evidence.py`."


@dataclass(frozen=True)
class Stage:
    """One command. ``report`` is the file name of its JSON report, or empty."""

    name: str
    command: list[str]
    report: str = ""


@dataclass(frozen=True)
class Outcome:
    """Exit status and time of a stage."""

    stage: Stage
    status: int
    seconds: float


def stages(out: Path, liger_checkout: str | None) -> list[Stage]:
    """All stages. The first ones are cheap and tell most."""

    def audit(name: str, *arguments: str) -> Stage:
        report = f"{name}.json"
        command = [sys.executable, "-m", "ktonum", "audit", "--device", "cuda", "--json", str(out / report), *arguments]
        return Stage(name, command, report)

    calibrate = [sys.executable, "-m", "ktonum", "calibrate", "--device", "cuda", "--table", "tolerance_tables"]
    tests = [str(p) for p in sorted((ROOT / "tests").rglob("test_kernels_*.py"))]
    listed = [
        audit("audit-quick"),
        audit("audit-full-bf16", "--profile", "full", "--dtype", "bf16", "--only", "V=151936"),
        Stage(
            "kernel-tests",
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "8", "-m", "", *tests],
        ),
        audit("audit-full", "--profile", "full"),
        audit("candidate-liger", "--candidate", "liger", "--profile", "full", "--dtype", "bf16"),
        audit("candidate-trl", "--candidate", "trl", "--profile", "full", "--dtype", "bf16"),
        *(audit(f"{op}-{c}", op, "--candidate", c, "--profile", "full") for op in OPS for c in ("torch", "liger")),
        Stage("bench", [sys.executable, "-m", "ktonum", "bench", "--json", str(out / "bench.json")]),
        Stage("tolerances", [*calibrate, "kto", *OPS]),
    ]
    if liger_checkout is not None:
        script = str(ROOT / "benchmarks/run_liger_tests.py")
        command = [sys.executable, script, "--checkout", liger_checkout, "--device", "cuda"]
        listed.append(Stage("liger-own-tests", command))
    return listed


def run(stage: Stage, out: Path) -> Outcome:
    """Run a stage. Its output goes to a log, and the last lines also to the terminal."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    started = time.perf_counter()
    with (out / f"{stage.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.run(stage.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - started
    closing = (out / f"{stage.name}.log").read_text(encoding="utf-8").rstrip().splitlines()[-3:]
    sys.stdout.write(
        f"{stage.name}: exit {process.returncode}, {seconds:.0f} s\n" + "".join(f"    {line}\n" for line in closing)
    )
    sys.stdout.flush()
    return Outcome(stage, process.returncode, seconds)


def production_rows(results: tuple[CheckResult, ...]) -> list[str]:
    """Errors at production size: each tensor's relative norm and bias, beside its bound."""
    rows = []
    for result in results:
        if result.parts.dims.get("V") == 151_936 and result.check in ("forward", "gradients"):
            for m in result.measurements:
                if (m.tensor == "loss" or m.tensor.startswith("grad_")) and m.measure != "element":
                    rows.append(
                        f"| {result.case} | {m.name} | {m.value:.2e} | {m.bound:.2e} | {result.verdict.value} |"
                    )
    return rows


def summary(outcomes: list[Outcome], out: Path) -> str:
    """The folder's README."""
    environment = describe_environment("cuda")
    device = environment["device"]
    lines = [
        "# What was measured on GPUs",
        "",
        f"{environment['date']}, {device['name']} ({device['capability']}, {device['count']} of them), commit "
        f"{environment['commit']}; " + ", ".join(f"{k} {v}" for k, v in environment["packages"].items()) + ".",
        "",
        COLLECTED,
        "",
        "| stage | exit status | seconds |",
        "|---|---|---|",
        *(f"| {o.stage.name} | {o.status} | {o.seconds:.0f} |" for o in outcomes),
    ]
    for outcome in outcomes:
        path = out / outcome.stage.report
        if outcome.stage.report and path.is_file():
            rows = production_rows(Report.from_json(path).results)
            if rows:
                lines += ["", f"## {outcome.stage.name}", "", "| case | measure | value | bound | verdict |"]
                lines += ["|---|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def holds_another_page(out: Path) -> bool:
    """Whether the folder has a ``README.md`` that this script did not write and would replace."""
    page = out / "README.md"
    return page.exists() and COLLECTED not in page.read_text(encoding="utf-8")


def main() -> int:
    """Run the stages. The exit status is 1 if a stage failed; published candidates may fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_evidence"), help="folder to write to [gpu_evidence]")
    parser.add_argument("--only", nargs="*", help="names of stages (default: all)")
    parser.add_argument("--liger-checkout", help="a Liger-Kernel checkout, to run its own KTO tests")
    arguments = parser.parse_args()
    # Stages run in the repository's root, wherever this script was started.
    arguments.out = arguments.out.absolute()
    if holds_another_page(arguments.out):
        sys.stderr.write(
            f"{arguments.out / 'README.md'} was not written by this script: pass another folder as --out\n"
        )
        return 2

    import torch

    if not torch.cuda.is_available():
        sys.stderr.write("no CUDA device found: run this on a machine with one; `ktonum doctor` says what is missing\n")
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    listed = stages(arguments.out, arguments.liger_checkout)
    unknown = set(arguments.only or ()) - {s.name for s in listed}
    if unknown:
        raise UsageError(f"unknown stage {', '.join(sorted(unknown))}: use {', '.join(s.name for s in listed)}")
    outcomes = []
    for stage in listed:
        if not arguments.only or stage.name in arguments.only:
            outcomes.append(run(stage, arguments.out))
            # After every stage, so that a run that is cut off leaves what it measured.
            (arguments.out / "README.md").write_text(summary(outcomes, arguments.out), encoding="utf-8")
    return int(any(o.status for o in outcomes if not o.stage.name.startswith("candidate-")))


if __name__ == "__main__":
    sys.exit(main())
