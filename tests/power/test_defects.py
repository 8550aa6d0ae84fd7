"""Planted defects fit their names, do not change the sound tensor, and return None where they do not apply."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ktonum.declare.cases import torch_dtype
from ktonum.power import arithmetic_defects as precision
from ktonum.power import defect
from ktonum.power import element_defects as elements
from ktonum.power import row_defects as rows
from ktonum.power import tile_defects as tiles
from ktonum.power import whole_tensor_defects as whole
from ktonum.power.defect_kinds import DEFECTS, SIZED_DEFECTS, Defect, SizedDefect, Sound
from subjects.planted import ALL

DTYPES = [torch_dtype(name) for name in ALL]


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def masked(dtype: torch.dtype = torch.float64) -> Tensor:
    """Six rows; the second and the last are zero."""
    tensor = normal(6, 5, dtype=dtype)
    tensor[[1, 5]] = 0
    return tensor


def words_of(defect: Defect | SizedDefect) -> str:
    return f"{defect.name}, {defect.unit}" if isinstance(defect, SizedDefect) else defect.name


def planted_in(sound: Sound) -> dict[str, Tensor]:
    """The defective tensor of every kind that applies, by the kind's words."""
    found = {d.name: d.plant(sound) for d in DEFECTS} | {words_of(d): d.plant(sound, 0.5) for d in SIZED_DEFECTS}
    return {words: tensor for words, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_defect_keeps_shape_and_dtype_and_spares_the_sound_tensor(dtype: torch.dtype) -> None:
    exact = masked()
    # A view that is not contiguous and shares its memory.
    actual = torch.stack([exact, exact], -1).to(dtype)[..., 0]
    before = actual.clone()
    planted = planted_in(Sound(actual, exact))
    assert len(planted) >= 13
    for words, tensor in planted.items():
        assert (tensor.shape, tensor.dtype) == (actual.shape, dtype), words
        assert words == "truncated" or not torch.equal(tensor, actual) or dtype == torch.bfloat16, words
    assert torch.equal(actual, before)


def test_every_kind_applies_somewhere_and_has_a_name_of_its_own() -> None:
    tensors = [masked(dtype) for dtype in DTYPES] + [torch.zeros(3), torch.arange(3)]
    applying = {words for tensor in tensors for words in planted_in(Sound(tensor, tensor.double()))}
    kinds = [words_of(d) for d in (*DEFECTS, *SIZED_DEFECTS)]
    assert applying == set(kinds) and len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("tensor", [torch.zeros(0), torch.zeros(0, 4), torch.zeros(4, 0), torch.zeros(0).long()])
def test_nothing_is_planted_in_nothing(tensor: Tensor) -> None:
    assert planted_in(Sound(tensor, tensor)) == {}


def test_zeros_have_one_defect_and_a_number_has_no_rows() -> None:
    assert set(planted_in(Sound(torch.zeros(3, 4)))) == {
        "one element, off by size × one",
        "last tile stale",
        "rounded to TF32",
        "added up in bf16",
    }
    number = set(planted_in(Sound(torch.tensor(1.5), torch.tensor(1.4, dtype=torch.float64))))
    assert number == {
        "sign flipped", "halved", "scaling, by 1 + size", "truncated", "rounded to TF32", "added up in bf16"
    }  # fmt: skip


def test_factors_and_signs() -> None:
    tensor = masked()
    sound = Sound(tensor)
    assert torch.equal(whole.SCALING.plant(sound, 0.5), 1.5 * tensor)  # type: ignore[arg-type]
    assert torch.equal(whole.SIGN.plant(sound), -tensor)  # type: ignore[arg-type]
    assert torch.equal(whole.HALVED.plant(sound), tensor / 2)  # type: ignore[arg-type]


def test_a_missing_term_is_as_large_everywhere_and_has_nothing_to_do_with_the_tensor() -> None:
    tensor = normal(300, 100)
    planted = whole.DROPPED_TERM.plant(Sound(tensor), 0.25)
    assert planted is not None
    error = planted - tensor
    assert torch.allclose(error.abs(), 0.25 * tensor.abs(), rtol=1e-12)
    for squares in (error * tensor, tensor.square() * defect.signs(0, tensor.numel(), tensor.device).view_as(tensor)):
        # If signs are random, a sum over n elements is of size √n, also within each row and each column.
        assert abs(float(squares.sum())) < 4 * float(tensor.square().square().sum().sqrt())
    by_row = defect.signs(0, tensor.numel(), tensor.device).view_as(tensor)
    assert float(by_row.mean(0).abs().amax()) < 4 / math.sqrt(300) and float(by_row.mean(1).abs().amax()) < 0.4


def test_signs_of_a_stretch_are_those_of_the_whole() -> None:
    everything = defect.signs(0, 1000, torch.device("cpu"))
    assert torch.equal(everything[300:], defect.signs(300, 700, torch.device("cpu")))
    assert set(everything.tolist()) == {-1.0, 1.0} and everything[0] == 1


def test_one_element_is_the_middle_one_and_its_size_that_of_all() -> None:
    tensor = normal(5, 7)
    planted = elements.ELEMENT.plant(Sound(tensor), 0.5)
    assert planted is not None
    error = planted - tensor
    assert error.nonzero().tolist() == [[2, 3]]
    assert float(error[2, 3]) == pytest.approx(0.5 * float(tensor.square().mean().sqrt()))
    assert elements.ELEMENT_OF_ZEROS.plant(Sound(tensor), 0.5) is None


def test_one_element_and_one_row_are_of_middle_size() -> None:
    """Zero and NaN are left out. A defect would be invisible in the smallest element and obvious in the largest."""
    sizes = torch.tensor([0.0, 1e-9, 1.0, 2.0, 3.0, 1e9, math.nan], dtype=torch.float64)
    planted = elements.ELEMENT_SIGN.plant(Sound(sizes))
    assert planted is not None and planted.tolist()[:6] == [0.0, 1e-9, 1.0, -2.0, 3.0, 1e9]
    matrix = sizes.unsqueeze(1) * torch.tensor([1.0, -0.5], dtype=torch.float64)
    for kind, factor in ((rows.ROW_ZERO, 0.0), (rows.ROW_SIGN, -1.0)):
        changed = kind.plant(Sound(matrix))
        assert changed is not None
        assert torch.equal(changed[3], factor * matrix[3]) and torch.equal(changed[:3], matrix[:3])
    scaled = rows.ROW.plant(Sound(matrix), 0.5)
    assert scaled is not None and torch.equal(scaled[3], 1.5 * matrix[3]) and torch.equal(scaled[4:6], matrix[4:6])


def test_rows_are_those_of_the_last_dim() -> None:
    tensor = normal(2, 3, 4)
    planted = rows.ROW_ZERO.plant(Sound(tensor))
    assert planted is not None
    assert (planted == 0).all(-1).sum() == 1 and (planted == 0).sum() == 4
    assert rows.ROW_ZERO.plant(Sound(normal(1, 4))) is None and rows.ROW_ZERO.plant(Sound(normal(4))) is None


@pytest.mark.parametrize(("count", "tile"), [(2, 1), (9, 4), (40, 16)])
def test_a_stale_tile_holds_what_the_rows_before_it_do(count: int, tile: int) -> None:
    for tensor in (normal(count, 3), normal(count)):
        planted = tiles.STALE_TILE.plant(Sound(tensor))
        assert planted is not None
        assert torch.equal(planted[:-tile], tensor[:-tile])
        assert torch.equal(planted[-tile:], tensor[-2 * tile : -tile])
    assert tiles.STALE_TILE.plant(Sound(normal(1, 3))) is None


def test_a_mask_is_off_by_the_row_beside_its_edge() -> None:
    tensor = masked()
    short, far = tiles.MASK_TOO_SHORT.plant(Sound(tensor)), tiles.MASK_TOO_FAR.plant(Sound(tensor))
    assert short is not None and far is not None
    assert torch.equal(short[1], tensor[0]) and torch.equal(short[[0, 2, 3, 4, 5]], tensor[[0, 2, 3, 4, 5]])
    assert not far[0].any() and torch.equal(far[1:], tensor[1:])
    before = tiles.MASK_TOO_SHORT.plant(Sound(tensor.flip(0)))
    assert before is not None and torch.equal(before[0], tensor[4]), "the masked row may come before the edge"
    assert tiles.MASK_TOO_SHORT.plant(Sound(normal(4, 3))) is None, "no row is masked"


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_truncating_store_is_that(dtype: torch.dtype) -> None:
    """Numbers of both signs, zero and powers of two, compared with numbers whose significands are truncated."""
    exact = torch.cat([normal(1000), torch.tensor([0.0, 1.0, -2.0, 2 - 1e-12], dtype=torch.float64)])
    planted = precision.TRUNCATED.plant(Sound(exact.to(dtype), exact))
    significand, exponent = torch.frexp(exact)
    steps = 2 / torch.finfo(dtype).eps
    truncated = torch.ldexp((significand * steps).trunc() / steps, exponent)
    assert planted is not None and torch.equal(planted.double(), truncated)


def test_where_the_wide_number_is_not_known_half_of_all_elements_are_one_unit_less() -> None:
    tensor = normal(4000).abs()
    planted = precision.TRUNCATED.plant(Sound(tensor, tensor.clone()))
    assert planted is not None
    below = torch.nextafter(tensor, torch.zeros_like(tensor))
    moved = planted != tensor
    assert torch.equal(planted, torch.where(moved, below, tensor)) and 0.45 < float(moved.double().mean()) < 0.55
    assert precision.TRUNCATED.plant(Sound(tensor)) is None, "there is no single expected tensor"


def test_tf32_has_eleven_bits_and_rounds_to_nearest() -> None:
    (kind,) = (d for d in precision.ROUNDED if d.name == "rounded to TF32")
    numbers = torch.cat([normal(2000, dtype=torch.float32), torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, -(2 - 2**-12)])])
    planted = kind.plant(Sound(numbers))
    significand, exponent = torch.frexp(numbers.double())
    nearest = torch.ldexp((significand * 2**11).round() / 2**11, exponent)  # ties to even
    assert planted is not None and torch.equal(planted.double(), nearest)
    assert kind.plant(Sound(numbers.half())) is None, "float16 has no more bits than that"


