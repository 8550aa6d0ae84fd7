"""Tolerance tables: TOML files of measured tolerances with their provenance. Reading one runs no code.

A table is ``OP.toml``, shipped in `ktonum.tolerance_tables` or kept in a directory of your own::

    schema = "ktonum-tolerances/1"
    op = "kto"
    rule = "..."                 # in words: how `tolerance` follows from `maximum` and `bound`

    [provenance.sm_90]           # one for each device class that has rows; the fields of `Provenance`
    ...

    [[row]]                      # the fields of `Row`; output, measure, dtype and device_class identify it
    ...

Every key is required and no other is accepted. A later field with a default is all it takes to extend the schema: the
tables written before stay valid, and an older ktonum refuses a newer table by name of the key it does not know.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections import abc
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from ktonum.cases import DTYPES
from ktonum.errors import InputError, TableError

__all__ = ["MEASURES", "SCHEMA", "LookUp", "Provenance", "Row", "Table", "find_table", "load_table", "write_table"]

SCHEMA = "ktonum-tolerances/1"

#: Measures and the unit that each is in; `ktonum.tolerances` defines them.
MEASURES = {"element": "half_ulp", "relative_norm": "rounding_norm", "signed_bias": "rounding_norm"}

_DEVICE_CLASS = re.compile(r"cpu|interpreter|sm_\d{2,3}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_OP = re.compile(r"[A-Za-z0-9_-]+")

_Record = TypeVar("_Record", "Provenance", "Row")
_WORDS = {str: "text", int: "an integer", float: "a number", bool: "a boolean", dict: "a table", list: "an array"}


@dataclass(frozen=True)
class Provenance:
    """What all rows of one device class were measured with.

    Attributes:
        device: The device's name.
        ktonum, python, torch, triton: Versions.
        cuda, driver: Versions, empty without a GPU or where they cannot be told.
        commit: Of the checkout, with ``+`` for uncommitted changes.
        date: Year-month-day.
        command: What was run.
        profile: Whose points were measured, ``quick`` or ``full``.
        seeds: How many inputs were drawn at each point and dtype.
        dims: The largest size measured, by name.
    """

    device: str
    ktonum: str
    python: str
    torch: str
    triton: str
    cuda: str
    driver: str
    commit: str
    date: str
    command: str
    profile: str
    seeds: int
    dims: Mapping[str, int]


@dataclass(frozen=True)
class Row:
    """One tolerance and the sample it rests on. All errors are in ``unit``.

    Attributes:
        output: An output's name, or ``grad_INPUT``.
        measure: One of `MEASURES`.
        dtype: The dtype under audit, one of `ktonum.cases.DTYPES`.
        device_class: ``sm_90`` and the like, ``cpu``, or ``interpreter`` for Triton's on a CPU.
        stored: The dtype of this output, in whose roundings errors are counted: a bf16 loss is float32.
        unit: The measure's, see `MEASURES`.
        tolerance: The largest error that passes; ``maximum`` ≤ ``tolerance`` ≤ ``bound``.
        bound: The largest bound derived from the op's rounding-error analysis over the same samples.
        maximum, quantile_99, median: Of the measured errors.
        samples: How many tensors were measured.
        elements_min, elements_max: Sizes of the smallest and the largest of them.
    """

    output: str
    measure: str
    dtype: str
    device_class: str
    stored: str
    unit: str
    tolerance: float
    bound: float
    maximum: float
    quantile_99: float
    median: float
    samples: int
    elements_min: int
    elements_max: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        """(output, measure, dtype, device class): what identifies a row within its table."""
        return self.output, self.measure, self.dtype, self.device_class

    @property
    def name(self) -> str:
        """The key in words, e.g. ``grad_weight/element/bf16/sm_90``."""
        return "/".join(self.key)


@dataclass(frozen=True)
class LookUp:
    """What a look-up found: ``row``, or None; and which row it is, or why there is none, in words."""

    row: Row | None
    why: str


@dataclass(frozen=True)
class Table:
    """The tolerances of one op.

    Attributes:
        op: The op's name.
        rule: How tolerances follow from what was measured, in words.
        rows: The rows, no two with the same key.
        provenance: By device class.
        source: The file, for messages.
    """

    op: str
    rule: str
    rows: tuple[Row, ...]
    provenance: Mapping[str, Provenance]
    source: str = field(default="", compare=False)

    def look_up(
        self, *, output: str, measure: str, dtype: str, device_class: str, dims: Mapping[str, int] | None = None
    ) -> LookUp:
        """The row with exactly this key, and an explanation either way; nothing is inferred from similar rows.

        Args:
            output: Name of the output, or ``grad_INPUT``.
            measure: One of `MEASURES`.
            dtype: Name of the dtype under audit.
            device_class: See `Row`.
            dims: Sizes of the case by name; a row that was not measured at such sizes does not apply. None: not asked.
        """
        key = (output, measure, dtype, device_class)
        row = next((r for r in self.rows if r.key == key), None)
        if row is None:
            return LookUp(None, f"{self.source} has no {self._nearest(key)}")
        made = self.provenance[device_class]
        largest = ", ".join(f"{k}={v}" for k, v in made.dims.items())
        for name, size in (dims or {}).items():
            if size > made.dims.get(name, -1):
                why = f"was measured at sizes up to {largest}, which {name}={size} is beyond"
                return LookUp(None, f"{row.name} in {self.source} {why}")
        sample = f"largest of {row.samples} measured {row.maximum:g} at sizes up to {largest}, bound {row.bound:g}"
        made_with = f"{made.date}, {made.device}, torch {made.torch}, triton {made.triton}, commit {made.commit}"
        return LookUp(row, f"row {row.name} of {self.source}: {sample} ({made_with})")

    def _nearest(self, key: tuple[str, ...]) -> str:
        kept, found = self.rows, ""
        for attribute, wanted in zip(("output", "measure", "dtype", "device_class"), key, strict=True):
            there = ", ".join(sorted({getattr(r, attribute) for r in kept}))
            kept = tuple(r for r in kept if getattr(r, attribute) == wanted)
            if not kept:
                return f"row for {attribute.replace('_', ' ')} {wanted!r}{found}: it has {there or 'no rows'}"
            found = f"{found or ' with'} {wanted}"
        return "such row"


def find_table(op: str, directory: str | Path | None = None) -> Table | None:
    """The op's table: ``directory/OP.toml`` if a directory is given and has one, else the shipped one, else None.

    Raises:
        InputError: ``op`` is not a word, or there is no such directory.
        TableError: The table is not valid.
    """
    if not _OP.fullmatch(op):
        raise InputError(f"an op's name is a word of letters, digits, '-' and '_': {op!r} is not")
    places: list[Traversable] = [resources.files("ktonum.tolerance_tables")]
    if directory is not None:
        if not Path(directory).is_dir():
            raise InputError(f"no directory {str(directory)!r} to look for tolerance tables in")
        places.insert(0, Path(directory))
    for place in places:
        file = place / f"{op}.toml"
        if file.is_file():
            return load_table(file)
    return None


def load_table(file: str | Path | Traversable) -> Table:
    """Read and validate one table.

    Raises:
        TableError: The file cannot be read, is no TOML, or breaks the schema; with file, key, and what is accepted.
    """
    place = Path(file) if isinstance(file, str) else file
    try:
        document = tomllib.loads(place.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TableError(f"{place}: not valid TOML: {error}; restore it from version control") from error
    except OSError as error:
        raise TableError(f"{place}: cannot be read: {error.strerror}") from error
    return _Reader(str(place)).table(document, place.name)


class _Reader:
    """Turns parsed TOML into a `Table`, naming file and key of whatever does not fit."""

    def __init__(self, file: str) -> None:
        self.file = file

    def reject(self, key: str, found: str, accepted: str) -> TableError:
        return TableError(f"{self.file}: {key}: {found}; accepted: {accepted}")

    def table(self, document: dict[str, Any], name: str) -> Table:
        # The schema first: a file of another version is not faulted for each key it has or lacks.
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
        # TOML tells 2 from 2.0, people who edit tables do not.
        values: dict[str, Any] = {k: float(v) if hints[k] is float else v for k, v in section.items()}
        return kind(**values)

    def check(self, prefix: str, section: dict[str, Any], hints: Mapping[str, Any], required: set[str]) -> None:
        """Names and types of a section's keys; numbers must be finite and not negative."""
        for name in sorted(required - set(section)):
            raise self.reject(f"{prefix}{name}", "missing", f"the keys {', '.join(hints)}")
        for name, value in section.items():
            key, known = f"{prefix}{name}", f"the keys {', '.join(hints)}; a newer ktonum may know more"
            if name not in hints:
                raise self.reject(key, "unknown", known)
            wanted = get_origin(hints[name]) or hints[name]
            wanted = dict if wanted is abc.Mapping else wanted
            fitting = (float, int) if wanted is float else (wanted,)
            if not isinstance(value, fitting) or isinstance(value, bool):
                found = _WORDS.get(type(value), type(value).__name__)
                raise self.reject(key, f"{value!r}, {found}", _WORDS[wanted])
            if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
                raise self.reject(key, repr(value), "a finite number, zero or more")

    def device_class(self, key: str, value: str) -> None:
        if not _DEVICE_CLASS.fullmatch(value):
            raise self.reject(key, repr(value), "cpu, interpreter, or sm_ and digits as in sm_90")

    def row(self, key: str, row: Row) -> None:
        choices = {"measure": tuple(MEASURES), "dtype": tuple(DTYPES), "stored": tuple(DTYPES)}
        if row.measure in MEASURES:
            choices["unit"] = (MEASURES[row.measure],)
        for name, accepted in choices.items():
            if getattr(row, name) not in accepted:
                raise self.reject(f"{key}.{name}", repr(getattr(row, name)), ", ".join(accepted))
        self.device_class(f"{key}.device_class", row.device_class)
        # Each at least the one before it; in particular no tolerance is looser than what can be derived.
        errors, sizes = ("median", "quantile_99", "maximum", "tolerance", "bound"), ("elements_min", "elements_max")
        for low, high in (*pairwise(errors), *pairwise(sizes)):
            if getattr(row, low) > getattr(row, high):
                found = f"{getattr(row, high):g}, less than {low} = {getattr(row, low):g}"
                raise self.reject(f"{key}.{high}", found, " ≤ ".join(errors if high in errors else sizes))
        for name in ("samples", "elements_min"):
            if getattr(row, name) < 1:
                raise self.reject(f"{key}.{name}", "0", "1 or more")


