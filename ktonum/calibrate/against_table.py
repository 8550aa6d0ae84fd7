"""Compares fresh samples with the rows of a table, for ``ktonum calibrate --check``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ktonum.calibrate.table_rows import Pool
from ktonum.tolerances.tables import Row, Table

__all__ = ["Held", "hold_against_rows"]


@dataclass(frozen=True)
class Held:
    """One pool of samples, compared with its row.

    Attributes:
        name: The row's key in words.
        within: Whether all samples are within the derived bounds and, if there is a row, within its tolerances.
        measured: Whether there is a row.
        said: The result in one line: the largest error, the tolerance and the row, or why there is no row.
    """

    name: str
    within: bool
    measured: bool
    said: str


def hold_against_rows(
    pools: Mapping[tuple[str, str, str], Pool], table: Table | None, *, device_class: str, device: str
) -> list[Held]:
    """Compare every pool with the row that has its key.

    Args:
        pools: Samples by (output, measure, dtype).
        table: The op's table, or None.
        device_class: The device class of the samples.
        device: The name of the device on which the samples were measured.
    """
    held = []
    for (output, measure, dtype), pool in sorted(pools.items()):
        name = f"{output}/{measure}/{dtype}/{device_class}"
        row, why = None, "there is no table"
        if table is not None:
            found = table.look_up(output=output, measure=measure, dtype=dtype, device_class=device_class, device=device)
            row, why = found.row, found.why
        if row is None:
            within = not pool.beyond
            said = f"{'within' if within else 'BEYOND'} the derived bound, of {pool.samples} errors: {why}"
            held.append(Held(name, within, False, f"{name}: {said}"))
        else:
            held.append(_against(name, pool, row, why))
    return held


def _against(name: str, pool: Pool, row: Row, why: str) -> Held:
    parts, within = [], not pool.beyond
    for what, name_of, tolerance in (
        (row.unit, "errors", row.tolerance),
        ("of the bound", "shares", row.shares.tolerance),
    ):
        found = [value for stratum in pool.strata.values() for value in getattr(stratum, name_of)]
        largest, beyond = max(found), sum(not value <= tolerance for value in found)
        within = within and not beyond
        parts.append(f"largest {largest:.4g} {what}, tolerance {tolerance:g}" + f", {beyond} beyond" * bool(beyond))
    said = f"{'within' if within else 'BEYOND'}, {pool.samples} errors: {'; '.join(parts)}; {why}"
    return Held(name, within, True, f"{name}: {said}")
