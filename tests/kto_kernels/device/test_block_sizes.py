"""How many tiles cover a size."""

from __future__ import annotations

from ktonum.kernels.device.block_sizes import cdiv


def test_cdiv_rounds_up() -> None:
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
