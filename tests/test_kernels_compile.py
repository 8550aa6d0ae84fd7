"""The kernels compile to PTX and machine code for GPUs that need not be there."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton.backends.nvidia", reason="this build of Triton has no NVIDIA backend")

SCRIPT = Path(__file__).parent / "compile_lane.py"
#: Bytes of shared memory a block may use: CUDA C++ Programming Guide, table "Technical Specifications per Compute
#: Capability".
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}
LOGITS_KERNELS = ("tile_statistics_kernel", "probabilities_kernel")
EXPECTED = {
    *((k, d, "aligned") for k in LOGITS_KERNELS for d in ("bfloat16", "float16", "float32", "float64")),
    *((k, d, "strided, bias") for k in LOGITS_KERNELS for d in ("bfloat16", "float32", "float64")),
    ("tile_statistics_kernel", "float32", "aligned, tf32"),
    *(("add_target_terms_kernel", d, "aligned") for d in ("bfloat16", "float16", "float32", "float64")),
    *(("reduce_tiles_kernel", d, "aligned") for d in ("float32", "float64")),
}


@functools.cache
def built(capability: int) -> list[dict[str, Any]]:
    """The lane's lines for one target, from a process in which the kernels are not interpreted."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles(capability: int) -> None:
    lines = built(capability)
    assert not (failed := [line for line in lines if "error" in line]), failed
    assert {(line["kernel"], line["dtype"], line["variant"]) for line in lines} == EXPECTED
    for line in lines:
        assert line["cubin"] > 0
        assert line["shared"] <= SHARED_MEMORY[capability], line
        # Strides times indices take 64 bits; the other kernels add plain column indices to 64-bit row offsets.
        assert not (line["kernel"] in LOGITS_KERNELS and line["narrow_offsets"]), line
        if line["variant"] == "aligned" and line["kernel"] in LOGITS_KERNELS and line["registers"] is not None:
            # Some spilling into L1 is harmless; a tile that does not fit spills kilobytes.
            assert line["registers"] <= 255
            assert line["spilled"] <= 512, line
        if line["kernel"] in LOGITS_KERNELS and (line["dtype"] in ("bfloat16", "float16") or "tf32" in line["variant"]):
            assert TENSOR_CORES[capability] in line["tensor_cores"], line
        elif line["dtype"] == "float32":
            # Tensor cores know no IEEE float32: they would be TF32 that nobody asked for.
            assert line["tensor_cores"] == [], line


NARROW = "%x = tt.addptr %a, %b : tensor<128x64x!tt.ptr<bf16>>, tensor<128x64xi32> loc(#loc)"


def test_the_lane_notices_what_it_is_for() -> None:
    """A kernel that does not compile is a line of the report, and a 32-bit offset into a matrix is found."""
    code = f"""
import dataclasses, sys
sys.path.append({str(SCRIPT.parent)!r})
import compile_lane as lane
variant = next(lane.variants(90))
wrong = dataclasses.replace(variant, constexprs=variant.constexprs | dict(BLOCK_ROWS=100))
print(lane.build(wrong, 80)["error"])
print([bool(lane.NARROW_OFFSET.search(line)) for line in ({NARROW!r}, {NARROW.replace("i32", "i64")!r})])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "power of 2" in done.stdout
    assert done.stdout.endswith("[True, False]\n")
