r"""Rounding errors of sums and inner products, by the order in which terms are added.

There are three forms. Each bounds one element and needs only sums that the oracle can compute:

- *deterministic*: :math:`\gamma_h \sum |x_i|`, where h is the largest number of additions that a term takes part in. It
  holds for any data in any order. Higham 2002, section 4.2.
- *probabilistic*: :math:`\tilde\gamma_h(\lambda) \sum |x_i|`. It assumes that rounding errors are independent with mean
  zero, and holds for any data. The factor of one term exceeds its bound with a probability of at most 2 exp(−λ²/2), so
  λ must be chosen for all terms together.
- *amplitude*: :math:`u (\sum_k \mathrm{E} s_k^2)^{1/2}` over the partial sums :math:`s_k`; multiply it by λ. To first
  order, the error is :math:`\sum_k \delta_k s_k` (Higham 2002, section 4.2). This form also assumes that the terms come
  in random order. For m terms that are drawn without replacement from n terms with sum S and sum of squares Q,

  .. math:: \mathrm{E} s_m^2 = (m/n)^2 S^2 + \frac{m (n - m)}{n (n - 1)} (Q - S^2/n).

  Where terms cancel, the other two forms are √n too large. This form is smaller for terms of mean zero than for terms
  of one sign.

The last two forms do not hold where a running sum stagnates. There, every term below half of its spacing is lost, and
these errors do not have mean zero. `stagnation_bias` estimates the loss.
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


# Larger terms, in units of the sum's spacing, have rounding errors of mean zero. The limit is a whole number, because
# these errors are periodic in the term with a period of one spacing.
_FEW = 64.0


@dataclass(frozen=True)
class Order:
    """The order in which n terms are added.

    Attributes:
        name: ``sequential``, ``pairwise``, ``blocked`` or ``split``.
        size: Terms in a block (``blocked``) or number of parts (``split``); otherwise unused.
    """

    name: str
    size: int = 0

    def depth(self, terms: int) -> int:
        """The largest number of additions that any of the terms takes part in.

        Raises:
            InputError: ``terms`` is below 1.
        """
        length = self._block(terms)
        if self.name == "pairwise":
            return max(0, (terms - 1).bit_length())
        return max(0, length - 1) + max(0, -(-terms // length) - 1)

    def run(self, terms: int) -> int:
        """The number of terms in the longest sum that single terms are added to."""
        return min(2, terms) if self.name == "pairwise" else self._block(terms)

    def partial_sums(self, terms: int) -> Mapping[int, int]:
        """How many partial sums have m terms, by m. The whole sum is one of them; single terms are not."""
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
        """The number of terms that are added one after the other."""
        if terms < 1:
            raise InputError(f"a sum of {terms} terms: pass 1 or more")
        if self.name == "blocked":
            return min(self.size, terms)
        return -(-terms // self.size) if self.name == "split" else terms


#: One term after the other.
SEQUENTIAL = Order("sequential")
#: The sum of two halves, each of which is added in the same way.
PAIRWISE = Order("pairwise")


def blocked(size: int) -> Order:
    """Blocks of ``size`` terms: each is added one term after the other, then the blocks' sums are.

    Raises:
        InputError: ``size`` is below 1.
    """
    return Order("blocked", _positive(size))


def split(parts: int) -> Order:
    """``parts`` parts of equal length: each is added one term after the other, then their sums are (split-K).

    Raises:
        InputError: ``parts`` is below 1.
    """
    return Order("split", _positive(parts))


def _positive(size: int) -> int:
    if size < 1:
        raise InputError(f"blocks or parts of {size}: pass 1 or more")
    return size


def sum_bound(absolute: Tensor, terms: int, order: Order, roundoff: float) -> Tensor:
    """Deterministic bound on the error of a sum.

    Args:
        absolute: The sum of the terms' magnitudes, any shape.
        terms: n.
        order: The order of the additions.
        roundoff: The accumulator's u.

    Raises:
        InputError: See `gamma`.
    """
    return gamma(order.depth(terms), roundoff) * absolute


def sum_probable_bound(absolute: Tensor, terms: int, order: Order, roundoff: float, confidence: float) -> Tensor:
    """Probabilistic bound on the error of a sum.

    Args:
        absolute, terms, order, roundoff: See `sum_bound`.
        confidence: λ, for ``terms`` times as many statements as there are sums.
    """
    return probabilistic_gamma(order.depth(terms), roundoff, confidence) * absolute


@lru_cache(maxsize=256)
def _weights(order: Order, terms: int) -> tuple[float, float]:
    """Σ_k (m/n)² and Σ_k m (n − m) / (n (n − 1)) over the partial sums, of m terms each."""
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
        order: The order of the additions.
        roundoff: The accumulator's u.

    Returns:
        The shape of ``total``; multiply it by λ, see `ktonum.bounds.constants.confidence`.
    """
    one_sign, spread = _weights(order, terms)
    scattered = (squares - total.square() / terms).clamp(min=0.0)
    return roundoff * (one_sign * total.square() + spread * scattered).sqrt()


