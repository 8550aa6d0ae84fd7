"""The schema of an audit's JSON file: its version, and which older versions are read.

A file is an object with three keys: ``schema``, ``environment`` and ``results``. The fields of a result are those of
the dataclasses in `audit_report`, `check_result` and `measurement`; docs/report_schema.md lists them, and a test
compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktonum.errors import InputError
from ktonum.results import upgrade_schema_1

__all__ = ["SCHEMA", "read_schema", "write_schema"]

#: The version that is written.
SCHEMA = "ktonum-report/2"


def write_schema(report: Mapping[str, Any]) -> dict[str, Any]:
    """The file's object for the fields of a report."""
    return {"schema": SCHEMA, **report}


def read_schema(document: object) -> dict[str, Any]:
    """The fields of a report, from a file's object of this version or of version 1.

    Raises:
        InputError: The schema is unknown, or a result of version 1 is damaged.
    """
    found = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(document, dict) or found not in (SCHEMA, upgrade_schema_1.SCHEMA):
        raise InputError(
            f"the schema is {found!r}, and {SCHEMA!r} or {upgrade_schema_1.SCHEMA!r} is accepted; write a file with "
            f"`ktonum audit OP --json FILE`, or upgrade ktonum if a newer one wrote this file"
        )
    if found == upgrade_schema_1.SCHEMA:
        try:
            document = upgrade_schema_1.upgraded(document)
        except (AttributeError, LookupError, TypeError) as error:
            raise InputError(f"a result is damaged ({type(error).__name__}: {error}); audit again") from error
    return {key: value for key, value in document.items() if key != "schema"}
