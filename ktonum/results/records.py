"""Dataclasses as JSON-ready records, and back. Fields and types are read from the classes; none is named here.

A result has hundreds of small records and passes from a worker to the controller as text, so that what is known of a
class is worked out once.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ktonum.errors import InputError

__all__ = ["from_record", "to_record"]

T = TypeVar("T")

# JSON has no infinities and no NaN: these texts stand for them.
_NOT_FINITE = ("nan", "inf", "-inf")
_SCALARS = {str: "text", int: "an integer", bool: "true or false"}


def to_record(value: Any) -> dict[str, Any]:
    """A dataclass as a dictionary of all its fields; of the dataclasses inside it, without fields at their defaults.

    Enums become text, and numbers that are not finite ``nan``, ``inf`` and ``-inf``.
    """
    kind: Any = type(value)
    return {name: _plain(getattr(value, name)) for name in _defaults(kind)}


def _plain(value: Any) -> Any:
    if value is None or type(value) in _SCALARS:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = ((name, getattr(value, name), default) for name, default in _defaults(type(value)).items())
        return {name: _plain(found) for name, found, default in given if found != default}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


@cache
def _defaults(kind: Any) -> dict[str, Any]:
    """The default of each field of a dataclass; `dataclasses.MISSING`, which equals nothing else, where it has none."""
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(kind)
    }


def from_record(kind: Callable[..., T], record: Any, place: str) -> T:
    """The inverse of `to_record`. Fields that have a default may be missing.

    Args:
        kind: The dataclass.
        record: What JSON holds.
        place: What the record is, for messages, e.g. ``result``.

    Raises:
        InputError: A field is missing, unknown, or not of its type.
    """
    try:
        read: T = _reader(kind)(record)
    except _Misfit as misfit:
        raise InputError(f"{place}{misfit.place} {misfit.words}") from None
    return read


class _Misfit(Exception):
    """What does not fit, in words, and where it is in the record that is read."""

    def __init__(self, words: str, place: str = "") -> None:
        super().__init__(words)
        self.words = words
        self.place = place

    @classmethod
    def of(cls, value: Any, expected: str) -> _Misfit:
        return cls(f"is {value!r}: expected {expected}")

    def inside(self, place: str) -> _Misfit:
        return _Misfit(self.words, f"{place}{self.place}")


Reader = Callable[[Any], Any]


@cache
def _reader(expected: Any) -> Reader:
    """Reads what JSON holds in place of the type ``expected``."""
    origin, inner = get_origin(expected), get_args(expected)
    if expected is Any:
        return lambda value: value
    if expected is float:
        return _number
    if expected in _SCALARS:
        return _scalars(expected)
    if origin in (Union, types.UnionType):  # X | None
        (given,) = (_reader(t) for t in inner if t is not types.NoneType)
        return lambda value: None if value is None else given(value)
    if origin is tuple:
        return _tuples(_reader(inner[0]))
    if dataclasses.is_dataclass(expected):
        return _dataclasses(expected)
    if issubclass(origin or expected, Mapping):
        return _mappings(_reader(inner[1]))
    return _enums(expected)


def _number(value: Any) -> float:
    if type(value) in (float, int) or value in _NOT_FINITE:
        return float(value)
    raise _Misfit.of(value, "a number")


def _scalars(expected: type) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is expected:
            return value
        raise _Misfit.of(value, _SCALARS[expected])

    return read


def _enums(expected: type[Enum]) -> Reader:
    members = {member.value: member for member in expected}

    def read(value: Any) -> Any:
        if isinstance(value, str) and value in members:
            return members[value]
        raise _Misfit.of(value, ", ".join(map(repr, members)))

    return read


def _tuples(entry: Reader) -> Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise _Misfit.of(value, "a list")
        return tuple(_each(entry, ((f"[{i}]", v) for i, v in enumerate(value))))

    return read


def _mappings(entry: Reader) -> Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _Misfit.of(value, "an object")
        return dict(zip(value, _each(entry, ((f".{k}", v) for k, v in value.items())), strict=True))

    return read


def _each(entry: Reader, places: Iterable[tuple[str, Any]]) -> list[Any]:
    found = []
    for place, value in places:
        try:
            found.append(entry(value))
        except _Misfit as misfit:
            raise misfit.inside(place) from None
    return found


def _dataclasses(kind: Any) -> Reader:
    hints = get_type_hints(kind)
    fields = {name: _reader(hints[name]) for name in _defaults(kind)}
    required = {name for name, default in _defaults(kind).items() if default is dataclasses.MISSING}

    def read(record: Any) -> Any:
        if not isinstance(record, Mapping):
            raise _Misfit.of(record, "an object")
        unknown, missing = record.keys() - fields.keys(), required - record.keys()
        if unknown or missing:
            wrong = [f"lacks {', '.join(sorted(missing))}"] * bool(missing)
            wrong += [f"has an unknown {', '.join(sorted(map(str, unknown)))}"] * bool(unknown)
            raise _Misfit(f"{' and '.join(wrong)}: its fields are {', '.join(fields)}")
        values = {}
        for name, value in record.items():
            try:
                values[name] = fields[name](value)
            except _Misfit as misfit:
                raise misfit.inside(f".{name}") from None
        return kind(**values)

    return read
