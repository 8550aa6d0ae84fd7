"""The results of an audit as data, without sentences: verdicts, measurements, power, and the report that holds them.

A leaf: it imports neither torch nor pytest, so that results can be read, merged and compared anywhere. `measurement`
and `check_result` have the classes, `audit_report` the report and its file. `json_schema` has the file's version,
`records` reads and writes any of the classes, and `upgrade_schema_1` reads files of the first version.
"""

from __future__ import annotations

from ktonum.results.audit_report import Report
from ktonum.results.check_result import CaseParts, Cause, CheckResult, Verdict
from ktonum.results.json_schema import SCHEMA
from ktonum.results.measurement import BoundKind, BoundSource, Localisation, Measurement, Power

__all__ = [
    "SCHEMA",
    "STANDARDS",
    "BoundKind",
    "BoundSource",
    "CaseParts",
    "Cause",
    "CheckResult",
    "Localisation",
    "Measurement",
    "Power",
    "Report",
    "Verdict",
]

#: What a candidate can be held to; the first is the default.
STANDARDS = ("precise", "eager")
