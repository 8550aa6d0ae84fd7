"""Points whose dims are at and beside the edges of tiles, one, or no powers of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ktonum.declare.cases import Point
from ktonum.errors import UsageError

__all__ = ["EDGE_SIZES", "edge_points"]

#: One, around 16 and 128 (the smallest tile of a matrix unit, and a usual one), and two sizes that divide nothing.
EDGE_SIZES = (1, 15, 16, 17, 37, 127, 128, 129)


def edge_points(
    point: Point,
    vary: Sequence[str] | Mapping[str, Sequence[int]],
    *,
    checks: tuple[str, ...] = ("forward", "gradients"),
) -> tuple[Point, ...]:
    """As many points as the longest list of sizes; together they take each varied dim through each of its sizes.

    No two dims walk in step, so that a dim's edge is met beside whole tiles of the others, too.

    Args:
        point: Parameters, distribution, and the dims that stay.
        vary: The dims that vary, over `EDGE_SIZES`; or the sizes of each.
        checks: The checks to run at these points.

    Raises:
        UsageError: A name is not among the point's dims, or has no sizes.
    """
    sizes = dict(vary) if isinstance(vary, Mapping) else dict.fromkeys(vary, EDGE_SIZES)
    strange = [name for name in sizes if name not in point.dims]
    if strange or not sizes or not all(sizes.values()):
        raise UsageError(
            f"edge_points varies {', '.join(map(repr, sizes)) or 'nothing'}: name dims among "
            f"{', '.join(map(repr, point.dims))}, each with one size or more"
        )
    points = []
    for i in range(max(len(s) for s in sizes.values())):
        # Each dim starts elsewhere in its own list.
        moved = {name: s[(i + 3 * j) % len(s)] for j, (name, s) in enumerate(sizes.items())}
        points.append(replace(point, dims={**point.dims, **moved}, checks=checks, without=()))
    return tuple(points)
