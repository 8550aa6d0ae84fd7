"""Parameters of tests in every combination, or as statistics want them, of which a few are part of the default run."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from subjects.planted import SIXTEEN_BIT

__all__ = ["combinations", "covering", "few_or_many", "in_dtypes"]


def covering(axes: Sequence[Sequence[Any]], *, strength: int = 1) -> list[int]:
    """Places, in ``itertools.product(*axes)``, of combinations that have every choice from ``strength`` axes.

    With strength 1 every value occurs, with strength 2 every pair of values of two axes. Greedy: each combination taken
    has the most choices that none before it has, and among such ones the values that were taken least.
    """
    everything = list(itertools.product(*(range(len(axis)) for axis in axes)))
    chosen_from = list(itertools.combinations(range(len(axes)), min(strength, len(axes))))
    choices = [
        {(among, tuple(combination[axis] for axis in among)) for among in chosen_from} for combination in everything
    ]
    missing = set().union(*choices)
    taken: list[int] = []
    used: Counter[tuple[int, int]] = Counter()
    while missing:
        best = max(
            range(len(everything)),
            key=lambda place: (
                len(missing & choices[place]),
                -sum(used[pair] for pair in enumerate(everything[place])),
            ),
        )
        missing -= choices[best]
        used.update(enumerate(everything[best]))
        taken.append(best)
    return taken


def combinations(
    names: str, *axes: Iterable[Any] | Mapping[str, Any], strength: int = 1, ids: Any = None
) -> pytest.MarkDecorator:
    """Parametrise a test by every combination of the axes' values; those beyond `covering` are marked exhaustive.

    Args:
        names: The test's arguments, comma-separated, one for each axis.
        axes: The values of each argument; in a test's id the keys of a mapping stand for its values.
        strength: See `covering`.
        ids: What names a value in a test's id; see `pytest.mark.parametrize`. Not with a mapping among the axes, where
            `str` names all other values.
    """
    values = [list(axis.values()) if isinstance(axis, Mapping) else list(axis) for axis in axes]
    if any(isinstance(axis, Mapping) for axis in axes):
        labels = [map(str, axis if isinstance(axis, Mapping) else v) for axis, v in zip(axes, values, strict=True)]
        ids = ["-".join(label) for label in itertools.product(*labels)]
    kept = set(covering(values, strength=strength))
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*combination, marks=() if place in kept else (pytest.mark.exhaustive,))
            for place, combination in enumerate(itertools.product(*values))
        ],
        ids=ids,
    )


def few_or_many(name: str, few: int, many: int) -> pytest.MarkDecorator:
    """Run a test on ``few`` seeds, and on ``many`` where statistics are asked for."""
    return pytest.mark.parametrize(name, [few, pytest.param(many, marks=pytest.mark.exhaustive)])


def in_dtypes(
    name: str, dtypes: Sequence[str], flagged_by: Sequence[str]
) -> Iterator[tuple[str, tuple[pytest.MarkDecorator, ...]]]:
    """Each dtype with the marks of a test that plants the defect called ``name`` in it.

    By default it is planted in one dtype of 16 bits and in a wider one, which its name chooses; `gradcheck` applies to
    float64 alone. The others are exhaustive.
    """
    narrow, wide = ([d for d in dtypes if (d in SIXTEEN_BIT) is short] for short in (True, False))
    if "gradcheck" in flagged_by:
        wide = ["fp64"]
    kept = {among[zlib.crc32(name.encode()) % len(among)] for among in (narrow, wide) if among}
    for dtype in dtypes:
        yield dtype, () if dtype in kept else (pytest.mark.exhaustive,)
