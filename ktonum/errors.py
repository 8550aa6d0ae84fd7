"""Every exception ktonum raises on purpose.

Each message names what was given, what is accepted and the next step; the classes exist so that callers can
tell a wrong argument from a wrong kernel.
"""

from __future__ import annotations

__all__ = [
    "CandidateError",
    "GradcheckError",
    "InputError",
    "KtonumError",
    "TableError",
    "ToleranceError",
    "UsageError",
]


class KtonumError(Exception):
    """Base of all errors below."""


class InputError(KtonumError, ValueError):
    """An argument does not fit: shape, dtype, device, label, target, parameter."""


class UsageError(KtonumError):
    """A command or an audit was asked for in a way that cannot be run; the command line exits with status 2."""


class TableError(KtonumError, ValueError):
    """A tolerance table is damaged, foreign or of another schema; the message names the file and the key."""


class CandidateError(KtonumError):
    """The function under audit raised, or returned something of the wrong structure."""


class GradcheckError(KtonumError, RuntimeError):
    """An analytic gradient disagrees with finite differences; ``result`` holds the `GradcheckResult`.

    A ``RuntimeError`` too, as `torch.autograd.gradcheck` raises one, so existing ``except`` clauses keep working.
    """

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class ToleranceError(KtonumError, AssertionError):
    """`ktonum.assert_within` found an error beyond its tolerance."""
