"""Where a table for tests was measured."""

from __future__ import annotations

from ktonum.tolerances.tables import Provenance

PROVENANCE = Provenance(
    device='Ada "the" \\ GPU\x7f é',
    multiprocessors=132,
    ktonum="0.1.0",
    python="3.12.1",
    torch="2.13.0",
    triton="3.9.0",
    cuda="13.0",
    driver="",
    commit="0123abc",
    date="2026-01-31",
    command="ktonum calibrate toy",
    profile="quick",
    candidates="own in bf16",
    seeds=3,
    false_alarm=1e-6,
    dims={"B": 4, "T": 33},
)
