"""`assert_within`: compares a result with its float64 oracle; the tolerance comes from a measured row or a derivation.

The measures are those of `ktonum.measure.in_roundings`. None of them depends on an absolute size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ktonum.bounds import PRECISE, confidence, summation_variance, unit_roundoff
from ktonum.declare.cases import DTYPES, dtype_name, torch_dtype
from ktonum.errors import InputError, ToleranceError
from ktonum.measure.in_roundings import Model, Stretch, derived_tolerances, exceeding_elements, measure_errors
from ktonum.results import BoundKind, BoundSource, Measurement
from ktonum.tolerances.failure_message import Failure
from ktonum.tolerances.table_files import find_table
from ktonum.tolerances.tables import MEASURES, Row

__all__ = ["assert_within", "device_class"]


def _of_sums(terms: float, operand_roundings: int, dtype: torch.dtype, device: str) -> Model:
    """Errors of sums of ``terms`` terms of mean zero. For them, a typical element's square is the sum of squares."""
    arithmetic = PRECISE.arithmetic(dtype, device)

    def model(s: Stretch) -> tuple[Tensor, Tensor]:
        squares = s.typical.square()
        variance = summation_variance(terms, s.expected, squares, arithmetic.accumulator)
        variance = variance + operand_roundings * unit_roundoff(arithmetic.operands) ** 2 * squares
        return variance.sqrt(), arithmetic.truncation(terms) * s.expected.abs()

    return model


def device_class(device: str | torch.device) -> str:
    """The device class: ``sm_90`` and the like for a GPU, ``cpu`` or ``interpreter`` for a CPU.

    It is ``interpreter`` if the environment has ``TRITON_INTERPRET=1``. A device class is returned as it is.
    """
    name = str(device)
    if name.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(torch.device(name))
        return f"sm_{major}{minor}"
    return "interpreter" if name == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" else name


def assert_within(
    *,
    actual: Tensor,
    expected: Tensor,
    op: str,
    output: str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    dims: Mapping[str, int] | None = None,
    terms: int | None = None,
    operand_roundings: int = 0,
    tables: str | Path | None = None,
) -> tuple[Measurement, ...]:
    """Raise unless ``actual`` is as close to ``expected`` as the result of a correct implementation of ``op``.

    There are three measures, see `ktonum.measure.in_roundings`. The tolerance of each comes from the table row for
    exactly this op, output, dtype and device class. If there is no such row, it is derived for this computation: a sum
    of ``terms`` products in random order; the operands of a product are rounded ``operand_roundings`` times in total;
    the sum is accumulated in float32 (float64 for float64 tensors) and rounded once.

    The derivation uses Hoeffding's inequality under the model of Higham and Mary (2019, SIAM J. Sci. Comput. 41(5),
    A2815), with one false alarm in 10⁶. So the error of a sum grows with √terms instead of terms. The terms are assumed
    to have mean zero, so that elements are about as large as the root sum of squares of their terms. Sums that cancel
    more than that need a row or an audit.

    Args:
        actual: The result, bfloat16, float16, float32 or float64, any shape.
        expected: The oracle, float64, same shape, computed in float64 from the same input values as ``actual``.
        op: The op's name, which is also the name of its table.
        output: An output's name, or ``grad_INPUT``.
        dtype: The dtype that the op ran in, as a torch dtype or a name (``bf16``). It is needed if the result has
            another dtype; for example, the loss of a bf16 op is float32.
        device: A device, or a device class (see `device_class`); by default the result's device.
        dims: The case's sizes by name. If they are given, a row is used only if sizes as large were measured.
        terms: The length of the reduction that makes an element. It is used for measures without a row.
        operand_roundings: How often the operands of a product are rounded to ``dtype`` in between: 0 if products read
            the inputs unchanged, 1 for P V in attention.
        tables: A directory with your own tables. They take precedence over those of ktonum.

    Returns:
        The measurements, each with its tolerance and the source of the tolerance. Measures without a row are left out
        if ``terms`` is not given. ``element`` always needs a row or ``terms``.

    Raises:
        ToleranceError: An error is beyond its tolerance. It is an `AssertionError`.
        InputError: The tensors cannot be compared, a name or number does not fit, or there is neither a row nor
            ``terms``.
        TableError: The op's table is not valid.
    """
    _check(actual, expected, terms, operand_roundings)
    name = dtype if isinstance(dtype, str) else dtype_name(dtype or actual.dtype)
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}: use {', '.join(DTYPES)}, or the torch dtype")
    kind = device_class(actual.device if device is None else device)
    table = find_table(op, tables)
    key = {"output": output, "dtype": name, "device_class": kind}
    here = _device_name(actual.device if device is None else device)
    found = {} if table is None else {m: table.look_up(measure=m, dims=dims, device=here, **key) for m in MEASURES}
    rows = {m: f.row for m, f in found.items() if f.row is not None}
    reasons = dict.fromkeys(MEASURES, f"there is no table {op}.toml") | {m: f.why for m, f in found.items()}
    if "element" not in rows and terms is None:
        raise InputError(
            f"no tolerance for {op}/{output} in {name} on {kind}: {reasons['element']}. Pass terms=, the length of the "
            f"reduction that makes an element (and operand_roundings=, if operands are rounded in between), or "
            f"tables=, a directory with a measured {op}.toml"
        )
    stored = torch_dtype(rows["element"].stored) if "element" in rows else actual.dtype
    errors = measure_errors(actual=actual, expected=expected, stored=stored)
    derived: dict[str, float] = {}
    if terms is not None and set(errors.values) - set(rows):
        model = _of_sums(terms, operand_roundings, torch_dtype(name), "cuda" if kind.startswith("sm_") else "cpu")
        derived = derived_tolerances(expected=expected, stored=stored, model=model)
    measurements = []
    for measure, value in errors.values.items():
        if measure in rows:
            tolerance, why = _resized(rows[measure], expected.numel(), reasons[measure])
            source = BoundSource(BoundKind.TABLE, text=why)
        elif measure in derived:
            tolerance = derived[measure]
            why = (
                f"derived for {terms} terms, {operand_roundings} operand roundings and one of {dtype_name(stored)}, by "
                f"Hoeffding's inequality (Higham and Mary 2019), because {reasons[measure]}"
            )
            source = BoundSource(BoundKind.DERIVED, text=why)
        else:
            continue
        where = errors.worst if measure == "element" else None
        measurements.append(Measurement(output, measure, value, tolerance, MEASURES[measure], source, where))
    if not all(m.within for m in measurements):
        heading = f"{op}/{output} in {name} on {kind}"
        audited = op if table is not None and tables is None else "your.module:OP (a ktonum.Op for this function)"
        command = f"ktonum audit {audited} --dtype {name} --device {'cuda' if kind.startswith('sm_') else 'cpu'}"
        exceeding = exceeding_elements(actual=actual, expected=expected, stored=stored, tolerance=measurements[0].bound)
        failure = Failure(heading, actual, expected, errors, measurements, exceeding, dims or {}, command)
        raise ToleranceError(failure.message())
    return tuple(measurements)


