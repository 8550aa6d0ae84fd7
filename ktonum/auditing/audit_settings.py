"""What a session was asked to do. Settings are built once and travel to the workers as one value.

Imports torch only inside functions: the pytest plugin reads settings long before it is known whether a test needs it.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from ktonum.auditing.devices import DEVICES
from ktonum.auditing.op_loading import load_ops
from ktonum.auditing.plan import Item, KeptContext, Plan, PlannedCheck
from ktonum.declare.cases import PROFILES, parse_dtypes
from ktonum.errors import UsageError
from ktonum.results import STANDARDS, CheckResult, Verdict

if TYPE_CHECKING:
    from ktonum.declare.op import Op

__all__ = ["AuditSettings", "SessionSettings"]


@dataclass(frozen=True, kw_only=True)
class SessionSettings(ABC, Generic[Item]):
    """What a session of any kind was asked to do.

    Attributes:
        targets: Ops, as ``module``, ``module:attr``, ``path/file.py`` or ``path/file.py:attr``.
        dtypes: E.g. ``bf16,fp32``; None for all.
        device: One of `DEVICES`, as the user wrote it.
        profile: ``quick`` or ``full``.
        only: Keep items whose ``CASE::CHECK`` contains one of these; empty keeps all.
        folders: Where modules are looked for that are not on ``sys.path``.
        timeout: Seconds that a worker may take over an item; 0 for no limit.
        alone: Whether the pytest session runs planned items and no other tests.
    """

    targets: tuple[str, ...]
    dtypes: str | None = None
    device: str = "auto"
    profile: str = "quick"
    only: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    timeout: float = 600.0
    alone: bool = True

    def to_bytes(self) -> bytes:
        """The settings as a worker receives them. Pickled, so that they arrive as the same class with equal values."""
        return pickle.dumps(self)

    @staticmethod
    def from_bytes(sent: bytes) -> SessionSettings[Any]:
        """The inverse of `to_bytes`; only for what this run's controller sent."""
        settings = pickle.loads(sent)
        if not isinstance(settings, SessionSettings):
            raise TypeError(f"expected session settings, got {type(settings).__name__}")
        return settings

    def check(self) -> None:
        """Check everything that can be checked without loading an op.

        Raises:
            UsageError: A name is none of those accepted.
        """
        parse_dtypes(self.dtypes)
        _one_of("device", self.device, DEVICES)
        _one_of("profile", self.profile, PROFILES)

    @abstractmethod
    def items(self, ops: Sequence[Op], device: str) -> list[Item]:
        """Every item on these ops, those of a case together."""

    def fails(self, result: CheckResult) -> bool:
        """Whether the pytest test of an item with this result fails."""
        return result.failed

    def make_plan(self, device: str) -> Plan[Item]:
        """Load the ops and list what to run.

        Args:
            device: ``cpu`` or ``cuda``, resolved already: asking CUDA here would bind a worker to a GPU.

        Raises:
            UsageError: An op or candidate cannot be loaded, two ops share a name, or nothing is left to run.
        """
        ops = self.load_ops()
        for op in ops:
            if sum(other.name == op.name for other in ops) > 1:
                raise UsageError(f"two ops are called {op.name!r}: rename one, because results are listed by op name")
        items = self.items(ops, device)
        names = ", ".join(op.name for op in ops)
        if not items:
            raise UsageError(
                f"{names} has no case for {', '.join(parse_dtypes(self.dtypes))} on {device}: use another dtype or "
                f"device, or add a point to the op"
            )
        kept = [item for item in items if not self.only or any(text in item.name for text in self.only)]
        if not kept:
            wanted = " or ".join(map(repr, self.only))
            raise UsageError(f"no item of {names} contains {wanted}: items are called like {items[0].name}")
        return Plan(ops, tuple(kept), device)

    def load_ops(self) -> tuple[Op, ...]:
        """The ops that `targets` name."""
        return load_ops(self.targets, tuple(map(Path, self.folders)))


@dataclass(frozen=True, kw_only=True)
class AuditSettings(SessionSettings[PlannedCheck]):
    """What an audit was asked to do.

    Attributes:
        candidate: Replaces the ops' candidate; None keeps it.
        standard: ``precise`` or ``eager``.
        strict: Whether INCONCLUSIVE fails.
    """

    candidate: str | None = None
    standard: str = "precise"
    strict: bool = False

    def check(self) -> None:
        """See `SessionSettings.check`."""
        super().check()
        _one_of("standard", self.standard, STANDARDS)

    def load_ops(self) -> tuple[Op, ...]:
        """The ops that `targets` name, with `candidate`."""
        return load_ops(self.targets, tuple(map(Path, self.folders)), candidate=self.candidate)

    def items(self, ops: Sequence[Op], device: str) -> list[PlannedCheck]:
        """Every check on every case."""
        from ktonum.auditing.in_process import audit_items

        kept, dtypes = KeptContext(), parse_dtypes(self.dtypes)
        return [
            PlannedCheck(op=op, case=case, check=check, standard=self.standard, kept=kept)
            for op in ops
            for case, check in audit_items(op, profile=self.profile, dtypes=dtypes, device=device)
        ]

    def fails(self, result: CheckResult) -> bool:
        """Whether the result is a failure, or INCONCLUSIVE where that fails."""
        return super().fails(result) or (self.strict and result.verdict is Verdict.INCONCLUSIVE)


def _one_of(what: str, given: str, accepted: Sequence[str]) -> None:
    if given not in accepted:
        raise UsageError(f"unknown {what} {given!r}: use {', '.join(accepted)}")
