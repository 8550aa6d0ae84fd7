"""Audit a fixed set of cases and write every value, bound and verdict; or compare two such records, field by field.

Use it for changes that must not change behaviour: run it before and after the change, on one machine.

    python benchmarks/record_verdicts.py before.json
    python benchmarks/record_verdicts.py after.json --against before.json

The script runs the command line and reads its JSON, so code may move between the two runs. A record from schema 1 of
that JSON is upgraded before the comparison.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ktonum.results import CheckResult
from ktonum.results.upgrade_schema_1 import upgraded_result

READY = ("rms_norm", "layer_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy")
# Candidates that pass and candidates that fail, under both standards. `growth` is left out for the interpreted kernels,
# because it takes minutes.
AUDITS = (
    *((op, "--candidate", "upcast") for op in READY),
    *((op, "--candidate", "torch", "--standard", "eager") for op in READY),
    ("kto", "--candidate", "torch"),
    ("kto", "--candidate", "torch", "--standard", "eager"),
    ("kto", *(f"--only=::{check}" for check in ("forward", "gradients", "linearity", "strided", "law:", "nonfinite"))),
)
#: Fields that differ from run to run or name lines of code, and the parts of the case's name, which is kept itself.
LEFT_OUT = ("seconds", "details", "parts")
#: Fields that hold words for readers. Their differences are counted apart from those of values, bounds and verdicts.
WORDS = ("question", "text", "reason", "unit", "remark", "where", "looks_like")

Fields = dict[str, Any]


def fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a JSON document, each with its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from fields(inner, f"{path}/{key}")
    elif isinstance(value, list):
        yield f"{path}/length", len(value)
        for index, inner in enumerate(value):
            yield from fields(inner, f"{path}/{index}")
    else:
        yield path, value


def audited(arguments: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Every field of every result of one audit. Its path begins with audit, case and check.

    Raises:
        SystemExit: The command wrote no report.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "ktonum", "audit", *arguments, "--device", "cpu", "--json", str(report)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not report.exists():
            raise SystemExit(f"{' '.join(command)} did not write a report:\n{done.stderr}")
        results = json.loads(report.read_text(encoding="utf-8"))["results"]
    for result in results:
        yield from of_result(result, f"{' '.join(arguments)}/{result['case']}::{result['check']}")


def of_result(result: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """The fields of one result that a record keeps."""
    yield from fields({key: value for key, value in result.items() if key not in LEFT_OUT}, path)


def upgraded(record: Fields) -> Fields:
    """A record of schema 1 or 2 as a record of today's schema."""
    found: Fields = {}
    for audit, results in nested(record).items():
        for name, result in results.items():
            if "cause" not in result:  # schema 1 had none
                result = CheckResult.from_record(upgraded_result(result)).to_record()
            found.update(of_result(result, f"{audit}/{name}"))
    return found


def nested(record: Fields) -> Any:
    """The inverse of `fields`."""
    tree: Fields = {}
    for path, value in record.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return _with_lists(tree)


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    inner = {key: _with_lists(value) for key, value in node.items()}
    return [inner[str(i)] for i in range(inner["length"])] if "length" in inner else inner


def differences(before: Fields, now: Fields) -> Iterator[str]:
    """One line for each field that differs between the two records."""
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, "absent"), now.get(name, "absent")
        if old != new:
            yield f"{name}: {old!r} before, {new!r} now"


def in_words(difference: str) -> bool:
    """Whether a line of `differences` is about words for readers."""
    return difference.partition(": ")[0].rpartition("/")[2] in WORDS


def main() -> int:
    """Write the record. With ``--against``, the exit status is 1 if values, bounds or verdicts differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="the file to write")
    parser.add_argument("--against", type=Path, metavar="FILE", help="a record to compare with")
    options = parser.parse_args()
    record: Fields = {}
    for arguments in AUDITS:
        record.update(audited(arguments))
        sys.stdout.write(f"ktonum audit {' '.join(arguments)}: {len(record)} fields so far\n")
        sys.stdout.flush()
    options.record.write_text(json.dumps(record, indent=0), encoding="utf-8")
    if options.against is None:
        return 0
    before = upgraded(json.loads(options.against.read_text(encoding="utf-8")))
    found = [line for line in differences(before, record) if not in_words(line)]
    words = sum(map(in_words, differences(before, record)))
    sys.stdout.write("".join(f"{line}\n" for line in found[:50]))
    sys.stdout.write(
        f"{len(record)} fields of {len(AUDITS)} audits: {len(found)} values, bounds and verdicts differ, and {words} "
        f"words\n"
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
