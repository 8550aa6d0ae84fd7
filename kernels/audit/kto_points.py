"""The points at which the KTO loss is audited: a few for every branch, the edges of tiles, and production sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ktonum.declare.cases import Point
from ktonum.declare.edge_dims import EDGE_SIZES, edge_points

__all__ = ["KTO_POINTS"]

# The KL reference point is detached by definition. Finite differences include the weight's influence through it, and
# the gradient does not.
_DETACHED_KL = ("gradcheck",)
_PRODUCTION = ("forward", "gradients", "determinism", "peak_memory")
# Averages do not saturate the sigmoid; sums over thousands of tokens do.
_AVERAGES = {"average_log_prob": True, "with_bias": True}
_GROWING = Point({"B": 1, "T": 4, "H": 24, "V": 40}, _AVERAGES, checks=("growth",))
# Many elements in few tiles: each draw says much about a bias, so few draws are needed.
_BIASED = Point({"B": 2, "T": 16, "H": 32, "V": 64}, _AVERAGES, checks=("bias",))
# Checks with long runs at many sizes or draws. Only `_GROWING` and `_BIASED` have them.
_LONG = ("bias", "growth")
# Checks of many runs each, which take long in Triton's interpreter. In the quick profile only the first point, which
# needs nothing that published losses lack, and the fifth have them.
_MANY_RUNS = ("gradient_subsets", "nonfinite", "upstream", "graph", "autocast", "special_values")
_EVERY_BRANCH = (
    # Several tiles along every dimension, the last one cut. Its finite differences alone would take a third of the
    # audit's time, and those of the third point cross tiles as well.
    Point({"B": 3, "T": 47, "H": 136, "V": 300}, without=("gradcheck",)),
    Point(
        {"B": 4, "T": 19, "H": 40, "V": 331},
        {"with_bias": True, "kl_from": "sequences", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        without=_DETACHED_KL,
    ),
    Point(
        {"B": 3, "T": 21, "H": 70, "V": 270},
        {
            "with_bias": True,
            "kl_from": "scalar",
            "average_log_prob": True,
            "ignore_index": 5,
            "beta": 0.7,
            "chunk_size": 2,
        },
    ),
    Point(
        {"B": 2, "T": 17, "H": 17, "V": 129},
        {"loss_type": "apo_zero_unpaired", "reduction": "sum", "reference_from": "logps", "with_bias": True},
    ),
    Point(
        {"B": 5, "T": 9, "H": 48, "V": 37},
        {"reduction": "none", "kl_from": "batch", "reference_from": "none", "beta": 0.05},
    ),
)

# Every edge of every dim; the quick profile runs every other one.
_EDGES = edge_points(
    Point({"B": 2, "T": 1, "H": 1, "V": 1}, {"with_bias": True}), {"B": (1, 2, 3), **dict.fromkeys("THV", EDGE_SIZES)}
)


def _but(points: Sequence[Point], checks: tuple[str, ...]) -> tuple[Point, ...]:
    return tuple(point.but(*checks) for point in points)


_POINTS = _but(_EVERY_BRANCH, _LONG)
_QUICK = (
    _POINTS[0],
    *_but(_POINTS[1:4], _MANY_RUNS),
    _POINTS[4],
    # The longest check in the interpreter. Here two dtypes have it, in the full profile all four.
    replace(_GROWING, dtypes=("bf16", "fp32")),
    _BIASED,
    *_EDGES[::2],
)

_LARGER = _but(
    (
        Point({"B": 1, "T": 1, "H": 1, "V": 1}),
        # As many tokens as sequences in a chunk, because liger-kernel 0.8.2 multiplies labels along the wrong one.
        Point({"B": 4, "T": 4, "H": 16, "V": 24}, {"chunk_size": 4, "masked": 0.9}),
        Point({"B": 2, "T": 128, "H": 256, "V": 512}, {"with_bias": True}),
        Point({"B": 2, "T": 129, "H": 257, "V": 1025}, {"average_log_prob": True, "masked": 1.0}),
        Point(
            {"B": 4, "T": 256, "H": 1024, "V": 32000},
            {"kl_from": "sequences"},
            without=_DETACHED_KL,
            devices=("cuda",),
        ),
    ),
    _LONG,
)

#: By profile.
KTO_POINTS: dict[str, tuple[Point, ...]] = {
    "quick": _QUICK,
    "full": (
        *_POINTS,
        _GROWING,
        _BIASED,
        *_EDGES,
        *_LARGER,
        *(
            Point(dims, {"masked": 0.0}, checks=_PRODUCTION, dtypes=("bf16", "fp16", "fp32"), devices=("cuda",))
            for V in (128_256, 151_936)
            for dims in ({"B": 8, "T": 1024, "H": 4096, "V": V}, {"B": 2, "T": 8192, "H": 4096, "V": V})
        ),
    ),
}
