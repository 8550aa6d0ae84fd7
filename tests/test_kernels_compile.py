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
LOGITS_KERNELS = ("tile_statistics_kernel", "logit_gradient_kernel")
EXPECTED = {
    *((k, d, "aligned") for k in LOGITS_KERNELS for d in ("bfloat16", "float16", "float32", "float64")),
    *((k, d, "strided, bias") for k in LOGITS_KERNELS for d in ("bfloat16", "float32", "float64")),
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
        # 64-bit offsets into everything that has two dimensions.
        assert not line["narrow_offsets"], line
        if line["variant"] == "aligned" and line["kernel"] in LOGITS_KERNELS and line["registers"] is not None:
            # Some spilling into L1 is harmless; a tile that does not fit spills kilobytes.
            assert line["registers"] <= 255
            assert line["spilled"] <= 512, line
        if line["dtype"] in ("bfloat16", "float16") and line["kernel"] in LOGITS_KERNELS:
            assert TENSOR_CORES[capability] in line["tensor_cores"], line


def test_a_kernel_that_does_not_compile_is_a_line_of_the_report(tmp_path: Path) -> None:
    """With a target that no compiler knows every line is an error, and the script itself ends well."""
    code = f"import runpy, sys; sys.argv = ['lane', '12']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(EXPECTED)
    assert all("error" in line for line in lines)
