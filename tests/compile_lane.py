"""Compile the kernels for GPUs that are not there; a script, since the tests' own process holds interpreted kernels.

``python compile_lane.py 80 90 100`` prints one JSON line for each kernel, dtype and target: registers, spilled bytes
and shared memory, or the error. Arguments are specialised as the launcher has them at production dims (everything
divisible by 16, hidden stride 1), and, under the name ``strided``, as it has them for views of odd dims.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
# What ptxas says of registers and spills is printed only when it runs: nothing may come from a cache.
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ktonum.kernels import launch
from ktonum.kernels.block_sizes import Kernel, block_sizes
from ktonum.kernels.gradient_kernels import add_target_terms_kernel, probabilities_kernel
from ktonum.kernels.logsumexp_kernels import reduce_tiles_kernel, tile_statistics_kernel
from ktonum.kernels.products import accumulator_dtype

_POINTEES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}

#: Pointer arithmetic on a two-dimensional tile of pointers by 32-bit offsets.
NARROW_OFFSET = re.compile(r"tt\.addptr .*tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+xi32>")


@dataclass(frozen=True)
class Variant:
    """One kernel as one launch specialises it."""

    kernel: Any
    dtype: torch.dtype
    pointers: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    aligned: bool
    label: str

    def source(self) -> ASTSource:
        """The kernel with its argument types, constants and divisibility."""
        constants = dict(self.constexprs)
        if self.aligned:
            constants |= {n: 1 for n in self.kernel.arg_names if n.endswith("_hidden") and n.startswith("stride_")}
        signature = {n: "constexpr" if n in constants else self.pointers.get(n, "i32") for n in self.kernel.arg_names}
        divisible = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(self.kernel.arg_names)
            if self.aligned and n not in constants and not self.kernel.params[i].do_not_specialize
        }
        return ASTSource(self.kernel, signature, constants, divisible)


def tiles(dtype: torch.dtype, kernel: Kernel, capability: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and options of a logits kernel, with the block sizes of the launcher."""
    blocks = block_sizes(dtype, kernel, capability=divmod(capability, 10))
    constants = {
        "UPCAST": False,
        "ACCUMULATOR": launch._ACCUMULATORS[accumulator_dtype(dtype)],
        "PRECISION": "ieee",
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_COLUMNS": blocks.columns,
        "BLOCK_HIDDEN": blocks.hidden,
        "PROMOTE": blocks.promote,
        "GROUP": blocks.group,
    }
    return constants, {"num_warps": blocks.warps, "num_stages": blocks.stages}


def variants(capability: int) -> Iterator[Variant]:
    """Every kernel in every dtype with the block sizes of the launcher."""
    for dtype, pointee in _POINTEES.items():
        wide = accumulator_dtype(dtype)
        accumulator = _POINTEES[wide]
        operands = {f"{n}_ptr": f"*{pointee}" for n in ("input", "weight", "bias")} | {"target_ptr": "*i64"}
        forward = operands | {f"{n}_ptr": f"*{accumulator}" for n in ("tile_max", "tile_sum", "target_logit")}
        backward = operands | {
            "logsumexp_ptr": "*fp64",
            "coefficient_ptr": f"*{accumulator}",
            "slab_ptr": f"*{_POINTEES[launch.slab_dtype(dtype)]}",
            "bias_partial_ptr": f"*{accumulator}",
        }
        tile, options = tiles(dtype, "statistics", capability)
        backward_tile, backward_options = tiles(dtype, "probabilities", capability)
        for aligned in (True, False):
            # Each branch is compiled once: with a bias where nothing is aligned, without one where everything is.
            # Strided float16 differs from bfloat16 in nothing but the instructions' names.
            if dtype == torch.float16 and not aligned:
                continue
            bias = {"HAS_BIAS": not aligned, "EVEN_HIDDEN": aligned}
            label = "aligned" if aligned else "strided, bias"
            yield Variant(tile_statistics_kernel, dtype, forward, tile | bias, options, aligned, label)
            if dtype == torch.float32 and aligned:
                asked = tile | bias | {"PRECISION": "tf32"}
                yield Variant(tile_statistics_kernel, dtype, forward, asked, options, aligned, "aligned, tf32")
            gradient = backward_tile | bias | {"BIAS_GRADIENT": not aligned, "SLAB_SCALE": launch.slab_scale(dtype)}
            yield Variant(probabilities_kernel, dtype, backward, gradient, backward_options, aligned, label)
        targets = {"input_ptr": f"*{pointee}"} | {f"{n}_ptr": f"*{accumulator}" for n in ("grad_weight", "coefficient")}
        targets |= {"target_ptr": "*i64", "order_ptr": "*i64"}
        constants = {"ACCUMULATOR": launch._ACCUMULATORS[wide], "BLOCK_ROWS": 32, "BLOCK_HIDDEN": 64}
        yield Variant(add_target_terms_kernel, dtype, targets, constants, {}, True, "aligned")
        if dtype in (torch.float32, torch.float64):
            reduce = {f"{n}_ptr": f"*{accumulator}" for n in ("tile_max", "tile_sum", "target_logit")}
            reduce |= {"logsumexp_ptr": "*fp64", "token_logp_ptr": "*fp64"}
            yield Variant(
                reduce_tiles_kernel, dtype, reduce, {"BLOCK_ROWS": 32, "BLOCK_TILES": 32}, {}, True, "aligned"
            )


def build(variant: Variant, capability: int) -> dict[str, Any]:
    """What the compiler and ptxas say of one kernel on one target."""
    found: dict[str, Any] = {
        "kernel": variant.kernel.__name__,
        "dtype": str(variant.dtype).removeprefix("torch."),
        "variant": variant.label,
        "capability": capability,
    }
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(
                variant.source(), target=GPUTarget("cuda", capability, 32), options=variant.options
            )
    except Exception as error:  # Whatever goes wrong in a compiler is a line of the report, never the end of it.
        return found | {"error": f"{type(error).__name__}: {error}"[:2000]}
    ptx = compiled.asm["ptx"]
    # An offset into a matrix of tokens x hidden, vocabulary x hidden or a slab exceeds 32 bits at production dims.
    narrow = [line for line in compiled.asm["ttir"].splitlines() if NARROW_OFFSET.search(line)]
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    return found | {
        "shared": compiled.metadata.shared,
        "registers": int(registers[1]) if registers else None,
        "spilled": max(map(int, spills)) if spills else None,
        "cubin": len(compiled.asm["cubin"]),
        "narrow_offsets": narrow,
        "tensor_cores": sorted(set(re.findall(r"\b(wgmma|tcgen05|mma)\.[a-z_.0-9]*", ptx))),
    }


def main(capabilities: list[int]) -> None:
    """One line a variant."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for capability in capabilities:
            for variant in variants(capability):
                sys.stdout.write(json.dumps(build(variant, capability)) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]])
