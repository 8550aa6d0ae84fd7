"""Bounds on rounding errors: of the operations that ops are made of, and how measured errors are held against them.

`formats` has precisions and ranges, `constants` what n roundings amount to, `summation` sums and inner products by
order, `exponentials` log-sum-exp and softmax, `error_bounds` the error of one tensor, `standard` what an audit grants.
Each names its source and assumptions.
"""

from __future__ import annotations

from ktonum.bounds.constants import FALSE_ALARM, confidence, gamma, probabilistic_gamma
from ktonum.bounds.error_bounds import (
    ErrorBound,
    amplitude,
    from_measured_error,
    subnormal_rounding,
    unit_roundoff,
)
from ktonum.bounds.exponentials import FUNCTION_BIAS, FUNCTION_ERROR, ShiftedExponentials
from ktonum.bounds.formats import BF16, E4M3, E5M2, FORMATS, FP16, FP32, FP64, TF32, Format
from ktonum.bounds.standard import EAGER, MEASURED_SCALE, PRECISE, Arithmetic, Standard, standard_named
from ktonum.bounds.summation import (
    PAIRWISE,
    SEQUENTIAL,
    Order,
    blocked,
    inner_product_amplitude,
    multiply_add_bound,
    split,
    stagnation_bias,
    sum_amplitude,
    sum_bound,
    sum_probable_bound,
    summation_variance,
)

__all__ = [
    "BF16",
    "E4M3",
    "E5M2",
    "EAGER",
    "FALSE_ALARM",
    "FORMATS",
    "FP16",
    "FP32",
    "FP64",
    "FUNCTION_BIAS",
    "FUNCTION_ERROR",
    "MEASURED_SCALE",
    "PAIRWISE",
    "PRECISE",
    "SEQUENTIAL",
    "TF32",
    "Arithmetic",
    "ErrorBound",
    "Format",
    "Order",
    "ShiftedExponentials",
    "Standard",
    "amplitude",
    "blocked",
    "confidence",
    "from_measured_error",
    "gamma",
    "inner_product_amplitude",
    "multiply_add_bound",
    "probabilistic_gamma",
    "split",
    "stagnation_bias",
    "standard_named",
    "subnormal_rounding",
    "sum_amplitude",
    "sum_bound",
    "sum_probable_bound",
    "summation_variance",
    "unit_roundoff",
]