def inner_product_amplitude(
    total: Tensor, squares: Tensor, terms: int, order: Order, roundoff: float, *, products_rounded: bool
) -> Tensor:
    """Amplitude of the error of an inner product whose products come in random order.

    Args:
        total, squares, terms, order, roundoff: Of the products, see `sum_amplitude`.
        products_rounded: Whether each product is rounded before it is added. Products of 16-bit operands are exact in
            float32, and a fused multiply-add rounds only the sum.
    """
    added = sum_amplitude(total, squares, terms, order, roundoff)
    return (added.square() + roundoff**2 * squares).sqrt() if products_rounded else added


def stagnation_bias(terms: Tensor, order: Order, roundoff: float) -> Tensor:
    """Magnitude of the mean error of a sum whose terms are as small as the spacing of the running sum.

    A running sum s is a multiple of its spacing g. So adding x has the error rn(x / g) g − x, whatever s is. If x is
    many g, this error has mean zero. If x is below g / 2, the error is −x: every such term is lost.

    Let m be the number of terms in the longest running sum. Running sums grow from 0 to m / n of the whole sum, so at
    least half of the terms are added while the running sum is in its two topmost binades. For m / n of the terms, the
    largest term is in the same running sum and may move it to a higher binade.

    This is derived here. It assumes that the terms come in random order, as `sum_amplitude` does.

    Args:
        terms: (…, n), any floating dtype; converted to float64.
        order: The order of the additions.
        roundoff: The accumulator's u.

    Returns:
        (…), float64.
    """
    rows = terms.double().reshape(-1, terms.shape[-1])
    share = order.run(rows.shape[1]) / rows.shape[1]
    top = (share * rows.sum(1).abs()).clamp(min=torch.finfo(torch.float64).tiny)
    binade = _binade(top)
    bias = (1 - binade / top) * _net_error(rows, 2 * roundoff * binade)
    # All binades below the second are treated as the third. Its spacing is no smaller than theirs, nor is its loss.
    for half in (0.5, 0.25):
        bias = bias + binade / 2 / top * _net_error(rows, 2 * roundoff * half * binade)
    beside_largest = _net_error(rows, 2 * roundoff * _binade(top + rows.abs().amax(1)))
    return (bias.abs() + share * beside_largest.abs()).view(terms.shape[:-1])


def _binade(positive: Tensor) -> Tensor:
    """The power of two at or below each number."""
    mantissa, _ = torch.frexp(positive)
    return positive / mantissa / 2


def _net_error(rows: Tensor, spacing: Tensor) -> Tensor:
    """Σ (rn(x / g) g − x) over the terms below `_FEW` spacings g, for each row; (rows,)."""
    few = rows.abs() < _FEW * spacing.unsqueeze(1)
    row = few.nonzero()[:, 0]
    in_spacings = rows[few] / spacing[row]
    errors = (in_spacings.round() - in_spacings) * spacing[row]
    return torch.zeros_like(spacing).index_add_(0, row, errors)


def multiply_add_bound(product: Tensor, addend: Tensor, roundoff: float, *, fused: bool) -> Tensor:
    """Bound on the error of a b + c: u |a b + c|, and u (1 + u) |a b| more unless it is fused.

    A fused multiply-add is rounded once (IEEE 754-2019, fusedMultiplyAdd). Otherwise the product is rounded, and then
    the sum.

    Args:
        product: The exact a b.
        addend: c, same shape.
        roundoff: u.
        fused: Whether it is a fused multiply-add.
    """
    once = roundoff * (product + addend).abs()
    return once if fused else once + roundoff * (1 + roundoff) * product.abs()


def summation_variance(
    terms: float, total: Tensor, squares: Tensor, dtype: torch.dtype, *, peak: Tensor | None = None
) -> Tensor:
    """Σ_k (u s_k)² for ``terms`` numbers added one by one in ``dtype``: the square of `sum_amplitude` for large n.

    For partial sums of 1 to n terms in random order, Σ_k E s_k² ≈ n (S²/3 + Q/6). S² dominates for numbers of one sign,
    and Q for numbers of mean zero. A bound with Σ|t_i| in place of every |s_k| is √n too large for mean zero.

    Terms may come in stretches of one sign each. Their partial sums reach a peak P ≥ |S|. If they go straight from 0 to
    P and then straight to S, their mean square is P²/3 before the peak and at most (P² + P |S| + S²)/3 after it. The
    larger of the two is used.

    Args:
        terms: n; need not be whole.
        total: S.
        squares: Q, the sum of the terms' squares, same shape.
        dtype: The dtype of the accumulator.
        peak: P, same shape, for terms in stretches; None for terms in random order.

    Returns:
        The shape of ``total``.
    """
    u = torch.finfo(dtype).eps / 2
    walked = total.square() if peak is None else peak.square() + peak * total.abs() + total.square()
    return u**2 * terms * (walked / 3 + squares / 6)
