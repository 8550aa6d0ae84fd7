"""Measures an op's errors on fresh inputs and writes its tolerance table.

    python benchmarks/measure_tolerances.py                       # kto in Triton's interpreter, on a CPU: long
    python benchmarks/measure_tolerances.py --device cuda         # the same on a GPU: replaces that device class's rows

Every tensor of every point of the op's profile, in every dtype, is measured on ``--seeds`` inputs drawn for this
purpose alone: no audit sees them. A row's tolerance is twice the largest error measured, or the largest bound derived
by the op's own rounding-error analysis, whichever is smaller. An error beyond its own derived bound is no basis for a
tolerance: nothing is written then, and the exit status is 1; it is 2 for a wrong argument.

The factor of two stands for inputs not drawn; it carries no stated probability. Outputs that may cancel to nothing have
no row: relative to themselves their errors have no upper limit, and their terms are known to the audit alone.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ktonum.cases import PROFILES, Case, dtype_name, parse_dtypes
from ktonum.context import CaseContext
from ktonum.environment import describe_environment
from ktonum.errors import KtonumError, UsageError
from ktonum.op import Op, load_object
from ktonum.rounding_errors import derived_tolerances, measure_errors
from ktonum.table_files import load_table, write_table
from ktonum.tables import MEASURES, Provenance, Row, Table
from ktonum.tolerances import device_class

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {"kto": "ktonum.kernels.kto_op:OP"}
#: Sums over a batch that may come out near zero, by op.
CANCELLING = {
    "kto": ("chosen_logits_sum", "rejected_logits_sum", "chosen_rewards_sum", "rejected_rewards_sum"),
}
FACTOR = 2.0
RULE = (
    f"tolerance = min(bound, {FACTOR:g} x maximum); maximum: the largest error measured on fresh inputs over all "
    "points of the profile; bound: the largest that the op's rounding-error analysis derives for them; outputs that "
    "may cancel to zero have no row"
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--op", default="kto", help=f"{', '.join(SHIPPED)}, module:attr or path/file.py:attr [kto]")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--profile", default="quick", choices=PROFILES)
    parser.add_argument("--dtypes", help="comma-separated, of bf16, fp16, fp32, fp64 [all]; the others lose their rows")
    parser.add_argument("--seeds", type=int, default=40, help="inputs drawn at each point and dtype [40]")
    parser.add_argument("--out", type=Path, default=ROOT / "tolerance_tables", help="directory [tolerance_tables]")
    parsed = parser.parse_args(arguments)
    if parsed.seeds < 1:
        parser.error(f"--seeds is {parsed.seeds}: draw one or more")
    if not parsed.out.is_dir():
        parser.error(f"--out {parsed.out} is no directory: make it first")
    return parsed


@dataclass(frozen=True)
class FreshCase(Case):
    """A case whose name, and with it every draw, is that of one replica; the audit's own has none."""

    replica: int = 0

    @property
    def name(self) -> str:
        return f"{super().name}#tolerance-{self.replica}"


