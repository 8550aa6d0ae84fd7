"""The bound on memory that `kto` declares, held against what was measured on an H100 and what a defect would take."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ktonum.checks import checks_for
from ktonum.declare.cases import Case
from ktonum.kernels.audit.kto_op import OP
from ktonum.kernels.audit.planned_memory import Step, peak_memory
from support.repository import ROOT

RESULTS = ROOT / "benchmarks" / "results"
#: Peaks of steps with the default workspace, gradients included, by case of `ktonum bench`.
MEASURED = [
    (r["case"], m["peak_bytes"])
    for name in ("h100-goals.json", "h100-growth.json")
    for r in json.loads((RESULTS / name).read_text("utf-8"))["results"]
    for m in r["measured"]
    if m["contender"] == "ktonum" and m["peak_bytes"] is not None
]


def step_of(case: dict[str, Any]) -> Step:
    """The step that a case of `ktonum bench` takes, on Hopper."""
    dtype = getattr(torch, case["dtype"])
    return Step(case["B"] * case["T"], case["H"], case["V"], dtype, packed=case["masked"] > 0, descriptors=True)


def test_enough_was_measured() -> None:
    assert len(MEASURED) >= 10


@pytest.mark.parametrize(("case", "peak"), MEASURED, ids=[c["name"] for c, _ in MEASURED])
def test_what_was_measured_is_within_the_bound(case: dict[str, Any], peak: int) -> None:
    assert peak <= peak_memory(step_of(case))


@pytest.mark.parametrize(("case", "peak"), MEASURED, ids=[c["name"] for c, _ in MEASURED])
def test_one_more_copy_of_a_large_tensor_is_beyond_the_bound(case: dict[str, Any], peak: int) -> None:
    step = step_of(case)
    size = step.dtype.itemsize
    head = step.vocabulary * step.hidden * size
    logits = step.tokens * step.vocabulary * size
    assert peak + head > peak_memory(step), "a copy of the head, or its gradient in float32"
    assert peak + logits > peak_memory(step), "logits that are materialised"
    hidden_states = step.tokens * step.hidden * size
    # Where tokens are masked, the bound does not know how many; and small tensors are granted a few MiB.
    if not step.packed and hidden_states >= 2**24:
        assert peak + hidden_states > peak_memory(step), "a copy of the hidden states"


def test_the_bound_follows_the_dtype_and_what_does_not_fit() -> None:
    at = Step(1000, 64, 5000, torch.bfloat16)
    sizes = [peak_memory(Step(1000, 64, 5000, dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    assert sizes[0] == peak_memory(at) < sizes[1] < sizes[2]
    assert peak_memory(Step(1000, 64, 5000, torch.bfloat16, workspace=10**6)) < sizes[0]


def test_the_check_is_asked_on_gpus_alone_and_at_production_size_too() -> None:
    asked = {
        device: [
            case.point
            for case in OP.cases(profile="full", dtypes=["bf16"], device=device)
            if "peak_memory" in {check.name for check in checks_for(OP, case)}
        ]
        for device in ("cpu", "cuda")
    }
    assert not asked["cpu"]
    assert any(point.dims["V"] > 100_000 for point in asked["cuda"])
    assert OP.peak_memory is not None
    for case in (Case("kto", point, "bf16", "cuda") for point in asked["cuda"]):
        gradients = 2 * case.point.dims["V"] * case.point.dims["H"]
        assert OP.peak_memory(case.point.dims, case.point.parameters, case.dtype) > gradients
