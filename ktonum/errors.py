"""The exceptions that ktonum raises on purpose.

Each message says what was given, what is accepted and what to do next. The classes let a caller distinguish a wrong
argument from a wrong kernel.
"""

from __future__ import annotations

__all__ = [
    "CandidateError",
    "InputError",
    "KtonumError",
    "TableError",
    "ToleranceError",
    "UsageError",
]


class KtonumError(Exception):
    """Base class of all errors in this file."""


class InputError(KtonumError, ValueError):
    """An argument does not fit: shape, dtype, device, label, target, parameter."""


class UsageError(KtonumError):
    """A command or an audit cannot run as requested. The command line exits with status 2."""


class TableError(KtonumError, ValueError):
    """A file is not a tolerance table, is damaged, or has another schema. The message names the file and the key."""


class CandidateError(KtonumError):
    """The function under audit raised an exception, or its result has the wrong structure."""


class ToleranceError(KtonumError, AssertionError):
    """`ktonum.assert_within` found an error beyond its tolerance."""
