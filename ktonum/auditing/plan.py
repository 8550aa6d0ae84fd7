"""What a session runs: planned items, each of which gives a result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from ktonum.declare.cases import Case
from ktonum.results import Cause, CheckResult, Verdict

if TYPE_CHECKING:
    from ktonum.case.context import CaseContext
    from ktonum.declare.op import Op

__all__ = ["Item", "KeptContext", "Plan", "PlannedCheck", "PlannedItem"]


@dataclass(frozen=True, kw_only=True)
class PlannedItem(ABC):
    """One step of a session, on one case.

    Attributes:
        case: The case.
        check: What is done with the case; for an audit, the name of a check.
        standard: What the candidate is held to.
    """

    case: Case
    check: str
    standard: str = "precise"

    @property
    def name(self) -> str:
        """``CASE::CHECK``."""
        return f"{self.case.name}::{self.check}"

    @abstractmethod
    def run(self) -> CheckResult:
        """Do it, in the process that calls."""

    def error(self, cause: Cause, reason: str, details: str = "") -> CheckResult:
        """The result where `run` gave none."""
        return CheckResult(
            self.case.name,
            self.check,
            Verdict.ERROR,
            cause=cause,
            reason=reason,
            details=details,
            standard=self.standard,
            parts=self.case.parts,
        )


Item = TypeVar("Item", bound=PlannedItem)


@dataclass(frozen=True)
class Plan(Generic[Item]):
    """Every item of a session, those of a case together, in an order that every process agrees on.

    Attributes:
        ops: The ops.
        items: The items.
        device: ``cpu`` or ``cuda``.
    """

    ops: tuple[Op, ...]
    items: tuple[Item, ...]
    device: str

    @property
    def cases(self) -> int:
        """How many cases there are."""
        return len({item.case.name for item in self.items})


class KeptContext:
    """The context of the case that ran last, which the case's next check uses, too.

    One is kept: items come case by case, and a production-size case fills half a GPU.
    """

    def __init__(self) -> None:
        self._context: CaseContext | None = None

    def of(self, op: Op, case: Case) -> CaseContext:
        """The context of a case."""
        from ktonum.case.context import CaseContext

        if self._context is None or self._context.op is not op or self._context.case.name != case.name:
            self._context = None  # before the next one is made, which may need the memory
            self._context = CaseContext(op, case)
        return self._context


@dataclass(frozen=True, kw_only=True)
class PlannedCheck(PlannedItem):
    """One check on one case of an audit.

    Attributes:
        op: The op under audit.
        kept: Shared by all checks of a plan.
    """

    op: Op
    kept: KeptContext = field(repr=False)

    def run(self) -> CheckResult:
        """The verdict."""
        from ktonum.auditing.judge import check_named, run_check

        return run_check(check_named(self.op, self.case, self.check), self.kept.of(self.op, self.case), self.standard)
