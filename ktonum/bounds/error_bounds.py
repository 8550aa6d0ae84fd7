r"""Bounds on the error of one tensor: from an analysis of roundings, or from a measured error.

The model is Higham and Mary's (2019, SIAM J. Sci. Comput. 41(5), A2815): every operation errs by a relative
:math:`\delta`, :math:`|\delta| \le u`, and the errors are independent with mean zero. By Hoeffding's inequality a sum
of independent errors of amplitudes :math:`a_k` exceeds :math:`\lambda \sqrt{\sum a_k^2}` with probability at most
:math:`2 \exp(-\lambda^2/2)`. Errors that elements share (one wrong coefficient for a whole sequence) do not average
out. They have a bound of their own and add up linearly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.bounds.constants import confidence
from ktonum.bounds.formats import spacing
from ktonum.results import BoundSource

__all__ = [
    "ErrorBound",
    "amplitude",
    "from_measured_error",
    "norm_bound",
    "projection_bound",
    "subnormal_rounding",
    "unit_roundoff",
]


def unit_roundoff(dtype: torch.dtype) -> float:
    """u = eps / 2: the largest relative error of rounding to nearest, away from underflow. Higham 2002, Theorem 2.2."""
    return torch.finfo(dtype).eps / 2


def subnormal_rounding(dtype: torch.dtype) -> float:
    """η, half the spacing of the dtype's subnormals: the largest error of rounding to one of them. Higham 2002, (2.8).

    In float64 it is the spacing itself, because half of it would be rounded to zero. A bound without it flagged torch's
    silu, differentiated at −708.
    """
    limits = torch.finfo(dtype)
    return max(limits.smallest_normal * limits.eps / 2, math.ulp(0.0))


def amplitude(variance: Tensor) -> Tensor:
    """√variance, but no less than the root of the smallest number of its dtype: smaller numbers have a square of zero.

    Gradients of 1e-235, as softmax gives at logits of 1,000, are numbers in float64, and so are their errors.
    """
    limits = torch.finfo(variance.dtype)
    return variance.sqrt().clamp(min=math.sqrt(limits.tiny) * math.sqrt(limits.eps))


@dataclass(frozen=True)
class ErrorBound:
    """First-order bound on one tensor's error, before it is rounded to its own dtype.

    Attributes:
        independent: Amplitude of errors that are independent from element to element, ≥ 0, shape of the tensor.
        coherent: Bound on errors that elements share, ≥ 0, same shape.
        dtype: What the tensor is rounded to in the end.
        source: Where the bound comes from.
        bias: Granted to the measure ``signed_bias`` besides: ⟨error, expected⟩ / ‖expected‖², a pure number. Its size
            counts. 0 but for 16 bits under `eager`.
    """

    independent: Tensor
    coherent: Tensor
    dtype: torch.dtype
    source: BoundSource
    bias: float = 0.0

    def final_rounding(self, expected: Tensor) -> Tensor:
        """Half a unit in the last place at ``expected``, which rounding to nearest cannot exceed; flat, float64."""
        return spacing(expected, self.dtype) / 2


def norm_bound(*, variance: float, coherent_squares: float, count: int) -> float:
    """Bound on the norm of the error of ``count`` elements.

    Args:
        variance: Σ a², with the amplitudes a of independent errors.
        coherent_squares: Σ c², with the bounds c on coherent errors.
        count: The number of elements; 1 or more.
    """
    return math.sqrt(variance * (1 + confidence() ** 2 / count)) + math.sqrt(coherent_squares)


def projection_bound(*, variance: float, coherent: float) -> float:
    """Bound on ⟨error, expected⟩.

    Args:
        variance: Σ (a e)², with the amplitudes a of independent errors and the expected values e.
        coherent: Σ c |e|, with the bounds c on coherent errors.
    """
    return confidence() * math.sqrt(variance) + coherent


def from_measured_error(
    *, actual: Tensor, expected: Tensor, scale: float, typical: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(independent, coherent) from a plain implementation's error, where no analysis is at hand.

    Each element's amplitude is ``scale`` times the larger of its own error and the root mean square: one element's
    error may be zero by luck. Elements larger than the root mean square of all are granted as much in proportion: the
    targets' entries in the gradient of a softmax are hundreds of times the others. Where there are few elements,
    ``typical`` is their relative error, measured on other inputs. The coherent errors are zero.
    """
    expected = expected.double()
    # Where the oracle is not finite there is no error to measure, and none is granted.
    error = torch.where(expected.isfinite(), (actual.double() - expected).abs(), 0.0)
    size = torch.where(expected.isfinite(), expected, 0.0)
    usual_size = _root_mean_square(size)
    mean = torch.maximum(_root_mean_square(error), typical * usual_size)
    # 0/0 where everything is zero: no larger than the others.
    share = (size.abs() / usual_size).nan_to_num(nan=1.0).clamp(min=1.0)
    return scale * torch.maximum(error, mean * share), torch.zeros_like(error)


def _root_mean_square(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt() if tensor.numel() else tensor.sum()
