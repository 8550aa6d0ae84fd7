"""All results of one audit, and the JSON file that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktonum.errors import InputError
from ktonum.results.check_result import CheckResult, Verdict
from ktonum.results.json_schema import read_schema, write_schema
from ktonum.results.records import from_record, to_record

__all__ = ["Report"]


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
        environment = to_record(Report((), self.environment))["environment"]
        document = write_schema({"environment": environment, "results": [r.to_record() for r in self.results]})
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
        return from_record(cls, read_schema(document), "report")
