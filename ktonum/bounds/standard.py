"""What an audit allows an implementation: the two standards, `PRECISE` and `EAGER`. Nothing else says what they grant.

| | `precise` | `eager` |
|---|---|---|
| sums are accumulated in | float32; float64 for float64 inputs | the same |
| products of 16-bit operands on a GPU | may run on tensor cores, which truncate | the same |
| intermediate tensors are stored in | what sums are accumulated in | the dtype under audit, as plain PyTorch does |
| bias of 16-bit tensors | what the op's analysis knows | that, and twice the bias of plain PyTorch |
| ends of the inputs' range, long reductions | the op's bound | no less than four times the error of plain PyTorch |
| bound of a tensor that has no analysis | from the reference in float32, see `StandIn` | from plain PyTorch |
| upstream gradient times a power of two | scales gradients bit for bit | in float16 only within the bounds |

Plain PyTorch is the reference, run in the dtype under audit. In float64 it is the oracle itself and has no error to
compare with. There `eager` grants what `precise` does; in float32 the two differ only in the fifth row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ktonum.bounds.error_bounds import unit_roundoff
from ktonum.errors import UsageError

__all__ = ["EAGER", "MEASURED_SCALE", "PRECISE", "Arithmetic", "Standard", "StandIn", "standard_named"]

#: Times this, the error of a run of the reference is granted where it stands in for an analysis. Two correct
#: implementations differ by their order of summation, and a root mean square does not tell the largest of many
#: elements.
MEASURED_SCALE = 4.0
# Where stored intermediates saturate, as a sigmoid does, their roundings are not random: most elements are rounded the
# same way. Twice the bias of plain PyTorch is granted, as FlashAttention's tests grant twice its error. Another
# implementation may store other tensors, and so have another bias; an op's error model adds it where it is known.
_PLAIN_BIAS_SCALE = 2.0
_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic that a standard grants for one dtype on one kind of device.

    Attributes:
        operands: The dtype under audit: inputs come in it, and matrix units read operands in it.
        accumulator: What sums are accumulated in: float64 for float64, otherwise float32.
        stored: What intermediate tensors are rounded to: the accumulator's dtype under `precise`, the dtype under
            audit under `eager`.
        truncating: Whether products may run on tensor cores, which truncate as they accumulate.
    """

    operands: torch.dtype
    accumulator: torch.dtype
    stored: torch.dtype
    truncating: bool

    def truncation(self, terms: float) -> float:
        """Relative shrinkage of an inner product of ``terms`` products accumulated on tensor cores.

        A step adds 16 products and truncates the sum: on average it loses 0.72 · 2^-24 of it (half a unit in the last
        place, averaged over mantissas), and the partial sums average half the result. This gives 0.36 · 2^-24 · n/16,
        which is granted twice. At n = 4096 the log-probabilities of an H100 imply 4e-6, where 5.5e-6 is predicted.
        """
        return 2 * 0.36 * 2.0**-24 * terms / 16 if self.truncating else 0.0


@dataclass(frozen=True)
class StandIn:
    """A run of the reference whose error stands in for an analysis.

    Attributes:
        plain: Whether it is plain PyTorch in the dtype under audit. If not, it is the reference in float32: inputs are
            drawn in float32, so that this run sees the values of any case exactly.
        scale: The run's error times this is granted.
    """

    plain: bool
    scale: float


@dataclass(frozen=True)
class Standard:
    """What an implementation is granted. The module's table says it in words.

    Attributes:
        name: As in `ktonum.results.STANDARDS`.
        as_plain: Whether an implementation may err as plain PyTorch does in the dtype under audit.
    """

    name: str
    as_plain: bool

    def arithmetic(self, dtype: torch.dtype, device: str) -> Arithmetic:
        """What is granted for inputs of ``dtype`` on ``device``, ``cpu`` or ``cuda``."""
        accumulator = _accumulator(dtype)
        stored = dtype if self.as_plain else accumulator
        return Arithmetic(dtype, accumulator, stored, truncating=dtype in _SIXTEEN_BIT and device == "cuda")

    def follows_plain(self, dtype: torch.dtype) -> bool:
        """Whether the error of plain PyTorch in ``dtype`` is granted, times `MEASURED_SCALE`.

        It is granted instead of an analysis where there is none, and at least where an analysis to first order does not
        hold: at the ends of the inputs' range and in long reductions. Rounding a logit of 10,000 to bfloat16 changes it
        by up to 32, so that chance decides which class has the largest probability; a gradient behind a saturated
        sigmoid has lost its digits. Where plain PyTorch overflows, any value is granted.
        """
        return self.as_plain and dtype != torch.float64

    def stand_in(self, dtype: torch.dtype) -> StandIn:
        """The run that stands in for an analysis in ``dtype``, where an op has no error model or it omits a tensor."""
        if self.follows_plain(dtype):
            return StandIn(plain=True, scale=MEASURED_SCALE)
        # An error is proportional to the unit roundoff of its arithmetic.
        scale = MEASURED_SCALE * unit_roundoff(_accumulator(dtype)) / unit_roundoff(torch.float32)
        return StandIn(plain=False, scale=scale)

    def plain_biases(self, dtype: torch.dtype) -> float:
        """How many times the bias of plain PyTorch is granted beside the bias that an analysis knows."""
        return _PLAIN_BIAS_SCALE if self.as_plain and dtype in _SIXTEEN_BIT else 0.0

    def scales_exactly(self, dtype: torch.dtype) -> bool:
        """Whether an upstream gradient times a power of two must scale gradients bit for bit.

        Small intermediate tensors lose bits if they are stored in float16: there the scaled run may be nearer to the
        truth than the plain one.
        """
        return not (self.as_plain and dtype == torch.float16)


PRECISE = Standard("precise", as_plain=False)
EAGER = Standard("eager", as_plain=True)
_BY_NAME = {standard.name: standard for standard in (PRECISE, EAGER)}


def standard_named(name: str) -> Standard:
    """The standard called ``name``.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in _BY_NAME:
        raise UsageError(f"unknown standard {name!r}: use {' or '.join(_BY_NAME)}")
    return _BY_NAME[name]
