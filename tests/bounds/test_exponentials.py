"""Bounds on log-sum-exp and softmax: right results stay within them, and wrong results do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ktonum.bounds import FUNCTION_ERROR, PAIRWISE, SEQUENTIAL, Order, ShiftedExponentials, confidence
from subjects.rounded_sums import LONG_DOUBLE_IS_LONGER, added

U = 2.0**-24


@pytest.mark.skipif(not LONG_DOUBLE_IS_LONGER, reason="this platform's long double has no more digits than float64")
@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -87.0), (torch.float64, -700.0)])
def test_the_librarys_functions_err_by_no_more_than_is_granted(dtype: torch.dtype, lowest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    arguments = lowest * torch.rand(400_000, generator=generator, dtype=torch.float64).to(dtype)
    sums = (1 + 2 ** (21 * torch.rand(400_000, generator=generator, dtype=torch.float64))).to(dtype)
    for function, exact, values in ((torch.exp, np.exp, arguments), (torch.log, np.log, sums)):
        truth = exact(values.numpy().astype(np.longdouble))
        relative = np.abs(function(values).numpy().astype(np.longdouble) / truth - 1)
        used = float(relative.max()) / (FUNCTION_ERROR * torch.finfo(dtype).eps / 2)
        assert 0.4 < used <= 1.0, (function.__name__, used)


def rows(spread: float, terms: int = 700) -> torch.Tensor:
    draw = torch.Generator().manual_seed(terms)
    return spread * torch.randn(200, terms, generator=draw)


@pytest.mark.parametrize("order", [SEQUENTIAL, PAIRWISE], ids=lambda o: o.name)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, -90.0, 1000.0])
def test_float32_is_within_both_forms(spread: float, offset: float, order: Order) -> None:
    """For entries of any size: the exponentials of large ones would overflow without the shift."""
    entries = rows(spread) + offset
    exact, wide = entries.double(), ShiftedExponentials(entries.double(), order, U)
    exponentials = (entries - entries.amax(-1, keepdim=True)).exp()
    total = added(exponentials, order)
    results = {
        "logsumexp": (
            total.log() + entries.amax(-1),
            exact.logsumexp(-1),
            wide.logsumexp_errors(),
            wide.logsumexp_bound(),
        ),
        "softmax": (exponentials / total[:, None], exact.softmax(-1), wide.softmax_errors(), wide.softmax_bound()),
    }
    for name, (result, truth, (amplitude, coherent), bound) in results.items():
        error = (result.double() - truth).abs()
        # Exponentials below float32's range become subnormal or zero.
        underflow = torch.finfo(torch.float32).smallest_normal if name == "softmax" else 0.0
        granted = confidence(error.numel()) * amplitude + coherent + underflow
        assert bool((error <= granted).all()) and bool((error <= bound + underflow).all()), name
        # Numbers near 1000 lie on a coarse grid, so the shift is exact. The bound still allows it one rounding.
        assert offset == 1000.0 or float((error / granted).amax()) > 1 / 30


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_entries_read_in_bf16_and_a_result_without_its_shift_are_outside(spread: float) -> None:
    entries = rows(spread)
    truth = entries.double().logsumexp(-1)
    amplitude, coherent = ShiftedExponentials(entries.double(), SEQUENTIAL, U).logsumexp_errors()
    for wrong in (entries.bfloat16().float().logsumexp(-1), entries.logsumexp(-1) - entries.amax(-1)):
        assert bool(((wrong.double() - truth).abs() > confidence(200) * amplitude + coherent).any())


def test_one_entry_alone_is_itself() -> None:
    alone = ShiftedExponentials(torch.tensor([[3.0]], dtype=torch.float64), SEQUENTIAL, U)
    amplitude, coherent = alone.logsumexp_errors()
    # log 1 is 0, and the error of log is relative to it. The errors of exp(0) and of the addition remain.
    assert float(coherent) == 0.0 and float(amplitude) == pytest.approx(U * math.hypot(3.0, FUNCTION_ERROR))


def test_errors_grow_with_the_distance_from_the_maximum_and_not_with_the_entries() -> None:
    near, far = (ShiftedExponentials(rows(s).double(), PAIRWISE, U).softmax_errors()[0] for s in (0.1, 20.0))
    p = rows(20.0).double().softmax(-1)
    assert float((far / p).amax()) > 20 * float((near / rows(0.1).double().softmax(-1)).amax())
    moved = ShiftedExponentials(rows(0.1).double() + 500, PAIRWISE, U).softmax_errors()[0]
    assert torch.allclose(moved, near, rtol=1e-9)
