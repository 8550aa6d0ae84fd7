"""`assert_within`: a result against its float64 oracle, with a tolerance from a measured row or from a derivation.

The measures are those of `ktonum.measure.in_roundings`, which no absolute size enters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ktonum.bounds import Arithmetic, confidence, summation_variance, unit_roundoff
from ktonum.declare.cases import DTYPES, dtype_name, torch_dtype
from ktonum.errors import InputError, ToleranceError
from ktonum.measure.in_roundings import Model, Stretch, derived_tolerances, exceeding_elements, measure_errors
from ktonum.results import Measurement
from ktonum.tolerances.failure_message import Failure
from ktonum.tolerances.table_files import find_table
from ktonum.tolerances.tables import MEASURES, Row

__all__ = ["assert_within", "device_class"]


def _of_sums(terms: float, operand_roundings: int, dtype: torch.dtype, device: str) -> Model:
    """Sums of ``terms`` terms of mean zero, for which a typical element's square is its terms' sum of squares."""
    arithmetic = Arithmetic.of("precise", dtype, device)

    def model(s: Stretch) -> tuple[Tensor, Tensor]:
        squares = s.typical.square()
        variance = summation_variance(terms, s.expected, squares, arithmetic.accumulator)
        variance = variance + operand_roundings * unit_roundoff(arithmetic.operands) ** 2 * squares
        return variance.sqrt(), arithmetic.truncation(terms) * s.expected.abs()

    return model


def device_class(device: str | torch.device) -> str:
    """``sm_90`` and the like for a GPU; for a CPU ``interpreter`` if Triton interprets in this process, else ``cpu``.

    Device classes themselves are accepted as well.
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
    """Raise unless ``actual`` is as near to ``expected`` as a correct implementation of ``op`` comes.

    The tolerance of each measure (see this module) is the table row's for exactly this op, output, dtype and device;
    where there is none, it is derived: a sum of ``terms`` products in random order, each of whose operands is rounded
    ``operand_roundings`` times in all, accumulated in float32 (float64 for float64 tensors) and rounded once. Errors of
    a sum are bounded in probability by √terms rather than terms: Hoeffding's inequality under Higham and Mary's model
    (2019, SIAM J. Sci. Comput. 41(5), A2815), one false alarm in 10⁶. The derivation takes the terms to have mean zero,
    so that elements are as large as their terms' root sum of squares; sums that cancel further need a row, or an audit.

    Args:
        actual: The result, any floating dtype and shape.
        expected: The oracle, float64, same shape: computed in float64 from the very inputs that ``actual`` saw.
        op: The op's name, that of its table.
        output: An output's name, or ``grad_INPUT``.
        dtype: The dtype the op ran in, where it is not the result's: a bf16 loss is float32. A torch dtype or a name.
        device: Default the result's; a device, ``cuda``, ``cpu``, or a device class, see `device_class`.
        dims: The case's sizes by name: a row is then used only if it was measured at sizes as large.
        terms: The length of the reduction that makes an element, for what has no row.
        operand_roundings: How often a product's operands are rounded to ``dtype`` on the way; 0 where the products take
            the inputs as they are, 1 for P V in attention.
        tables: A directory with tables of your own, looked into before the shipped ones.

    Returns:
        What was measured, each with its tolerance and where that comes from. Measures without a row are left out if
        there is no ``terms`` either; ``element`` always needs one of the two.

    Raises:
        ToleranceError: A measure is beyond its tolerance; an `AssertionError`.
        InputError: Tensors that cannot be compared, a dtype or sizes that are none, or neither row nor ``terms``.
        TableError: The op's table is not valid.
    """
    _check(actual, expected, terms, operand_roundings)
    name = dtype if isinstance(dtype, str) else dtype_name(dtype or actual.dtype)
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}: use {', '.join(DTYPES)}, or a torch dtype")
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
            f"reduction behind an element (and operand_roundings=, if 16-bit operands are rounded on the way), or "
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
            tolerance, source = _resized(rows[measure], expected.numel(), reasons[measure])
        elif measure in derived:
            tolerance = derived[measure]
            source = (
                f"derived for {terms} terms, {operand_roundings} operand roundings and one of {dtype_name(stored)}, "
                f"Hoeffding's inequality (Higham and Mary 2019); {reasons[measure]}"
            )
        else:
            continue
        where = str(list(errors.worst)) if measure == "element" else ""
        measurements.append(Measurement(f"{output}/{measure}", value, tolerance, MEASURES[measure], source, where))
    if not all(m.within for m in measurements):
        heading = f"{op}/{output} in {name} on {kind}"
        audited = op if table is not None and tables is None else "your.module:OP (a ktonum.Op of it)"
        command = f"ktonum audit {audited} --dtype {name} --device {'cuda' if kind.startswith('sm_') else 'cpu'}"
        exceeding = exceeding_elements(actual=actual, expected=expected, stored=stored, tolerance=measurements[0].bound)
        failure = Failure(heading, actual, expected, errors, measurements, exceeding, dims or {}, command)
        raise ToleranceError(failure.message())
    return tuple(measurements)


def _device_name(device: str | torch.device) -> str:
    """What a table's provenance calls a GPU; empty for a CPU, whose class tells enough, and for a device class."""
    name = str(device)
    return torch.cuda.get_device_name(torch.device(name)) if name.startswith("cuda") else ""


def _check(actual: Tensor, expected: Tensor, terms: int | None, operand_roundings: int) -> None:
    found = f"actual is {actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    if actual.shape != expected.shape:
        raise InputError(f"{found}: compare tensors of one shape")
    if dtype_name(actual.dtype) not in DTYPES:
        raise InputError(f"{found}: actual may be {', '.join(DTYPES.values())}")
    if expected.dtype != torch.float64:
        raise InputError(f"{found}: compute expected in float64, from inputs upcast to float64")
    if not bool(expected.isfinite().any()):
        raise InputError(f"{found}: expected holds no finite element, there is nothing to compare")
    for name, value, least in (("terms", terms, 1), ("operand_roundings", operand_roundings, 0)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise InputError(f"{name} is {value!r}: pass an integer, {least} or more")


def _resized(row: Row, count: int, why: str) -> tuple[float, str]:
    """A row's tolerance for a tensor of ``count`` elements, outside the sizes that it was measured at.

    The largest of more errors is larger, and the fewer there are the less their sums average out: as in Hoeffding's
    inequality, which the row's own bound is made with.
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
        why += f"; measured on {most} elements at most, and here are {count}: pass dims= if reductions are longer, too"
    return factor * row.tolerance, why if factor == 1.0 else f"{why}; × {factor:.3g} for {count} elements"
