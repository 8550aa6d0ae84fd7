"""Which exponentials are stored, and how the others are cut into slabs."""

from __future__ import annotations

import itertools

import pytest
import torch

from ktonum.kernels.device.slabs import SlabPlan, Stretch, Workspace, stored_size
from support.combinations import combinations

#: Of everything, in numbers; rows lie a multiple of 64 apart.
EVERYTHING = {(1, 1): 64, (5, 64): 320, (7, 65): 7 * 128, (3, 300): 960, (100, 1000): 102_400}
SHAPES = [*EVERYTHING, (1, 257), (64, 513), (9, 4096), (300, 5000)]
ITEMSIZES = [2, 4, 8]
#: Whether the forward stores in the gradient's memory.
IN_GRADIENT = {"computed": False, "stored": True}


def planned(rows: int, vocabulary: int, itemsize: int, workspace: int, unmasked: int | None = None) -> SlabPlan:
    return SlabPlan.of(
        rows if unmasked is None else unmasked,
        vocabulary,
        stored_size(rows, vocabulary, itemsize, Workspace(workspace)),
    )


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("shape", EVERYTHING, ids=str)
def test_everything_is_stored_if_and_only_if_it_fits(shape: tuple[int, int], itemsize: int) -> None:
    size = EVERYTHING[shape]
    assert stored_size(*shape, itemsize, Workspace(size * itemsize)) == size
    assert planned(*shape, itemsize, size * itemsize).columns == shape[1]
    assert stored_size(*shape, itemsize, Workspace(size * itemsize - 1)) == 0
    assert planned(*shape, itemsize, size * itemsize - 1).columns == 0
    assert stored_size(*shape, itemsize, Workspace(2**50)) == size, "no more than there is"


@pytest.mark.parametrize("rows", [0, 1, 5, 64])
def test_masked_tokens_leave_room_for_others(rows: int) -> None:
    """What is stored is sized by all tokens and laid out for the unmasked ones."""
    plan = planned(64, 513, 2, 64 * 576 * 2, unmasked=rows)
    assert rows == 0 or plan.columns == 513
    # Not all of 64 rows fit, all of 5 do.
    slabs_of_some = SlabPlan.of(rows, 513, 5 * 576)
    assert rows == 0 or (slabs_of_some.columns == 513) == (rows <= 5)


def workspaces(rows: int, vocabulary: int, itemsize: int, at_a_time: int) -> list[Workspace]:
    """From one byte to room for all, among them those at which another 256 columns just fit, or just do not."""
    steps = [rows * columns * itemsize for columns in (256, 512, vocabulary)]
    around = [base + step + off for base in (0, at_a_time) for step in (0, *steps) for off in (-1, 0, 1)]
    return [Workspace(size, at_a_time) for size in sorted({w for w in around if w > 0})]


@pytest.fixture(params=[1, 10_000, 2**40], ids=["narrow", "some", "wide"])
def at_a_time(request: pytest.FixtureRequest) -> int:
    """Bytes of exponentials that a backward computes at a time."""
    found: int = request.param
    return found


def columns_of(plan: SlabPlan, workspace: Workspace, itemsize: int) -> list[Stretch]:
    """All stretches, in the order a backward takes them."""
    in_workspace = [Stretch(0, plan.columns)] if plan.columns else []
    return [*in_workspace, *plan.in_gradient, *plan.computed(workspace, itemsize)]


@combinations("shape, hidden, in_gradient", SHAPES, [0, 16, 64, 4096], IN_GRADIENT, strength=2)
def test_slabs_cover_the_vocabulary_once(
    shape: tuple[int, int], hidden: int, in_gradient: bool, at_a_time: int
) -> None:
    rows, vocabulary = shape
    for itemsize in ITEMSIZES:
        for workspace in workspaces(rows, vocabulary, itemsize, at_a_time):
            size = stored_size(rows, vocabulary, itemsize, workspace)
            plan = SlabPlan.of(rows, vocabulary, size, hidden=hidden, in_gradient=in_gradient)
            found = columns_of(plan, workspace, itemsize)
            assert all(s.first < s.last for s in found)
            assert all(s.first % 256 == 0 for s in found)
            assert [s.first for s in found] == [0, *(s.last for s in found[:-1])]
            assert found[-1].last == vocabulary


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_stays_within_the_workspace(shape: tuple[int, int], at_a_time: int) -> None:
    """But for the narrowest slab, of 256 columns."""
    rows, vocabulary = shape
    partly = 0
    for itemsize in ITEMSIZES:
        for workspace in workspaces(rows, vocabulary, itemsize, at_a_time):
            stored = stored_size(rows, vocabulary, itemsize, workspace)
            plan = SlabPlan.of(rows, vocabulary, stored)
            partly += 0 < plan.columns < vocabulary
            assert plan.stored(torch.empty(stored, dtype=torch.uint8), None) or not plan.columns
            computed = plan.own_size(workspace, itemsize)
            assert computed * itemsize <= max(workspace.size, rows * 256 * itemsize)
            if computed > rows * 256:
                assert computed * itemsize <= at_a_time
                assert (stored + computed) * itemsize <= workspace.size
            else:
                assert stored * itemsize <= workspace.size
    if at_a_time <= 10_000 and vocabulary > 512:
        assert partly, "some workspace must leave room for a part"


