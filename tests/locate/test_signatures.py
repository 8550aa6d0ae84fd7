"""Patterns of errors: each is planted in plain tensors and recognised; a right tensor has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ktonum.bounds import ErrorBound
from ktonum.locate.localise import Surroundings, localise_tensor
from ktonum.locate.wrong_constants import named_constants
from ktonum.measure.probe import Expectation, bounded_probe
from ktonum.results import BoundKind, BoundSource, Localisation

DIMS = {"B": 5, "V": 40}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bound_of(expected: Tensor, dtype: torch.dtype) -> ErrorBound:
    """Two roundings in float32 (in float64 for a float64 tensor), and the last rounding."""
    u = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return ErrorBound(u * expected.abs(), torch.zeros_like(expected), dtype, BoundSource(BoundKind.DERIVED))


def located(
    plant: Callable[[Tensor], Tensor],
    *,
    expected: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    others: dict[str, Tensor] | None = None,
) -> Localisation:
    """The localisation of a right tensor that was changed by ``plant`` and rounded to ``dtype``."""
    expected = drawn(5, 40) if expected is None else expected
    expectation = Expectation(expected, bound_of(expected, dtype))
    known = Surroundings(DIMS, {"beta": 0.3, "reduction": "mean", "with_bias": True}, others or {})
    return localise_tensor("y", plant(expected.clone()).to(dtype), expectation, known)


def put(index: object, value: Callable[[Tensor], Tensor | float]) -> Callable[[Tensor], Tensor]:
    """A change of one part of a tensor."""

    def change(tensor: Tensor) -> Tensor:
        tensor[index] = value(tensor)  # type: ignore[index]
        return tensor

    return change


def truncated(bits: int) -> Callable[[Tensor], Tensor]:
    """Keeps only this many bits of float32's significand."""

    def change(tensor: Tensor) -> Tensor:
        return (tensor.float().view(torch.int32) & -(2 ** (24 - bits))).view(torch.float32).double()

    return change


OTHER = drawn(5, 40, seed=9)
FACTORS = torch.tensor([[1.5], [2], [3], [1], [2.5]], dtype=torch.float64)
LAST_TILE = (slice(None), slice(32, None))
EVERYWHERE, LAST_ROW = "everywhere", "row 4"
LOOKS = [
    (EVERYWHERE, "sign flipped", lambda t: -t),
    (EVERYWHERE, "scaled by 2", lambda t: 2 * t),
    (EVERYWHERE, "scaled by 1/2 = 0.5", lambda t: t / 2),
    (EVERYWHERE, "scaled by 1/B = 0.2", lambda t: t / 5),
    (EVERYWHERE, "scaled by beta = 0.3", lambda t: t * 0.3),
    (EVERYWHERE, "scaled by B/(B + 1) = 0.8333", lambda t: t * 5 / 6),
    (EVERYWHERE, "scaled by -V = -40", lambda t: t * -40),
    (EVERYWHERE, "scaled by 1.0123", lambda t: t * 1.0123),
    (EVERYWHERE, "shifted by 0.75", lambda t: t + 0.75),
    (EVERYWHERE, "missing: zero", torch.zeros_like),
    (EVERYWHERE, "missing: nearly zero", lambda t: t * 1e-12),
    (LAST_ROW, "missing: zero", put(4, lambda t: 0.0)),
    (LAST_ROW, "scaled by 1/2 = 0.5", put(4, lambda t: t[4] / 2)),
    (LAST_ROW, "stale or repeated: the values of 3 along dim 0", put(4, lambda t: t[3])),
    (
        "the last tile along dim 1 (V), from 32 on",
        "stale or repeated: the values of 24 to 31 along dim 1",
        put(LAST_TILE, lambda t: t[:, 24:32].clone()),
    ),
    ("the last tile along dim 1 (V), from 32 on", "NaN in 40 of 40", put(LAST_TILE, lambda t: torch.nan)),
    ("element [2, 3]", "infinity in 1 of 1", put((2, 3), lambda t: torch.inf)),
    (EVERYWHERE, "shifted along dim 0 by 1, the rest wrapped", lambda t: t.roll(1, 0)),
    (EVERYWHERE, "shifted along dim 1 by -1", lambda t: t.roll(-1, 1)),
    (EVERYWHERE, "shifted along dim 1 by 1", lambda t: torch.cat([torch.zeros(5, 1), t[:, :-1]], 1)),
    (EVERYWHERE, "reversed along dim 1", lambda t: t.flip(1)),
    ("3 of 5 indices along dim 0 (B): 0, 1, 3", "indices along dim 0 permuted", lambda t: t[[3, 0, 2, 1, 4]]),
    (EVERYWHERE, "rounded to 8 significant bits (bf16)", lambda t: t.bfloat16().double()),
    (EVERYWHERE, "rounded to 11 significant bits (fp16 or tf32)", lambda t: t.half().double()),
    (EVERYWHERE, "truncated to 8 significant bits (bf16)", truncated(8)),
    (EVERYWHERE, "truncated to 11 significant bits", truncated(11)),
    (EVERYWHERE, "one term missing: the error is -0.3 times other", lambda t: t - 0.3 * OTHER),
    (EVERYWHERE, "low precision: a relative error of 0.0017", lambda t: t * (1 + 1.71e-3 * OTHER.sign())),
    (EVERYWHERE, "each index along dim 0 scaled by a factor of its own, from 1 to 3", lambda t: t * FACTORS),
    ("clipped", "clipped at 1 in magnitude", lambda t: t.clamp(-1, 1)),
    (EVERYWHERE, "without its sign", torch.abs),
]  # fmt: skip


