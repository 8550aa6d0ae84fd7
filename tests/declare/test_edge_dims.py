"""Sizes at the edges of tiles: each occurs, right ops pass there, and a defect that shows only there is flagged."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from ktonum.auditing.in_process import audit
from ktonum.declare.cases import Point
from ktonum.declare.edge_dims import EDGE_SIZES, edge_points
from ktonum.declare.op import Op
from ktonum.errors import UsageError
from ktonum.results import Verdict
from subjects.planted import ALL, last_row_zero
from subjects.small_ops import LOSS_POINT, NORM_POINT, RMS_NORM, SOFTMAX_LOSS, softmax_loss_with

POINT = Point({"B": 2, "T": 5, "H": 7}, {"scale": 1.5}, without=("gradcheck",))


def test_every_dim_takes_every_size_and_no_two_walk_in_step() -> None:
    points = edge_points(POINT, ("T", "H"))
    for name in ("T", "H"):
        assert sorted(p.dims[name] for p in points) == sorted(EDGE_SIZES)
    assert all(p.dims["T"] != p.dims["H"] for p in points)
    assert all(p.dims["B"] == 2 and p.parameters == POINT.parameters for p in points)
    assert all(p.checks == ("forward", "gradients") and not p.without for p in points)


def test_sizes_of_ones_own() -> None:
    points = edge_points(POINT, {"B": (1, 2), "T": (3, 4, 5)})
    assert [p.dims["B"] for p in points] == [1, 2, 1]
    assert sorted(p.dims["T"] for p in points) == [3, 4, 5]


@pytest.mark.parametrize("vary", [("N",), (), {"T": ()}])
def test_what_cannot_vary_is_refused(vary: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="'B', 'T', 'H'"):
        edge_points(POINT, vary)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(
    "op",
    [
        replace(SOFTMAX_LOSS, dims=edge_points(LOSS_POINT, ("N", "V"))),
        replace(RMS_NORM, dims=edge_points(NORM_POINT, ("N", "H"))),
        replace(RMS_NORM, dims=edge_points(NORM_POINT, ("N", "H")), error_model=None),
    ],
    ids=["softmax_loss", "rms_norm", "rms_norm-measured"],
)
def test_right_ops_pass_at_every_edge(op: Op, dtype: str) -> None:
    report = audit(op, dtypes=dtype, device="cpu")
    assert len(report.results) == 2 * len(EDGE_SIZES)
    assert report.ok, [(r.case, r.reason) for r in report.failures]


def _last_column_lost(tensor: Tensor) -> Tensor:
    """A grid that is rounded down and leaves out a tile of one element."""
    return last_row_zero(tensor.T).T if tensor.shape[1] % 16 == 1 else tensor


def test_a_defect_beside_a_tile_edge_is_flagged_there_alone() -> None:
    op = replace(SOFTMAX_LOSS, candidate=softmax_loss_with(gradient={"x": _last_column_lost}))
    assert audit(op, dtypes="fp32", device="cpu").ok
    report = audit(replace(op, dims=edge_points(LOSS_POINT, ("V",))), dtypes="fp32", device="cpu")
    failed = {r.case for r in report.results if r.verdict is Verdict.FAIL}
    assert {case.partition("V=")[2].partition(",")[0] for case in failed} == {"17", "129"}
