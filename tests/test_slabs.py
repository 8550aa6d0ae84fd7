"""Which exponentials are stored, and how the others are cut into slabs."""

from __future__ import annotations

import itertools

import pytest
import torch

from ktonum.kernels import slabs
from ktonum.kernels.slabs import SlabPlan, stored_size

#: Of everything, in numbers; rows lie a multiple of 64 apart.
EVERYTHING = {(1, 1): 64, (5, 64): 320, (7, 65): 7 * 128, (3, 300): 960, (100, 1000): 102_400}
SHAPES = [*EVERYTHING, (1, 257), (64, 513), (9, 4096), (300, 5000)]
ITEMSIZES = [2, 4, 8]


def planned(rows: int, vocabulary: int, itemsize: int, workspace: int, unmasked: int | None = None) -> SlabPlan:
    return SlabPlan.of(
        rows if unmasked is None else unmasked, vocabulary, stored_size(rows, vocabulary, itemsize, workspace)
    )


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("shape", EVERYTHING, ids=str)
def test_everything_is_stored_if_and_only_if_it_fits(shape: tuple[int, int], itemsize: int) -> None:
    size = EVERYTHING[shape]
    assert stored_size(*shape, itemsize, size * itemsize) == size
    assert planned(*shape, itemsize, size * itemsize).columns == shape[1]
    assert stored_size(*shape, itemsize, size * itemsize - 1) == 0
    assert planned(*shape, itemsize, size * itemsize - 1).columns == 0
    assert stored_size(*shape, itemsize, 2**50) == size, "no more than there is"


@pytest.mark.parametrize("rows", [0, 1, 5, 64])
def test_masked_tokens_leave_room_for_others(rows: int) -> None:
    """What is stored is sized by all tokens and laid out for the unmasked ones."""
    plan = planned(64, 513, 2, 64 * 576 * 2, unmasked=rows)
    assert rows == 0 or plan.columns == 513
    # Not all of 64 rows fit, all of 5 do.
    slabs_of_some = SlabPlan.of(rows, 513, 5 * 576)
    assert rows == 0 or (slabs_of_some.columns == 513) == (rows <= 5)


def workspaces(rows: int, vocabulary: int, itemsize: int) -> list[int]:
    """From one byte to room for all, among them those at which another 256 columns just fit, or just do not."""
    at_a_time = slabs._COMPUTED_AT_A_TIME
    steps = [rows * columns * itemsize for columns in (256, 512, vocabulary)]
    around = [base + step + off for base in (0, at_a_time) for step in (0, *steps) for off in (-1, 0, 1)]
    return sorted({w for w in around if w > 0})


@pytest.fixture(params=[1, 10_000, 2**40], ids=["narrow", "some", "wide"])
def at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "_COMPUTED_AT_A_TIME", request.param)


@pytest.mark.usefixtures("at_a_time")
@pytest.mark.parametrize("spare", [0, 16, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_computed_slabs_cover_exactly_what_is_not_stored(shape: tuple[int, int], spare: int) -> None:
    rows, vocabulary = shape
    for itemsize in ITEMSIZES:
        for workspace in workspaces(rows, vocabulary, itemsize):
            plan = planned(rows, vocabulary, itemsize, workspace)
            found = [(first, last) for first, last, _ in plan.computed(workspace, itemsize, spare)]
            assert all(first < last for first, last in found)
            assert plan.columns == vocabulary or plan.columns % 256 == 0
            assert all(first % 256 == 0 for first, _ in found)
            ends = [0, plan.columns, *(last for _, last in found)]
            assert ends[-1] == vocabulary
            assert [first for first, _ in found] == ends[1:-1]


@pytest.mark.usefixtures("at_a_time")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_stays_within_the_workspace(shape: tuple[int, int]) -> None:
    """But for the narrowest slab, of 256 columns."""
    rows, vocabulary = shape
    partly = 0
    for itemsize in ITEMSIZES:
        for workspace in workspaces(rows, vocabulary, itemsize):
            stored = stored_size(rows, vocabulary, itemsize, workspace)
            plan = SlabPlan.of(rows, vocabulary, stored)
            partly += 0 < plan.columns < vocabulary
            assert plan.stored(torch.empty(stored, dtype=torch.uint8)) is not None or not plan.columns
            computed = plan.computed_size(workspace, itemsize)
            assert computed * itemsize <= max(workspace, rows * 256 * itemsize)
            if computed > rows * 256:
                assert computed * itemsize <= slabs._COMPUTED_AT_A_TIME
                assert (stored + computed) * itemsize <= workspace
            else:
                assert stored * itemsize <= workspace
    if slabs._COMPUTED_AT_A_TIME <= 10_000 and vocabulary > 512:
        assert partly, "some workspace must leave room for a part"


@pytest.mark.usefixtures("at_a_time")
@pytest.mark.parametrize("spare", [16, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slabs_in_spare_memory_lie_behind_what_is_still_to_be_written(shape: tuple[int, int], spare: int) -> None:
    rows, vocabulary = shape
    for itemsize, workspace in itertools.product(ITEMSIZES, (1, rows * 512 * 4)):
        plan = planned(rows, vocabulary, itemsize, workspace)
        size = plan.computed_size(workspace, itemsize, spare)
        for first, last, fits in plan.computed(workspace, itemsize, spare):
            room = (vocabulary - last) * spare if fits else size
            slab = plan.within(torch.empty(room, dtype=torch.uint8), last - first)
            assert slab.shape == (rows, last - first)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_slabs_lie_a_multiple_of_64_apart(shape: tuple[int, int]) -> None:
    rows, vocabulary = shape
    flat = torch.arange(stored_size(rows, vocabulary, 2, 2**40))
    slab = SlabPlan.of(rows, vocabulary, flat.numel()).stored(flat)
    assert slab is not None
    assert slab.shape == shape
    assert slab.stride(0) % 64 == 0 and slab.stride(1) == 1
    assert slab.data_ptr() == flat.data_ptr()
    assert vocabulary <= slab.stride(0) < vocabulary + 64
    assert slab.unique().numel() == slab.numel(), "no two entries share a place"


def test_nothing_is_stored_or_computed_for_no_rows() -> None:
    flat = torch.empty(1000)
    plan = SlabPlan.of(0, 300, flat.numel())
    assert plan.stored(flat) is None
    assert list(plan.computed(10**6, 2)) == []
    assert plan.computed_size(10**6, 2) == 0
    assert stored_size(0, 300, 2, 1) == 0