@pytest.mark.parametrize(
    ("dtype", "narrow"), list(zip(DTYPES, [torch.bfloat16, torch.float16, torch.bfloat16, torch.float32], strict=True))
)
def test_terms_are_added_up_in_the_narrow_dtype(dtype: torch.dtype, narrow: torch.dtype) -> None:
    numbers = normal(50, dtype=dtype)
    found = [t for d in precision.ACCUMULATED if (t := d.plant(Sound(numbers))) is not None]
    assert len(found) == 1
    for number, planted in zip(numbers, found[0], strict=True):
        total = torch.zeros((), dtype=narrow)
        for _ in range(16):
            total = (total.double() + number.double() / 16).to(narrow)
        assert planted == total.to(dtype)
    unit = torch.finfo(narrow).eps / 2
    error = float((found[0].double() - numbers.double()).norm() / numbers.double().norm())
    assert unit / 2 < error < 4 * unit


def test_blocks_are_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defects are planted one block at a time, because a gradient may fill much of a GPU."""
    exact = masked()
    actual = exact.float()
    whole_ones = planted_in(Sound(actual, exact))
    monkeypatch.setattr("ktonum.measure.comparison._BLOCK", 7)
    in_blocks = planted_in(Sound(actual, exact))
    assert whole_ones.keys() == in_blocks.keys()
    for words, tensor in whole_ones.items():
        assert torch.allclose(in_blocks[words], tensor, rtol=1e-6), words


def test_the_root_mean_square_is_that_of_the_finite_elements() -> None:
    tiny = torch.tensor([3e-200, 4e-200, math.nan, math.inf], dtype=torch.float64)
    assert Sound(tiny).root_mean_square == pytest.approx(5e-200 / 2)
    assert Sound(torch.zeros(3)).root_mean_square == 0