def write_table(table: Table, file: str | Path) -> None:
    """Write ``table`` so that the same content gives the same bytes, and a changed row a diff of its own.

    Rows are sorted by key, provenance by device class, and the result is read back before the file is replaced.

    Raises:
        TableError: The table breaks the schema; the file is left as it was.
    """
    place = Path(file)
    text = _format(table)
    _Reader(str(place)).table(tomllib.loads(text), place.name)
    place.write_text(text, encoding="utf-8")


# An emitter of our own rather than a library's: the tables are flat, it takes these lines, and a dependency of every
# user's test session would have to earn more than that.
def _format(table: Table) -> str:
    parts = [f"schema = {_value(SCHEMA)}\nop = {_value(table.op)}\nrule = {_value(table.rule)}\n"]
    for device_class, provenance in sorted(table.provenance.items()):
        parts.append(f"[provenance.{device_class}]\n{_lines(asdict(provenance))}")
    for row in sorted(table.rows, key=lambda r: r.key):
        parts.append(f"[[row]]\n{_lines(asdict(row))}")
    return "\n".join(parts)


def _lines(section: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {_value(value)}\n" for name, value in section.items())


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{k} = {_value(v)}' for k, v in value.items())} }}"
    # JSON's strings are TOML's, but for the one control character that JSON lets through.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