@pytest.mark.parametrize(
    ("where", "looks_like", "plant"), LOOKS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_pattern_is_named(where: str, looks_like: str, plant: Callable[[Tensor], Tensor]) -> None:
    found = located(plant, others={"other": OTHER, "of another shape": drawn(3)})
    assert found.looks_like.startswith(looks_like), found
    if where == EVERYWHERE:
        assert found.where.startswith(("everywhere", "scattered", "2 of", "3 of", "4 of", "the last", "the first")), (
            found
        )
    elif where != "clipped":
        assert found.where == where, found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("looks_like", "plant"),
    [("sign flipped", lambda t: -t), ("scaled by 3/2 = 1.5", lambda t: 1.5 * t), ("missing", lambda t: 0 * t)],
)
def test_a_pattern_is_named_in_every_dtype(
    dtype: torch.dtype, looks_like: str, plant: Callable[[Tensor], Tensor]
) -> None:
    assert located(plant, dtype=dtype).looks_like.startswith(looks_like)


def test_truncating_to_the_own_dtype_is_told_from_rounding() -> None:
    expected = drawn(50, 40)
    found = located(truncated(8), expected=expected, dtype=torch.bfloat16)
    assert found.looks_like.startswith("truncated to 8 significant bits (bf16)")
    assert not located(lambda t: t, expected=expected, dtype=torch.bfloat16).looks_like.startswith("truncated")


def test_a_square_matrix_may_be_transposed() -> None:
    found = located(lambda t: t.mT.contiguous(), expected=drawn(12, 12))
    assert found.looks_like == "transposed in its last two dims"


def test_one_number_tells_what_it_may_be() -> None:
    found = located(lambda t: t * 5 / 6, expected=torch.tensor(0.6, dtype=torch.float64))
    assert found.where == "the only element"
    assert found.looks_like == "0.5 instead of 0.6: off by -0.1, or scaled by B/(B + 1) = 0.8333"


def test_a_bias_below_rounding_is_told() -> None:
    expected = drawn(500, 40)
    found = located(lambda t: t * 0.999, expected=expected, dtype=torch.bfloat16)
    assert found.looks_like.startswith("too short by 0.001 of its size on average"), found


def test_noise_has_no_pattern() -> None:
    found = located(lambda t: t + 0.5 * drawn(5, 40, seed=4), others={"other": OTHER})
    assert found.looks_like.startswith("no known pattern: relative norm 0.5"), found


def test_two_wrong_numbers_have_no_pattern() -> None:
    found = located(put(([0, 3], [2, 9]), lambda t: torch.tensor([5.0, -3.0], dtype=torch.float64)))
    assert found.where == "elements [0, 2], [3, 9]" and found.looks_like.startswith("no known pattern")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_right_tensor_has_no_place(dtype: torch.dtype) -> None:
    expected = drawn(5, 40)
    expected[0, :2] = torch.tensor([torch.nan, torch.inf])
    found = located(lambda t: t, expected=expected, dtype=dtype)
    assert found.where.startswith("all elements together") and found.looks_like.startswith("no known pattern"), found


def test_of_a_large_tensor_the_worst_stretch_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktonum.locate.localise._MOST", 80)
    found = located(put(3, lambda t: -t[3]))
    assert found.where == "in the part 2 to 3 along dim 0, counted from 2: row 1"
    assert found.looks_like == "sign flipped"
    found = located(put((4, 7), lambda t: torch.nan))
    assert found.where == "in the part 4 to 4 along dim 0, counted from 4: element [0, 7]"
    assert found.looks_like.startswith("NaN in 1 of 1")


def test_what_must_be_equal_grants_nothing() -> None:
    expected = torch.arange(1, 9)
    found = localise_tensor("target", torch.zeros_like(expected), Expectation(expected), Surroundings())
    assert found.where == "everywhere" and found.looks_like.startswith("missing")
    found = localise_tensor(
        "places", torch.tensor([True, False]), Expectation(torch.tensor([True, True])), Surroundings()
    )
    assert found.where == "element [1]"


def test_the_tolerance_is_that_of_the_measure() -> None:
    expected = drawn(5, 40)
    bound = bound_of(expected, torch.float32)
    tolerance = Expectation(expected, bound, 2.0).tolerance()
    for share, within in ((0.99, True), (1.01, False)):
        probe = bounded_probe("y", actual=expected, expected=expected, bound=lambda _: bound, scale=2.0)
        (element,) = (m for m in probe.measure(expected + share * tolerance, "precise") if m.name == "y/element")
        assert element.within is within and abs(element.use - share) < 1e-6


def test_constants_have_names_where_they_are_told_apart() -> None:
    assert named_constants(0.2, 1e-6, {"B": 5}) == ("1/B",)
    assert named_constants(0.5, 1e-6, {"B": 2, "T": 2, "H": 2, "V": 2}) == ()
    assert named_constants(0.2001, 1e-6, {"B": 5}) == ()
