"""What an audit says: verdicts, measurements, power, and the report that holds them; as data, without sentences.

A leaf: it imports neither torch nor pytest, so that results can be read, merged and compared anywhere. `measurement`
and `check_result` have the classes, `report` the report and its file, `records` reads and writes any of these classes,
`schema_1` upgrades files of the first schema.
"""

from __future__ import annotations

from ktonum.results.check_result import CaseParts, Cause, CheckResult, Verdict
from ktonum.results.measurement import BoundKind, BoundSource, Localisation, Measurement, Power
from ktonum.results.report import SCHEMA, Report

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
