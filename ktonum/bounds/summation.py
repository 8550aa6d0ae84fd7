r"""Rounding errors of sums and inner products, by the order in which terms are added.

Three forms, each per element, from what the oracle can compute:

- *deterministic*: :math:`\gamma_h \sum |x_i|`, h the most additions that a term goes through. Any order, any data.
  Higham 2002, section 4.2.
- *probabilistic*: :math:`\tilde\gamma_h(\lambda) \sum |x_i|`, errors independent with mean zero. One term's factor
  exceeds its bound with probability 2 exp(−λ²/2); λ is for all terms at once. Any data.
- *amplitude*: :math:`u (\sum_k \mathrm{E} s_k^2)^{1/2}` over the partial sums :math:`s_k`, to be multiplied by λ. To
  first order the error is :math:`\sum_k \delta_k s_k` (Higham 2002, section 4.2). The partial sums are those of terms
  in random order: for m of n terms with sum S and sum of squares Q, drawn without replacement,

  .. math:: \mathrm{E} s_m^2 = (m/n)^2 S^2 + \frac{m (n - m)}{n (n - 1)} (Q - S^2/n).

  The other two are √n too large where terms cancel; this one tells terms of one sign from terms of mean zero.

The last two fail where a running sum stagnates: what is smaller than half its spacing is lost each time, which is no
error of mean zero. `stagnation_bias` says how much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ktonum.bounds.constants import gamma, probabilistic_gamma
from ktonum.errors import InputError

__all__ = [
    "PAIRWISE",
    "SEQUENTIAL",
    "Order",
    "blocked",
    "inner_product_amplitude",
    "multiply_add_bound",
    "split",
    "stagnation_bias",
    "sum_amplitude",
    "sum_bound",
    "sum_probable_bound",
    "summation_variance",
]


# Terms of more spacings than these err with mean zero. A whole number: a cut elsewhere would leave part of a period.
_FEW = 64.0


@dataclass(frozen=True)
class Order:
    """In which order n terms are added.

    Attributes:
        name: ``sequential``, ``pairwise``, ``blocked`` or ``split``.
        size: Terms of a block, or number of parts.
    """

    name: str
    size: int = 0

    def depth(self, terms: int) -> int:
        """The most additions that any term goes through."""
        length = self._block(terms)
        if self.name == "pairwise":
            return max(0, (terms - 1).bit_length())
        return max(0, length - 1) + max(0, -(-terms // length) - 1)

    def run(self, terms: int) -> int:
        """The most terms in a sum that single terms are still added to."""
        return min(2, terms) if self.name == "pairwise" else self._block(terms)

    def partial_sums(self, terms: int) -> Mapping[int, int]:
        """How many partial sums there are of so many terms; a sum's own is one of them, single terms are none."""
        found: Counter[int] = Counter()
        if self.name == "pairwise":
            level = Counter({terms: 1})
            while level := Counter({m: count for m, count in level.items() if m > 1}):
                found.update(level)
                halves: Counter[int] = Counter()
                for m, count in level.items():
                    halves[m // 2] += count
                    halves[m - m // 2] += count
                level = halves
            return found
        length = self._block(terms)
        whole, rest = divmod(terms, length)
        found.update(dict.fromkeys(range(2, length + 1), whole))
        found.update(range(2, rest + 1))
        found.update(range(2 * length, whole * length + 1, length))
        if rest and whole:
            found[terms] += 1
        return found

    def _block(self, terms: int) -> int:
        if terms < 1:
            raise InputError(f"a sum of {terms} terms: pass 1 or more")
        if self.name == "blocked":
            return min(self.size, terms)
        return -(-terms // self.size) if self.name == "split" else terms


#: One after the other.
SEQUENTIAL = Order("sequential")
#: Halves, each added in the same way.
PAIRWISE = Order("pairwise")


def blocked(size: int) -> Order:
    """Blocks of ``size`` terms one after the other, then the blocks' sums one after the other."""
    return Order("blocked", _positive(size))


def split(parts: int) -> Order:
    """``parts`` stretches of equal length one after the other, then their sums: split-K."""
    return Order("split", _positive(parts))


def _positive(size: int) -> int:
    if size < 1:
        raise InputError(f"blocks or parts of {size}: pass 1 or more")
    return size


def sum_bound(absolute: Tensor, terms: int, order: Order, roundoff: float) -> Tensor:
    """Deterministic bound on the error of a sum; ``absolute`` is the sum of its terms' magnitudes."""
    return gamma(order.depth(terms), roundoff) * absolute


def sum_probable_bound(absolute: Tensor, terms: int, order: Order, roundoff: float, confidence: float) -> Tensor:
    """Probabilistic bound on the error of a sum; λ for ``terms`` times as many statements as there are sums."""
    return probabilistic_gamma(order.depth(terms), roundoff, confidence) * absolute


@lru_cache(maxsize=256)
def _weights(order: Order, terms: int) -> tuple[float, float]:
    """Σ_k (m/n)² and Σ_k m (n − m) / (n (n − 1)) over the partial sums."""
    sums = order.partial_sums(terms)
    sizes = torch.tensor(list(sums.keys()), dtype=torch.float64)
    counts = torch.tensor(list(sums.values()), dtype=torch.float64)
    squares = float((counts * (sizes / terms).square()).sum())
    spread = float((counts * sizes * (terms - sizes)).sum()) / (terms * max(1, terms - 1))
    return squares, spread


def sum_amplitude(total: Tensor, squares: Tensor, terms: int, order: Order, roundoff: float) -> Tensor:
    """Amplitude of the error of a sum whose terms come in random order.

    Args:
        total: The terms' sum, S.
        squares: The sum of their squares, Q, same shape.
        terms: n.
        order: How they are added.
        roundoff: The accumulator's u.
    """
    one_sign, spread = _weights(order, terms)
    scattered = (squares - total.square() / terms).clamp(min=0.0)
    return roundoff * (one_sign * total.square() + spread * scattered).sqrt()


def inner_product_amplitude(
    total: Tensor, squares: Tensor, terms: int, order: Order, roundoff: float, *, products_rounded: bool
) -> Tensor:
    """The same of an inner product, whose products' sum and sum of squares are given.

    Args:
        total, squares, terms, order, roundoff: See `sum_amplitude`.
        products_rounded: Whether each product is rounded on its own. Products of 16-bit operands are exact in float32,
            and a fused multiply-add rounds the sum alone.
    """
    added = sum_amplitude(total, squares, terms, order, roundoff)
    return (added.square() + roundoff**2 * squares).sqrt() if products_rounded else added


def stagnation_bias(terms: Tensor, order: Order, roundoff: float) -> Tensor:
    """The mean of a sum's error where terms are as small as the spacing of the running sum: its magnitude, (…).

    A running sum s is a multiple of its own spacing g, so adding x errs by rn(x / g) g − x, whatever s is. For terms of
    many g that has mean zero, below g / 2 it is −x: all of them are lost. Running sums grow from 0 to the share m / n
    of the whole, m the most terms of one, and so spend at least half their terms in the two topmost binades; where the
    largest term is among them, which concerns m / n of the terms, they are larger by that one.
    Derived here; that terms come in random order is assumed, as in `sum_amplitude`.

    Args:
        terms: (…, n), float64.
        order: How they are added.
        roundoff: The accumulator's u.
    """
    rows = terms.double().reshape(-1, terms.shape[-1])
    share = order.run(rows.shape[1]) / rows.shape[1]
    top = (share * rows.sum(1).abs()).clamp(min=torch.finfo(torch.float64).tiny)
    binade = _binade(top)
    bias = (1 - binade / top) * _net_error(rows, 2 * roundoff * binade)
    # Everything below the second binade is taken to be in the third, which is no less.
    for half in (0.5, 0.25):
        bias = bias + binade / 2 / top * _net_error(rows, 2 * roundoff * half * binade)
    beside_largest = _net_error(rows, 2 * roundoff * _binade(top + rows.abs().amax(1)))
    return (bias.abs() + share * beside_largest.abs()).view(terms.shape[:-1])


def _binade(positive: Tensor) -> Tensor:
    """The power of two at or below each number."""
    mantissa, _ = torch.frexp(positive)
    return positive / mantissa / 2


def _net_error(rows: Tensor, spacing: Tensor) -> Tensor:
    """Σ rn(x / g) g − x over the terms of few g; (rows)."""
    few = rows.abs() < _FEW * spacing.unsqueeze(1)
    row = few.nonzero()[:, 0]
    in_spacings = rows[few] / spacing[row]
    errors = (in_spacings.round() - in_spacings) * spacing[row]
    return torch.zeros_like(spacing).index_add_(0, row, errors)


def multiply_add_bound(product: Tensor, addend: Tensor, roundoff: float, *, fused: bool) -> Tensor:
    """Bound on the error of a b + c, from the exact a b and c: u |a b + c|, and unless fused u (1 + u) |a b| more.

    Fused it is rounded once (IEEE 754-2019, fusedMultiplyAdd); otherwise the product is, and then the sum with it.
    """
    once = roundoff * (product + addend).abs()
    return once if fused else once + roundoff * (1 + roundoff) * product.abs()


def summation_variance(
    terms: float, total: Tensor, squares: Tensor, dtype: torch.dtype, *, peak: Tensor | None = None
) -> Tensor:
    """Σ_k (u s_k)² for ``terms`` numbers added one by one in ``dtype``: `sum_amplitude` squared, where n is large.

    For partial sums of 1 to n terms in random order Σ_k E s_k² ≈ n (S²/3 + Q/6). The first rules for numbers of one
    sign, the second for mean zero; bounds that put Σ|t_i| in place of every |s_k| are √n too large for mean zero.
    Terms that come in stretches of either sign add up to a peak P ≥ |S| on the way. Going straight from 0 to P and on
    to S, partial sums have a mean square of P²/3 before and (P² + P S + S²)/3 after it: the larger is taken.

    Args:
        terms: n; need not be whole.
        total: S.
        squares: Q, the sum of the terms' squares.
        dtype: What sums are accumulated in.
        peak: P, for terms in stretches; None for terms in random order.
    """
    u = torch.finfo(dtype).eps / 2
    walked = total.square() if peak is None else peak.square() + peak * total.abs() + total.square()
    return u**2 * terms * (walked / 3 + squares / 6)
