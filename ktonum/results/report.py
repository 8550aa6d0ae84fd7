"""All results of one audit, and the JSON file that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktonum.errors import InputError
from ktonum.results import schema_1
from ktonum.results.check_result import CheckResult, Verdict
from ktonum.results.records import from_record, to_record

__all__ = ["SCHEMA", "Report"]

#: What `Report.to_json` writes; `Report.from_json` also reads `ktonum.results.schema_1`.
SCHEMA = "ktonum-report/2"


@dataclass(frozen=True)
class Report:
    """All results of one audit, with the environment they were measured in."""

    results: tuple[CheckResult, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when nothing failed; INCONCLUSIVE results do not fail. An empty report is not ok."""
        return bool(self.results) and not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """FAIL, ERROR and vacuous results."""
        return tuple(r for r in self.results if r.failed)

    @property
    def inconclusive(self) -> tuple[CheckResult, ...]:
        """Results whose check could not tell."""
        return tuple(r for r in self.results if r.verdict is Verdict.INCONCLUSIVE)

    def counts(self) -> dict[str, int]:
        """How many results have each verdict, and how many are vacuous."""
        counts = {v.value: sum(r.verdict is v for r in self.results) for v in Verdict}
        counts["vacuous"] = sum(r.vacuous for r in self.results)
        return counts

    def to_json(self, path: str | Path) -> None:
        """Write the report; `from_json` reads it back. docs/report_schema.md lists the fields."""
        document = {
            "schema": SCHEMA,
            "environment": to_record(Report((), self.environment))["environment"],
            "results": [result.to_record() for result in self.results],
        }
        Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """Read what `to_json` wrote, now or under schema 1.

        Raises:
            InputError: The file is not a report, or has a schema that this version does not read.
        """
        try:
            return cls.from_document(json.loads(Path(path).read_text(encoding="utf-8")))
        except InputError as error:
            raise InputError(f"{path} is not a ktonum report that can be read: {error}") from None

    @classmethod
    def from_document(cls, document: object) -> Report:
        """The report in what a file's JSON holds.

        Raises:
            InputError: The schema is unknown, or a field is missing, unknown, or not of its type.
        """
        found = document.get("schema") if isinstance(document, dict) else None
        if not isinstance(document, dict) or found not in (SCHEMA, schema_1.SCHEMA):
            raise InputError(
                f"the schema is {found!r}, and {SCHEMA!r} or {schema_1.SCHEMA!r} is accepted; write a file with "
                f"`ktonum audit OP --json FILE`, or upgrade ktonum if a newer one wrote this file"
            )
        if found == schema_1.SCHEMA:
            try:
                document = schema_1.upgraded(document)
            except (AttributeError, LookupError, TypeError) as error:
                raise InputError(f"a result is damaged ({type(error).__name__}: {error}); audit again") from error
        return from_record(cls, {k: v for k, v in document.items() if k != "schema"}, "report")
