"""Compares new rows with a table's rows of the same device class. Tolerances may only become looser with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ktonum.tolerances.tables import Row, Table

__all__ = ["Revision", "revise_rows"]


@dataclass(frozen=True)
class Revision:
    """New rows of one device class, compared with the old ones.

    Attributes:
        rows: The new rows. A looser row has the new reason, and any other row keeps the reason of the old row.
        loosened: Rows with a larger tolerance, and old rows without a new one, in words. Without a row, only the
            derived bound remains.
        tightened: Rows with a smaller tolerance, in words.
    """

    rows: tuple[Row, ...]
    loosened: tuple[str, ...]
    tightened: tuple[str, ...]


def revise_rows(table: Table | None, measured: Sequence[Row], *, device_class: str, reason: str, date: str) -> Revision:
    """Compare measured rows with the table's rows of the same device class.

    Args:
        table: The present table, or None.
        measured: New rows of the device class.
        device_class: The device class whose rows are replaced.
        reason: Why tolerances may become looser; empty if they may not.
        date: Year-month-day, which is kept with the reason.
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
