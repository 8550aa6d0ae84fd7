"""`benchmarks/count_tail_exceedances.py`: counts of fresh errors agree with a right tail, not with a wrong one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import count_tail_exceedances as rates


def drawn(seed: int, dims: int, seeds: int, scale: float = 1.0) -> list[list[float]]:
    """Errors at several dims, whose scales differ a little."""
    draw = np.random.default_rng(seed)
    sizes = draw.uniform(0.8, 1.2, (dims, 1))
    return [[float(x) for x in row] for row in scale * sizes * draw.exponential(size=(dims, seeds))]


def test_fresh_errors_of_the_same_kind_agree_and_larger_ones_do_not() -> None:
    calibration = rates.Calibration(drawn(1, 100, 10))
    for scale, agreeing in ((1.0, True), (1.4, False)):
        fresh = [value for found in drawn(2, 3000, 1, scale) for value in found]
        counts = [calibration.count(fresh, level) for level in (0.1, 0.01)]
        assert all(c.fresh == 3000 and c.low < c.level * 3000 < c.high for c in counts), counts
        assert all(c.agrees is agreeing for c in counts), (scale, counts)


def test_dims_and_seeds_are_never_drawn_twice() -> None:
    subject = rates.SUBJECTS[0]
    blocks = [subject.block(n, first, 5) for n in range(50) for first in (0, 5)]
    cases = [case for block in blocks for case in block.cases()]
    assert len({case.seed for case in cases}) == len(cases)
    assert len({tuple(block.case.point.dims.items()) for block in blocks}) > 40


def test_each_subject_is_measured_in_its_own_units() -> None:
    for number, subject in enumerate(rates.SUBJECTS):
        found = rates.measure((number, 7, 0, 2))
        assert found and all(0 <= value <= 1 for shares in found.values() for value in shares), subject.label
        assert any(shares and max(shares) > 0 for shares in found.values())


def test_a_page_without_marks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(SystemExit) as caught:
        rates.main(["--out", str(page)])
    assert caught.value.code == 2 and "lacks the marks" in capsys.readouterr().err
