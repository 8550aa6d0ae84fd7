"""The kernels compile to PTX and machine code for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from support.repository import ROOT

pytest.importorskip("triton.backends.nvidia", reason="this build of Triton has no NVIDIA backend")

SCRIPT = ROOT / "tests" / "support" / "compile_lane.py"
#: Bytes of shared memory a block may use: CUDA C++ Programming Guide, table "Technical Specifications per Compute
#: Capability".
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
#: The kernels around matrix products of the logits' size.
PRODUCTS = ("logits_kernel", "weight_gradient_kernel")
SIXTEEN_BIT = ("bfloat16", "float16")
WIDE = ("float32", "float64")
MODES = ("statistics, stored", "statistics", "stored")
ROW_KERNELS = (
    "add_target_terms_kernel",
    "bias_gradient_kernel",
    "column_sums_kernel",
    "finish_input_gradient_kernel",
    "input_sums_kernel",
    "rescale_slab_kernel",
    "reduce_tiles_kernel",
    "row_coefficients_kernel",
    "scale_rows_kernel",
    "target_logits_kernel",
)
EXPECTED = {
    *(("logits_kernel", d, f"aligned, {m}") for m in MODES for d in SIXTEEN_BIT),
    *(("logits_kernel", "bfloat16", f"strided, bias, {m}") for m in MODES),
    *(("softmax_kernel", d, m) for m in MODES for d in WIDE),
    *(("logit_sums_kernel", d, "bias") for d in (*SIXTEEN_BIT, *WIDE)),
    *(("formula_kernel", "float64", reduction) for reduction in ("mean", "none")),
    ("stretch_bounds_kernel", "int32", "aligned"),
    *((k, d, "aligned") for k in ROW_KERNELS for d in (*SIXTEEN_BIT, *WIDE)),
    ("pack_targets_kernel", "int64", "aligned"),
    ("sequence_sums_kernel", "float64", "aligned"),
}
#: On Hopper alone.
DESCRIBED = {
    *(("logits_kernel", d, f"descriptors, {m}") for m in MODES for d in SIXTEEN_BIT),
    *(("weight_gradient_kernel", d, "descriptors") for d in SIXTEEN_BIT),
}


def built(capability: int, *options: str) -> list[dict[str, Any]]:
    """The lane's lines for one target, from a process in which the kernels are not interpreted."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), *options],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def hold_lines(lines: list[dict[str, Any]], capability: int) -> None:
    """What each line says of its kernel is as it has to be; some kernel is there for everything that is asked."""
    assert not (failed := [line for line in lines if "error" in line]), failed
    asked: Counter[str] = Counter()
    for line in lines:
        assert line["cubin"] > 0
        assert line["shared"] <= SHARED_MEMORY[capability], line
        # Strides times indices take 64 bits.
        assert not line["narrow_offsets"], line
        product = line["kernel"] in PRODUCTS
        if product and not line["variant"].startswith("strided") and line["registers"] is not None:
            # Some spilling into L1 is harmless; a tile that does not fit spills kilobytes.
            asked["registers"] += 1
            assert line["registers"] <= 255
            assert line["spilled"] <= 512, line
        if product and line["dtype"] in SIXTEEN_BIT:
            asked["tensor cores"] += 1
            assert TENSOR_CORES[capability] in line["tensor_cores"], line
        elif line["dtype"] == "float32":
            # Tensor cores know no IEEE float32: they would be TF32 that nobody asked for.
            asked["no tensor cores"] += 1
            assert line["tensor_cores"] == [], line
    assert asked.keys() == {"registers", "tensor cores", "no tensor cores"}


def names(lines: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    return {(line["kernel"], line["dtype"], line["variant"]) for line in lines}


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles_in_every_dtype(capability: int) -> None:
    lines = built(capability)
    assert all(line["compiled"] for line in lines)
    assert names(lines) == EXPECTED | (DESCRIBED if capability == 90 else set())
    hold_lines(lines, capability)


def test_every_kernel_compiles() -> None:
    """Each in one dtype, for Hopper, which alone compiles them all; products through pointers and descriptors."""
    offered = built(90, "--one-for-each-kernel")
    assert names(offered) == EXPECTED | DESCRIBED
    lines = [line for line in offered if line["compiled"]]
    assert {line["kernel"] for line in lines} == {line["kernel"] for line in offered}
    assert {line["dtype"] for line in lines} == {line["dtype"] for line in offered} > {*SIXTEEN_BIT, *WIDE}
    through_descriptors = {line["kernel"] for line in lines if line["variant"].startswith("descriptors")}
    assert through_descriptors == set(PRODUCTS)
    assert {line["dtype"] for line in lines if line["kernel"] == "logits_kernel"} == set(SIXTEEN_BIT)
    hold_lines(lines, 90)


NARROW = """
    %rows = tt.expand_dims %row {axis = 1 : i32} : tensor<128xi32> -> tensor<128x1xi32> loc(#loc)
    %step = tt.splat %stride_input_row : i32 -> tensor<128x1xi32> loc(#loc)
    %product = arith.muli %rows, %step : tensor<128x1xi32> loc(#loc)
    %wide = tt.broadcast %product : tensor<128x1xi32> -> tensor<128x64xi32> loc(#loc)
    %x = tt.addptr %a, %wide : tensor<128x64x!tt.ptr<bf16>>, tensor<128x64xi32> loc(#loc)
"""
COLUMNS = """
    %range = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32> loc(#loc)
    %start = arith.muli %tile, %c64_i32 : i32 loc(#loc)
    %starts = tt.splat %start : i32 -> tensor<64xi32> loc(#loc)
    %h = arith.addi %starts, %range : tensor<64xi32> loc(#loc)
    %columns = tt.expand_dims %h {axis = 0 : i32} : tensor<64xi32> -> tensor<1x64xi32> loc(#loc)
    %wide = tt.broadcast %columns : tensor<1x64xi32> -> tensor<128x64xi32> loc(#loc)
    %x = tt.addptr %a, %wide : tensor<128x64x!tt.ptr<bf16>>, tensor<128x64xi32> loc(#loc)
"""


def test_the_lane_notices_what_it_is_for() -> None:
    """A kernel that does not compile is a line of the report, and a 32-bit offset of rows into a matrix is found."""
    code = f"""
import dataclasses, sys
sys.path.append({str(SCRIPT.parent)!r})
import compile_lane as lane
variant = next(lane.variants(90))
wrong = dataclasses.replace(variant, constexprs=variant.constexprs | dict(BLOCK_ROWS=100))
print(lane.build(wrong, 80)["error"])
print([len(lane.narrow_offsets(text)) for text in {[NARROW, NARROW.replace("i32", "i64"), COLUMNS]!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "power of 2" in done.stdout
    assert done.stdout.endswith("[1, 0, 0]\n")