def _device_name(device: str | torch.device) -> str:
    """The GPU's name as in a table's provenance; empty for a CPU, whose class is enough, and for a device class."""
    name = str(device)
    return torch.cuda.get_device_name(torch.device(name)) if name.startswith("cuda") else ""


def _check(actual: Tensor, expected: Tensor, terms: int | None, operand_roundings: int) -> None:
    found = f"actual is {actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    if actual.shape != expected.shape:
        raise InputError(f"{found}: pass tensors of one shape")
    if dtype_name(actual.dtype) not in DTYPES:
        raise InputError(f"{found}: actual may be {', '.join(DTYPES.values())}")
    if expected.dtype != torch.float64:
        raise InputError(f"{found}: compute expected in float64, from inputs upcast to float64")
    if not bool(expected.isfinite().any()):
        raise InputError(f"{found}: expected has no finite element to compare with; pass one that has")
    for name, value, least in (("terms", terms, 1), ("operand_roundings", operand_roundings, 0)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise InputError(f"{name} is {value!r}: pass an integer, {least} or more")


def _resized(row: Row, count: int, why: str) -> tuple[float, str]:
    """A row's tolerance for a tensor of ``count`` elements, and where it comes from.

    It is adapted if the row was measured on tensors of other sizes. The largest of more errors is larger. Sums of fewer
    errors average out less. Both follow Hoeffding's inequality, from which the row's bound is derived.
    """
    least, most, single = row.elements_min, row.elements_max, confidence()
    factor = 1.0
    if row.measure == "element" and count > most:
        factor = confidence(count) / confidence(most)
    elif row.measure == "relative_norm" and count < least:
        factor = math.sqrt((1 + single**2 / count) / (1 + single**2 / least))
    elif row.measure == "signed_bias" and count < least:
        factor = math.sqrt(least / count)
    if count > most:
        why += f"; measured on up to {most} elements, here are {count}: pass dims= if reductions are longer too"
    return factor * row.tolerance, why if factor == 1.0 else f"{why}; × {factor:.3g} for {count} elements"
