"""The files of tolerance tables: TOML, validated against a schema. Reading one runs no code.

A table is ``OP.toml``, in `ktonum.tolerance_tables` or in your own directory::

    schema = "ktonum-tolerances/2"
    op = "kto"
    rule = "..."                 # how tolerances follow from measured errors, in words

    [provenance.sm_90]           # one for each device class that has rows; the fields of `tables.Provenance`
    ...

    [[row]]                      # the fields of `tables.Row`; output, measure, dtype, device_class identify it
    ...

Every key without a default is required, and other keys are not accepted. To extend the schema, add a field with a
default. Older tables then stay valid. An older ktonum refuses a newer table and names the key that it does not know.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections import abc
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from ktonum.declare.cases import DTYPES
from ktonum.errors import InputError, TableError
from ktonum.tolerances.tables import MEASURES, ErrorSample, Provenance, Row, Table, Tail

__all__ = ["SCHEMA", "find_table", "load_table", "write_table"]

SCHEMA = "ktonum-tolerances/2"

_DEVICE_CLASS = re.compile(r"cpu|interpreter|sm_\d{2,3}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_OP = re.compile(r"[A-Za-z0-9_-]+")

# The one number that may be negative.
_SIGNED = "shape"

_Record = TypeVar("_Record", Provenance, Row, ErrorSample, Tail)
_WORDS = {str: "text", int: "an integer", float: "a number", bool: "a boolean", dict: "a table", list: "an array"}


def find_table(op: str, directory: str | Path | None = None) -> Table | None:
    """The op's table: ``directory/OP.toml`` if there is one, otherwise the one of ktonum, otherwise None.

    Raises:
        InputError: ``op`` is not a word, or ``directory`` does not exist.
        TableError: The table is not valid.
    """
    if not _OP.fullmatch(op):
        raise InputError(f"op = {op!r}: an op's name is a word of letters, digits, '-' and '_'")
    places: list[Traversable] = [resources.files("ktonum.tolerance_tables")]
    if directory is not None:
        if not Path(directory).is_dir():
            raise InputError(f"no directory {str(directory)!r}: pass an existing directory with tolerance tables")
        places.insert(0, Path(directory))
    for place in places:
        file = place / f"{op}.toml"
        if file.is_file():
            return load_table(file)
    return None


def load_table(file: str | Path | Traversable) -> Table:
    """Read and validate one table.

    Raises:
        TableError: The file cannot be read, is not TOML, or does not fit the schema. The message names the file, the
            key and what is accepted.
    """
    place = Path(file) if isinstance(file, str) else file
    try:
        document = tomllib.loads(place.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TableError(f"{place}: not valid TOML: {error}; restore it from version control") from error
    except OSError as error:
        raise TableError(f"{place}: cannot be read: {error.strerror}; pass a readable file") from error
    return _Reader(str(place)).table(document, place.name)


class _Reader:
    """Turns parsed TOML into a `Table`. Its errors name the file and the key that does not fit."""

    def __init__(self, file: str) -> None:
        self.file = file

    def reject(self, key: str, found: str, accepted: str) -> TableError:
        return TableError(f"{self.file}: {key}: {found}; accepted: {accepted}")

    def table(self, document: dict[str, Any], name: str) -> Table:
        # Check the schema first, so that the message for a file of another version is not about one of its keys.
        if document.get("schema") != SCHEMA:
            found = repr(document["schema"]) if "schema" in document else "missing"
            raise self.reject("schema", found, f"{SCHEMA!r}, the version that this ktonum reads")
        hints = {"schema": str, "op": str, "rule": str, "provenance": dict, "row": list}
        self.check("", document, hints, set(hints))
        if name != f"{document['op']}.toml":
            raise self.reject("op", repr(document["op"]), f"{Path(name).stem!r}, as the file is called {name}")
        provenance = {}
        for device_class, section in document["provenance"].items():
            key = f"provenance.{device_class}"
            self.device_class(key, device_class)
            provenance[device_class] = given = self.build(Provenance, key, section)
            if not _DATE.fullmatch(given.date):
                raise self.reject(f"{key}.date", repr(given.date), "a date as in 2026-01-31")
            self.check(f"{key}.dims.", dict(given.dims), dict.fromkeys(given.dims, int), set())
        rows: dict[tuple[str, ...], Row] = {}
        for number, section in enumerate(document["row"], 1):
            row = self.build(Row, f"row {number}", section)
            key = f"row {number} ({row.name})"
            self.row(key, row)
            if row.key in rows:
                raise self.reject(key, "a duplicate", "one row for each output, measure, dtype and device class")
            if row.device_class not in provenance:
                accepted = f"{', '.join(provenance)}: those with a provenance"
                raise self.reject(f"{key}.device_class", repr(row.device_class), accepted)
            rows[row.key] = row
        return Table(document["op"], document["rule"], tuple(rows.values()), provenance, self.file)

    def build(self, kind: type[_Record], key: str, section: Any) -> _Record:
        if not isinstance(section, dict):
            raise self.reject(key, f"{section!r}, {_WORDS.get(type(section))}", "a table of keys")
        required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        hints = get_type_hints(kind)
        self.check(f"{key}.", section, hints, required)
        # TOML distinguishes 2 from 2.0, but people who edit tables do not.
        values: dict[str, Any] = {k: float(v) if hints[k] is float else v for k, v in section.items()}
        for name in [n for n, inner in hints.items() if is_dataclass(inner)]:
            values[name] = self.build(hints[name], f"{key}.{name}", values[name])
        return kind(**values)

    def check(self, prefix: str, section: dict[str, Any], hints: Mapping[str, Any], required: set[str]) -> None:
        """Check the names and types of a section's keys. Numbers must be finite and not negative."""
        for name in sorted(required - set(section)):
            raise self.reject(f"{prefix}{name}", "missing", f"the keys {', '.join(hints)}")
        for name, value in section.items():
            key, known = f"{prefix}{name}", f"the keys {', '.join(hints)}; a newer ktonum may know more"
            if name not in hints:
                raise self.reject(key, "unknown", known)
            wanted = get_origin(hints[name]) or hints[name]
            wanted = dict if wanted is abc.Mapping or is_dataclass(wanted) else wanted
            fitting = (float, int) if wanted is float else (wanted,)
            if not isinstance(value, fitting) or isinstance(value, bool):
                found = _WORDS.get(type(value), type(value).__name__)
                raise self.reject(key, f"{value!r}, {found}", _WORDS[wanted])
            if isinstance(value, (int, float)) and not (math.isfinite(value) and (value >= 0 or name == _SIGNED)):
                raise self.reject(key, repr(value), "a finite number" + ", zero or more" * (name != _SIGNED))

    def device_class(self, key: str, value: str) -> None:
        if not _DEVICE_CLASS.fullmatch(value):
            raise self.reject(key, repr(value), "cpu, interpreter, or sm_ and digits as in sm_90")

    def row(self, key: str, row: Row) -> None:
        choices = {"measure": tuple(MEASURES), **dict.fromkeys(("dtype", "stored", "accumulator"), tuple(DTYPES))}
        if row.measure in MEASURES:
            choices["unit"] = (MEASURES[row.measure],)
        for name, accepted in choices.items():
            if getattr(row, name) not in accepted:
                raise self.reject(f"{key}.{name}", repr(getattr(row, name)), ", ".join(accepted))
        self.device_class(f"{key}.device_class", row.device_class)
        # Each number is at least the one before it. So a tolerance is never larger than the derived bound.
        chain, sizes = (
            ("median", "quantile_90", "quantile_99", "maximum", "tolerance"),
            ("elements_min", "elements_max"),
        )
        for part, errors, bound in (("errors", row.errors, row.bound), ("shares", row.shares, 1.0)):
            self.ascending(f"{key}.{part}", {**{name: getattr(errors, name) for name in chain}, "bound": bound})
            if not errors.decided_by.startswith(("tail", "strata", "rounding", "bound")):
                raise self.reject(
                    f"{key}.{part}.decided_by", repr(errors.decided_by), "tail, strata, rounding, or bound and why"
                )
            if errors.decided_by.startswith("bound") and errors.tolerance != bound:
                found = f"{errors.tolerance:g}, decided by the bound {bound:g}"
                raise self.reject(f"{key}.{part}.tolerance", found, "the bound, if it decides")
            if errors.decided_by == "tail" and not errors.tail.exceeding:
                raise self.reject(f"{key}.{part}.tail.exceeding", "0", "1 or more, if the tail decides")
        self.ascending(key, {name: getattr(row, name) for name in sizes})
        for name in ("samples", "strata", "elements_min"):
            if getattr(row, name) < 1:
                raise self.reject(f"{key}.{name}", "0", "1 or more")
        if row.reason and not _DATE.fullmatch(row.reason_date):
            raise self.reject(
                f"{key}.reason_date", repr(row.reason_date), "a date as in 2026-01-31, if there is a reason"
            )

    def ascending(self, key: str, values: Mapping[str, float]) -> None:
        for (low, least), (high, value) in pairwise(values.items()):
            if least > value:
                raise self.reject(f"{key}.{high}", f"{value:g}, less than {low} = {least:g}", " ≤ ".join(values))


