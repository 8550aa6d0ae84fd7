"""The record of launches has every launch, and only while somebody records."""

from __future__ import annotations

import ast
from collections import Counter

import pytest
import torch

from ktonum.kernels.device import trace
from ktonum.kernels.loss import KernelOptions, fused_linear_kto_loss
from support.kto_inputs import Recipe, draw, tracked
from support.repository import ROOT

LAUNCHING = sorted((ROOT / "kernels" / "device").glob("*/launch.py"))


def launches_and_notes(source: str) -> dict[str, tuple[Counter[str], Counter[str]]]:
    """By function: the kernels that it launches as ``kernel[grid](…)``, and those that it notes."""
    found = {}
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        launched: Counter[str] = Counter()
        noted: Counter[str] = Counter()
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched[ast.unparse(node.func.value)] += 1
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "note":
                noted[str(ast.literal_eval(node.args[0]))] += 1
        kernels = Counter({name: count for name, count in noted.items() if not name.endswith("_product")})
        if launched or kernels:
            found[function.name] = (launched, kernels)
    return found


@pytest.mark.parametrize("path", LAUNCHING, ids=lambda path: path.parent.name)
def test_every_launch_is_noted_under_the_kernels_name(path: object) -> None:
    found = launches_and_notes(path.read_text("utf-8"))  # type: ignore[attr-defined]
    assert found
    for function, (launched, noted) in found.items():
        assert launched == noted, function


def test_a_launch_that_is_not_noted_is_found() -> None:
    source = "def f(x):\n    a_kernel[(1,)](x)\n    b_kernel[(2, 3)](x, N=1)\n    note('a_kernel', x.dtype, rows=1)\n"
    launched, noted = launches_and_notes(source)["f"]
    assert launched - noted == Counter({"b_kernel": 1})
    assert launches_and_notes(source.replace("a_kernel'", "c_kernel'"))["f"][1] == Counter({"c_kernel": 1})


def test_the_products_of_a_step_are_recorded_with_dims_and_dtype(device: torch.device) -> None:
    inputs = tracked(draw(Recipe(dims=(2, 3, 24, 40), dtype=torch.float32, masked=0.0), device))
    with trace.recorded() as launches:
        fused_linear_kto_loss(inputs)[0].backward()  # type: ignore[no-untyped-call]
    products = [launch for launch in launches if launch.name.endswith("_product")]
    assert [launch.name for launch in products] == ["logits_product", "input_product", "weight_product"]
    assert all(launch.dims == {"rows": 6, "columns": 40, "hidden": 24} for launch in products)
    assert {launch.dtype for launch in products} == {torch.float32}


def test_recordings_begin_and_end(device: torch.device) -> None:
    """They may be nested, and end when an exception leaves them."""
    inputs = draw(Recipe(dims=(1, 2, 8, 9), dtype=torch.float32), device)
    options = KernelOptions(validate=False)
    with trace.recorded() as outer:
        with trace.recorded() as inner:
            fused_linear_kto_loss(inputs, options=options)
        with pytest.raises(ZeroDivisionError), trace.recorded() as broken:
            raise ZeroDivisionError
        first = list(outer)
        fused_linear_kto_loss(inputs, options=options)
    fused_linear_kto_loss(inputs, options=options)
    assert inner == first and first
    assert outer == first * 2
    assert broken == []
