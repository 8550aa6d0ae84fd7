"""What the standards grant, by dtype; and no other file decides by a standard's name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ktonum.bounds import EAGER, MEASURED_SCALE, PRECISE, standard_named
from ktonum.bounds.standard import StandIn
from ktonum.declare.cases import torch_dtype
from ktonum.errors import UsageError
from ktonum.results import STANDARDS
from subjects.planted import ALL
from support.repository import ROOT


def test_standards_are_found_by_the_names_of_results() -> None:
    assert [standard_named(name) for name in STANDARDS] == [PRECISE, EAGER]
    with pytest.raises(UsageError, match="unknown standard 'exact': use precise or eager"):
        standard_named("exact")


@pytest.mark.parametrize("dtype", ALL)
def test_precise_grants_nothing_that_plain_pytorch_errs_by(dtype: str) -> None:
    asked = torch_dtype(dtype)
    assert not PRECISE.follows_plain(asked) and PRECISE.plain_biases(asked) == 0.0 and PRECISE.scales_exactly(asked)
    scale = MEASURED_SCALE * (2.0**-29 if dtype == "fp64" else 1.0)
    assert PRECISE.stand_in(asked) == StandIn(plain=False, scale=scale)


def test_eager_is_precise_in_float64() -> None:
    assert replace(EAGER, name="precise", as_plain=False) == PRECISE, "the two differ in what is compared here alone"
    for asked in ("arithmetic", "follows_plain", "stand_in", "plain_biases", "scales_exactly"):
        device = ("cuda",) if asked == "arithmetic" else ()
        precise, eager = (getattr(standard, asked)(torch.float64, *device) for standard in (PRECISE, EAGER))
        assert precise == eager, asked


@pytest.mark.parametrize(("dtype", "biases", "exact"), [("fp32", 0, True), ("bf16", 2, True), ("fp16", 2, False)])
def test_eager_follows_plain_pytorch_in_narrower_dtypes(dtype: str, biases: float, exact: bool) -> None:
    asked = torch_dtype(dtype)
    assert EAGER.follows_plain(asked) and EAGER.stand_in(asked) == StandIn(plain=True, scale=MEASURED_SCALE)
    assert EAGER.plain_biases(asked) == biases and EAGER.scales_exactly(asked) is exact


def _comparisons(text: str) -> Iterator[str]:
    """Comparisons with a standard's name."""
    for node in ast.walk(ast.parse(text)):
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        if any(isinstance(side, ast.Constant) and side.value in STANDARDS for side in sides):
            yield ast.unparse(node)


def test_no_other_file_compares_with_the_name_of_a_standard() -> None:
    assert list(_comparisons('granted = 2 if standard == "eager" else 1')) == ["standard == 'eager'"]
    files = [path for folder in ("ktonum", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {path.relative_to(ROOT): list(_comparisons(path.read_text(encoding="utf-8"))) for path in files}
    assert not {path: lines for path, lines in found.items() if lines}
