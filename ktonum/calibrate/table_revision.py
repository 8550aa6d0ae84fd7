"""What new rows do to a table that has rows of the same device class: tolerances tighten, and loosen for a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ktonum.tolerances.tables import Row, Table

__all__ = ["Revision", "revise_rows"]


@dataclass(frozen=True)
class Revision:
    """Rows of one device class, old against new.

    Attributes:
        rows: The new rows, with the reason where they are looser, and with that of the old row where they are not.
        loosened: In words, rows whose tolerance grew, and rows that are no more: for those the bound alone is left.
        tightened: In words, rows that had grown looser than the data need.
    """

    rows: tuple[Row, ...]
    loosened: tuple[str, ...]
    tightened: tuple[str, ...]


def revise_rows(table: Table | None, measured: Sequence[Row], *, device_class: str, reason: str, date: str) -> Revision:
    """Hold measured rows against the table's of the same device class.

    Args:
        table: The table as it is; None where there is none.
        measured: Rows of that device class.
        device_class: Whose rows are replaced.
        reason: Why tolerances may grow; empty where they may not.
        date: Year-month-day, kept with the reason.
    """
    before = {r.key: r for r in (table.rows if table else ()) if r.device_class == device_class}
    rows, loosened, tightened = [], [], []
    for row in measured:
        old = before.pop(row.key, None)
        if old is None:
            rows.append(row)
            continue
        change = f"{row.name}: {old.tolerance:g} before, {row.tolerance:g} now"
        if row.tolerance > old.tolerance or row.shares.tolerance > old.shares.tolerance:
            if row.tolerance <= old.tolerance:
                change = f"{row.name}: {old.shares.tolerance:g} of the bound before, {row.shares.tolerance:g} now"
            if row.errors.maximum > old.tolerance:
                change += f", and an error of {row.errors.maximum:g} was measured"
            loosened.append(change)
            rows.append(replace(row, tolerance_before=old.tolerance, reason=reason, reason_date=date if reason else ""))
            continue
        if row.tolerance < old.tolerance:
            tightened.append(change)
        kept = {name: getattr(old, name) for name in ("tolerance_before", "reason", "reason_date")}
        rows.append(replace(row, **kept))
    loosened += [f"{old.name}: {old.tolerance:g} before, not measured now" for old in before.values()]
    return Revision(tuple(rows), tuple(loosened), tuple(tightened))