@combinations("shape, hidden", SHAPES, [256, 300, 4096], ids=str)
def test_what_takes_the_place_of_the_hidden_states_is_no_larger(
    shape: tuple[int, int], hidden: int, at_a_time: int
) -> None:
    rows, vocabulary = shape
    for itemsize, size in itertools.product(ITEMSIZES, (1, rows * 512 * 4)):
        workspace = Workspace(size, at_a_time)
        plan = SlabPlan.of(rows, vocabulary, 0, hidden=hidden)
        if plan.instead_of_input(workspace, itemsize):
            assert plan.own_size(workspace, itemsize) <= rows * hidden
        else:
            assert plan.own_size(workspace, itemsize) * itemsize <= size


@combinations(
    "shape, hidden, in_gradient",
    [*SHAPES, (16, 20_000), (40, 9_999), (600, 30_000)],
    [16, 24, 77, 512, 4096],
    IN_GRADIENT,
    strength=2,
)
def test_no_slab_is_overwritten_before_it_was_read(
    shape: tuple[int, int], hidden: int, in_gradient: bool, at_a_time: int
) -> None:
    """A forward writes its slabs; a backward reads each in turn and then writes its columns' rows of the gradient."""
    rows, vocabulary = shape
    itemsize, workspace = 2, Workspace(rows * 512, at_a_time)
    size = stored_size(rows, vocabulary, itemsize, workspace)
    plan = SlabPlan.of(rows, vocabulary, size, hidden=hidden, in_gradient=in_gradient)
    # Numbers of slabs reach 31,000; half a gigabyte of wider ones would take most of the time.
    owner = torch.full((vocabulary * hidden,), -1, dtype=torch.int16)

    def claim(stretch: Stretch, number: int) -> None:
        plan.slab(stretch, owner).exponentials.fill_(number)

    def intact(stretch: Stretch, number: int) -> bool:
        # The gradient's rows are written while the slab is still being read.
        owner[stretch.first * hidden : stretch.last * hidden] = -2
        return stretch.place is None or bool((plan.slab(stretch, owner).exponentials == number).all())

    for number, stretch in enumerate(plan.in_gradient):
        claim(stretch, number)
    found = columns_of(plan, workspace, itemsize)
    for stretch in found:
        if stretch in plan.in_gradient:
            assert intact(stretch, plan.in_gradient.index(stretch))
        else:
            if stretch.place is not None:
                claim(stretch, 1000 + stretch.first)
            assert intact(stretch, 1000 + stretch.first)
    assert bool((owner == -2).all()), "the whole gradient was written"


def test_as_much_is_stored_in_the_gradient_as_its_memory_holds() -> None:
    """N tokens need N / H times the memory: half of the columns of 8,192 tokens at H = 4,096, less a margin."""
    for rows, least, most in ((2048, 0.99, 1.0), (4096, 0.9, 1.0), (8192, 0.45, 0.5), (16_384, 0.22, 0.25)):
        plan = SlabPlan.of(rows, 151_936, 0, hidden=4096, in_gradient=True)
        stored = plan.in_gradient[-1].last / 151_936
        assert least < stored <= most
        assert len(plan.in_gradient) <= 16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_slabs_lie_a_multiple_of_64_apart(shape: tuple[int, int]) -> None:
    rows, vocabulary = shape
    flat = torch.arange(stored_size(rows, vocabulary, 2, Workspace(2**40)))
    (slab,) = SlabPlan.of(rows, vocabulary, flat.numel()).stored(flat, None)
    e = slab.exponentials
    assert slab.first_column == 0
    assert e.shape == shape
    assert e.stride(0) % 64 == 0 and e.stride(1) == 1
    assert e.data_ptr() == flat.data_ptr()
    assert vocabulary <= e.stride(0) < vocabulary + 64
    assert e.unique().numel() == e.numel(), "no two entries share a place"


def test_nothing_is_stored_or_computed_for_no_rows() -> None:
    flat = torch.empty(1000)
    plan = SlabPlan.of(0, 300, flat.numel(), hidden=64, in_gradient=True)
    assert plan.stored(flat, None) == []
    assert plan.in_gradient == ()
    assert list(plan.computed(Workspace(10**6), 2)) == []
    assert plan.own_size(Workspace(10**6), 2) == 0
    assert stored_size(0, 300, 2, Workspace(1)) == 0
