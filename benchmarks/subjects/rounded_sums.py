"""Sums, inner products, log-sum-exps and softmaxes whose additions are carried out in a chosen order, and their errors.

Errors are shares of the tolerance that `ktonum.bounds` derives: 1 is the whole tolerance. The truth is in NumPy's long
double, which has 64 bits on x86 and is summed by halves. Compared with float64's 53 bits, that is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktonum.bounds import (
    FORMATS,
    PAIRWISE,
    SEQUENTIAL,
    TF32,
    Format,
    Order,
    ShiftedExponentials,
    blocked,
    confidence,
    inner_product_amplitude,
    split,
    stagnation_bias,
    sum_amplitude,
)
from ktonum.declare.cases import seed_of, torch_dtype

__all__ = [
    "DATA",
    "LONG_DOUBLE_IS_LONGER",
    "OPS",
    "ORDERS",
    "STORAGES",
    "Subject",
    "added",
    "one_by_one_in",
    "to_tf32",
    "uses",
]

LONG_DOUBLE_IS_LONGER = np.finfo(np.longdouble).nmant >= 63
STORAGES = ("bf16", "fp16", "fp32", "fp64")
ORDERS = (SEQUENTIAL, PAIRWISE, blocked(128), split(16))
#: 2⁻⁶ keeps a sum of 2²¹ positive numbers in float16's range.
DATA: dict[str, Callable[[torch.Generator, tuple[int, int]], Tensor]] = {
    "zero mean": lambda g, shape: torch.randn(shape, generator=g, dtype=torch.float64),
    "positive": lambda g, shape: torch.rand(shape, generator=g, dtype=torch.float64) / 64,
}
# So many rows, because the largest of few errors may be small by luck. The largest of 16 errors is below half the
# standard deviation with probability 2e-7, the largest of 8 with probability 5e-4.
_ROWS = 16
_ELEMENTS_AT_ONCE = 2**21

Long = NDArray[np.longdouble]


@dataclass(frozen=True)
class Subject:
    """One point: which numbers are added, how many, and how they are stored.

    Attributes:
        op: A name of `OPS`.
        storage: Format of inputs and result. The accumulator is fp64 for fp64, else fp32.
        terms: How many numbers are added.
        data: A name of `DATA`.
    """

    op: str
    storage: str
    terms: int
    data: str = "zero mean"

    @property
    def form(self) -> Format:
        """The format of the storage."""
        return FORMATS[self.storage]

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype in which sums are accumulated."""
        return torch.float64 if self.storage == "fp64" else torch.float32

    @property
    def rows(self) -> int:
        """How many rows. Long ones are half as many, to save time; two of a softmax, whose rows have many elements."""
        least = 2 if self.op == "softmax" else _ROWS // 2
        return max(least, min(_ROWS, _ELEMENTS_AT_ONCE // self.terms))

    @property
    def roundoff(self) -> float:
        """The unit roundoff of the accumulator."""
        return torch.finfo(self.accumulator).eps / 2

    def inputs(self, count: int) -> Iterator[tuple[Tensor, ...]]:
        """Blocks of rows of ``count`` inputs of shape (rows, terms): stored numbers in the accumulator's dtype."""
        generator = torch.Generator().manual_seed(seed_of(repr(self)))
        at_once = max(1, min(self.rows, _ELEMENTS_AT_ONCE // self.terms))
        for start in range(0, self.rows, at_once):
            shape = (min(at_once, self.rows - start), self.terms)
            drawn = (DATA[self.data](generator, shape) for _ in range(count))
            yield tuple(d.to(torch_dtype(self.storage)).to(self.accumulator) for d in drawn)


def added(values: Tensor, order: Order) -> Tensor:
    """Row sums of a tensor (rows, n). Additions are in the given order, each rounded to the tensor's dtype."""
    terms = values.shape[1]
    if order.name == "pairwise":
        while values.shape[1] > 1:
            whole = values.shape[1] // 2 * 2
            halves = values[:, 0:whole:2] + values[:, 1:whole:2]
            values = torch.cat([halves, values[:, whole:]], dim=1)
        return values[:, 0]
    lengths = {"sequential": terms, "blocked": min(order.size, terms), "split": -(-terms // max(1, order.size))}
    length = lengths[order.name]
    whole = terms // length * length
    parts = [_one_by_one(values[:, :whole].reshape(len(values), -1, length))]
    if whole < terms:
        parts.append(_one_by_one(values[:, None, whole:]))
    return _one_by_one(torch.cat(parts, dim=1))


def _one_by_one(values: Tensor) -> Tensor:
    # NumPy's accumulate keeps every prefix in the array's dtype; torch's cumsum sums in a wider one.
    return torch.from_numpy(np.add.accumulate(values.numpy(), axis=-1)[..., -1].copy())


Judged = tuple[Tensor, Long, Tensor, Tensor]
# For a block of rows, and each order: result before its last rounding, truth, amplitude and coherent part of the error.
Op = Callable[[Subject, Sequence[Order], Sequence[Tensor]], Iterator[Judged]]


def _sums(subject: Subject, orders: Sequence[Order], inputs: Sequence[Tensor]) -> Iterator[Judged]:
    (values,) = inputs
    truth = _long(values).sum(-1)
    squares = values.double().square().sum(-1)
    for order in orders:
        total = torch.from_numpy(truth.astype(np.float64))
        amplitude = sum_amplitude(total, squares, subject.terms, order, subject.roundoff)
        yield added(values, order), truth, amplitude, stagnation_bias(values.double(), order, subject.roundoff)


def _products(subject: Subject, orders: Sequence[Order], inputs: Sequence[Tensor]) -> Iterator[Judged]:
    a, b = inputs
    exact = _long(a) * _long(b)
    truth = exact.sum(-1)
    total, squares = (torch.from_numpy(t.astype(np.float64)) for t in (truth, (exact * exact).sum(-1)))
    # Products of 16-bit numbers are exact in float32.
    rounded = subject.storage in ("fp32", "fp64")
    for order in orders:
        amplitude = inner_product_amplitude(
            total, squares, subject.terms, order, subject.roundoff, products_rounded=rounded
        )
        bias = stagnation_bias(a.double() * b.double(), order, subject.roundoff)
        yield added(a * b, order), truth, amplitude, bias


def _logsumexp(subject: Subject, orders: Sequence[Order], inputs: Sequence[Tensor]) -> Iterator[Judged]:
    logits = 3 * inputs[0]  # exact in the accumulator if the inputs have 8 or 11 bits
    shift = logits.amax(-1, keepdim=True)
    exponentials = (logits - shift).exp()
    truth = np.log(np.exp(_long(logits) - _long(shift)).sum(-1)) + _long(shift)[:, 0]
    for order in orders:
        scheme = ShiftedExponentials(logits.double(), order, subject.roundoff)
        yield added(exponentials, order).log() + shift[:, 0], truth, *scheme.logsumexp_errors()


def _softmax(subject: Subject, orders: Sequence[Order], inputs: Sequence[Tensor]) -> Iterator[Judged]:
    logits = 3 * inputs[0]
    exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
    exact = np.exp(_long(logits) - _long(logits).max(-1, keepdims=True))
    truth = exact / exact.sum(-1, keepdims=True)
    for order in orders:
        scheme = ShiftedExponentials(logits.double(), order, subject.roundoff)
        yield exponentials / added(exponentials, order).unsqueeze(1), truth, *scheme.softmax_errors()


#: By name: the number of inputs, and the op.
OPS: dict[str, tuple[int, Op]] = {
    "sum": (1, _sums),
    "inner product": (2, _products),
    "logsumexp": (1, _logsumexp),
    "softmax": (1, _softmax),
}


def _long(tensor: Tensor) -> Long:
    return tensor.numpy().astype(np.longdouble)


def uses(
    subject: Subject,
    orders: Sequence[Order] = ORDERS,
    *,
    operands: Callable[[Tensor], Tensor] | None = None,
    accumulate: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """For each order the largest error of all elements, as a share of its tolerance.

    Args:
        subject: The point.
        orders: The orders of the additions.
        operands: A defect: a change of the inputs that only the implementation makes, not the truth.
        accumulate: A defect: another way to add, instead of every order. For sums and inner products.
    """
    count, op = OPS[subject.op]
    worst: dict[str, float] = {}
    for inputs in subject.inputs(count):
        judged = list(op(subject, orders, inputs))
        wrong = judged if operands is None else op(subject, orders, [operands(t) for t in inputs])
        for order, (_, truth, amplitude, coherent), (result, *_) in zip(orders, judged, wrong, strict=True):
            if accumulate is not None:
                result = accumulate(inputs[0] if count == 1 else inputs[0] * inputs[1])
            stored = result.to(torch_dtype(subject.storage)).to(subject.accumulator)
            error = np.abs(_long(stored) - truth).astype(np.float64)
            elements = subject.rows * (truth.size // len(truth))
            half = subject.form.half_spacing(torch.from_numpy(truth.astype(np.float64)))
            share = torch.from_numpy(error) / (confidence(elements) * amplitude + coherent + half)
            name = f"{order.name} {order.size or ''}".rstrip()
            worst[name] = max(worst.get(name, 0.0), float(share.amax()))
    return worst


def one_by_one_in(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A way to add with an accumulator of 16 bits: each partial sum is rounded to ``dtype``."""

    def accumulate(values: Tensor) -> Tensor:
        total = torch.zeros(len(values), dtype=dtype)
        for column in values.to(dtype).unbind(1):
            total = total + column
        return total.to(values.dtype)

    return accumulate


def to_tf32(values: Tensor) -> Tensor:
    """Float32 operands as tensor cores read them."""
    return TF32.round(values).to(values.dtype)