def write_table(table: Table, file: str | Path) -> None:
    """Write ``table``. The same content gives the same bytes, and a changed row changes only its own lines.

    Rows are sorted by key, and provenance by device class. The text is validated before the file is replaced.

    Raises:
        TableError: The table does not fit the schema. The file is not changed.
    """
    place = Path(file)
    text = _format(table)
    _Reader(str(place)).table(tomllib.loads(text), place.name)
    place.write_text(text, encoding="utf-8")


# The tables are flat, so these few lines write them. They do not justify a library that every user would have to
# install.
def _format(table: Table) -> str:
    parts = [f"schema = {_value(SCHEMA)}\nop = {_value(table.op)}\nrule = {_value(table.rule)}\n"]
    for device_class, provenance in sorted(table.provenance.items()):
        parts.append(f"[provenance.{device_class}]\n{_lines(asdict(provenance))}")
    for row in sorted(table.rows, key=lambda r: r.key):
        unchanged = {f.name for f in fields(row) if f.default is not MISSING and getattr(row, f.name) == f.default}
        parts.append(f"[[row]]\n{_lines({k: v for k, v in asdict(row).items() if k not in unchanged})}")
    return "\n".join(parts)


def _lines(section: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {_value(value)}\n" for name, value in section.items())


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{k} = {_value(v)}' for k, v in value.items())} }}"
    # JSON's strings are TOML's, except for one control character that JSON does not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
