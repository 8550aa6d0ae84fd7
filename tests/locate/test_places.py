"""Places of errors in plain masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ktonum.locate.places import find_place


def mask(*shape: int, at: Callable[[Tensor], object]) -> Tensor:
    """A mask of False, except where ``at`` sets True."""
    made = torch.zeros(shape, dtype=torch.bool)
    at(made)
    return made


PLACES = [
    ("element [2, 5]", mask(4, 8, at=lambda m: m[2, 5].fill_(True))),
    ("row 3", mask(4, 8, at=lambda m: m[3].fill_(True))),
    ("column 5", mask(4, 8, at=lambda m: m[:, 5].fill_(True))),
    ("row [1, 2]", mask(4, 8, 16, at=lambda m: m[1, 2].fill_(True))),
    ("index 1 along dim 0", mask(4, 8, 16, at=lambda m: m[1].fill_(True))),
    ("index 2 along dim 1", mask(4, 8, 16, at=lambda m: m[:, 2].fill_(True))),
    ("the last tile along dim 1, from 256 on", mask(4, 300, at=lambda m: m[:, 256:].fill_(True))),
    ("the last tile along dim 0, from 19 on", mask(24, at=lambda m: m[19:].fill_(True))),
    ("the first tile along dim 0, up to 15", mask(40, 3, at=lambda m: m[:16].fill_(True))),
    ("the tile 32 to 47 along dim 0", mask(80, 3, at=lambda m: m[32:48].fill_(True))),
    ("indices 33 to 47 along dim 0", mask(80, 3, at=lambda m: m[33:48].fill_(True))),
    (
        "the tile 16 to 31 along dim 0, the last tile along dim 1, from 64 on",
        mask(40, 70, at=lambda m: m[16:32, 64:].fill_(True)),
    ),
    ("every 3rd element, from 1 on, along dim 1", mask(4, 20, at=lambda m: m[:, 1::3].fill_(True))),
    ("every 7th element, from 3 on, in memory", mask(4, 20, at=lambda m: m.view(-1)[3::7].fill_(True))),
    ("everywhere", mask(4, 8, at=lambda m: m.fill_(True))),
    ("elements [0, 1], [3, 7]", mask(4, 8, at=lambda m: (m[0, 1].fill_(True), m[3, 7].fill_(True)))),
    ("the only element", mask(at=lambda m: m.fill_(True))),
    ("the only element", mask(1, at=lambda m: m.fill_(True))),
]


@pytest.mark.parametrize(("words", "exceeding"), PLACES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_place_is_named(words: str, exceeding: Tensor) -> None:
    place = find_place(exceeding)
    assert place.words == words
    assert place.everywhere or words not in ("everywhere", "the only element")
    inside = torch.zeros_like(exceeding)
    if exceeding.dim():
        inside[torch.meshgrid(*(torch.tensor(i) for i in place.indices), indexing="ij")] = True
        assert not bool((exceeding & ~inside).any())


def test_dims_are_called_by_their_names() -> None:
    exceeding = mask(3, 40, at=lambda m: m[:, 32:].fill_(True))
    assert find_place(exceeding, ("B", "V")).words == "the last tile along V, from 32 on"


def test_a_wrong_tile_may_have_right_elements() -> None:
    exceeding = mask(40, 30, at=lambda m: m[32:].fill_(True))
    exceeding[:, 7] = exceeding[:, 20] = exceeding[:, 29] = False
    exceeding[35, ::2] = False
    place = find_place(exceeding)
    assert place.words == "the last tile along dim 0, from 32 on"
    assert place.of(torch.ones(40, 30)).shape == (8, 30)


def test_scattered_elements_are_no_tile() -> None:
    generator = torch.Generator().manual_seed(3)
    exceeding = torch.rand(50, 60, generator=generator) < 0.05
    assert find_place(exceeding).words == f"scattered: {int(exceeding.sum())} of 3000 elements"


def test_no_element_is_no_place() -> None:
    place = find_place(torch.zeros(3, 4, dtype=torch.bool))
    assert place.words.startswith("all elements together") and place.everywhere
