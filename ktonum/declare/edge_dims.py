"""Points whose dims are one, a tile's size, next to a tile's size, or odd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ktonum.declare.cases import Point
from ktonum.errors import UsageError

__all__ = ["EDGE_SIZES", "edge_points"]

#: One; sizes around 16, the smallest tile of a matrix unit; around 128, a usual tile; and 37, which no tile divides.
EDGE_SIZES = (1, 15, 16, 17, 37, 127, 128, 129)


def edge_points(
    point: Point,
    vary: Sequence[str] | Mapping[str, Sequence[int]],
    *,
    checks: tuple[str, ...] = ("forward", "gradients"),
) -> tuple[Point, ...]:
    """Points at which each varied dim takes each of its sizes; as many points as the longest list has sizes.

    Each dim begins at another place in its list, so that an edge of one dim also meets whole tiles of the others.

    Args:
        point: The point that is varied. Its other dims, parameters and distribution stay.
        vary: The dims to vary over `EDGE_SIZES`, or the sizes for each dim.
        checks: The checks to run at these points.

    Raises:
        UsageError: ``vary`` is empty, a name is not among the point's dims, or a dim has no sizes.
    """
    sizes = dict(vary) if isinstance(vary, Mapping) else dict.fromkeys(vary, EDGE_SIZES)
    strange = [name for name in sizes if name not in point.dims]
    if strange or not sizes or not all(sizes.values()):
        raise UsageError(
            f"edge_points, vary = {', '.join(map(repr, sizes)) or 'nothing'}: pass dims among "
            f"{', '.join(map(repr, point.dims))}, each with at least one size"
        )
    points = []
    for i in range(max(len(s) for s in sizes.values())):
        # Each dim begins at another place in its list.
        moved = {name: s[(i + 3 * j) % len(s)] for j, (name, s) in enumerate(sizes.items())}
        points.append(replace(point, dims={**point.dims, **moved}, checks=checks, without=()))
    return tuple(points)