@dataclass
class Sample:
    """Errors of one output in one measure and dtype, the bounds derived for them, and the tensors' sizes."""

    stored: str
    errors: list[float]
    bounds: list[float]
    sizes: list[int]

    def row(self, output: str, measure: str, dtype: str, device: str) -> Row:
        # Four digits, so that a new measurement changes what it changed and no more.
        errors = sorted(rounded(e) for e in self.errors)
        bound = max(rounded(b) for b in self.bounds)
        return Row(
            output=output,
            measure=measure,
            dtype=dtype,
            device_class=device,
            stored=self.stored,
            unit=MEASURES[measure],
            tolerance=min(bound, FACTOR * errors[-1]),
            bound=bound,
            maximum=errors[-1],
            quantile_99=errors[math.ceil(0.99 * len(errors)) - 1],
            median=errors[(len(errors) - 1) // 2],
            samples=len(errors),
            elements_min=min(self.sizes),
            elements_max=max(self.sizes),
        )


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def measure(op: Op, cases: Sequence[Case], seeds: int) -> dict[tuple[str, str, str], Sample]:
    """Samples by (output, measure, dtype).

    Raises:
        KtonumError: The candidate raised, or is beyond a bound of its own.
    """
    samples: dict[tuple[str, str, str], Sample] = {}
    failures = []
    for case in cases:
        for replica in range(1, seeds + 1):
            context = CaseContext(op, FreshCase(case.op, case.point, case.dtype, case.device, replica))
            actual, bounds = context.result.tensors(), context.bounds("precise")
            for output, expected in context.expected().items():
                # What is exactly zero (the metrics of a side without examples) says nothing of rounding.
                if output in CANCELLING.get(op.name, ()) or not bool((expected.isfinite() & (expected != 0)).any()):
                    continue
                bound = bounds[output]
                errors = measure_errors(actual=actual[output], expected=expected, stored=bound.dtype)
                granted = derived_tolerances(
                    expected=expected,
                    stored=bound.dtype,
                    model=lambda s, b=bound: (s.of(b.independent), s.of(b.coherent)),  # type: ignore[misc]
                )
                for name, error in errors.values.items():
                    sample = samples.setdefault((output, name, case.dtype), Sample(dtype_name(bound.dtype), [], [], []))
                    sample.errors.append(error)
                    sample.bounds.append(granted[name])
                    sample.sizes.append(expected.numel())
                    if not error <= granted[name]:
                        failures.append(f"{context.case.name}: {output}/{name} {error:g} > {granted[name]:g}")
        sys.stdout.write(f"measured {case.name}\n")
    if failures:
        raise KtonumError("errors beyond the derived bound, no table written; audit the op:\n" + "\n".join(failures))
    return samples


def provenance(options: argparse.Namespace, cases: Sequence[Case]) -> Provenance:
    environment = describe_environment(options.device)
    packages, device = environment["packages"], environment["device"]
    dims: dict[str, int] = defaultdict(int)
    for case in cases:
        for name, size in case.point.dims.items():
            dims[name] = max(dims[name], size)
    words = [
        "--op",
        options.op,
        "--device",
        options.device,
        "--profile",
        options.profile,
        "--seeds",
        str(options.seeds),
    ]
    if options.dtypes:
        words += ["--dtypes", options.dtypes]
    return Provenance(
        device=device["name"],
        ktonum=environment["ktonum"] or "",
        python=environment["python"],
        torch=packages["torch"],
        triton=packages.get("triton", ""),
        cuda=device.get("cuda") or "",
        driver=driver() if options.device == "cuda" else "",
        commit=environment["commit"] or "",
        date=environment["date"],
        command=f"python benchmarks/measure_tolerances.py {shlex.join(words)}",
        profile=options.profile,
        seeds=options.seeds,
        dims=dict(dims),
    )


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cpu":
        # Triton reads it when a kernel is defined, which is when the op's candidate is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        op = load_object(SHIPPED.get(options.op, options.op))
        if not isinstance(op, Op):
            raise UsageError(f"--op {options.op!r} is a {type(op).__name__}: name a ktonum.Op")
        cases = op.cases(profile=options.profile, dtypes=parse_dtypes(options.dtypes), device=options.device)
        samples = measure(op, cases, options.seeds)
        kind = device_class(options.device)
        file = options.out / f"{op.name}.toml"
        table = load_table(file) if file.exists() else Table(op.name, RULE, (), {})
        rows = [row for row in table.rows if row.device_class != kind]
        rows += [sample.row(output, name, dtype, kind) for (output, name, dtype), sample in samples.items()]
        made = {**table.provenance, kind: provenance(options, cases)}
        write_table(replace(table, rule=RULE, rows=tuple(rows), provenance=made), file)
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KtonumError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{len(samples)} rows for {kind} written to {file}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
