"""Compile the kernels for GPUs that are not there; a script, since the tests' own process holds interpreted kernels.

``python compile_lane.py 80 90 100`` prints one JSON line for each kernel, dtype and target: registers, spilled bytes
and shared memory, or the error. Arguments are specialised as the launcher has them at production dims (everything
divisible by 16, hidden stride 1), and, under the name ``strided``, as it has them for views of odd dims. With
``--one-for-each-kernel`` the lines are the same, but `chosen` variants alone are compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
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

from ktonum.kernels.device import hardware
from ktonum.kernels.device.block_sizes import WEIGHT_GRADIENT, block_sizes
from ktonum.kernels.device.formula.kernels import formula_kernel
from ktonum.kernels.device.gradients.kernels import (
    add_target_terms_kernel,
    bias_gradient_kernel,
    finish_input_gradient_kernel,
    stretch_bounds_kernel,
    weight_gradient_kernel,
)
from ktonum.kernels.device.logits.kernels import logits_kernel
from ktonum.kernels.device.packing.kernels import pack_targets_kernel, sequence_sums_kernel
from ktonum.kernels.device.products import accumulator_dtype
from ktonum.kernels.device.softmax.kernels import softmax_kernel
from ktonum.kernels.device.statistics.kernels import reduce_tiles_kernel, rescale_slab_kernel, target_logits_kernel
from ktonum.kernels.device.sums.kernels import (
    column_sums_kernel,
    input_sums_kernel,
    logit_sums_kernel,
    row_coefficients_kernel,
    scale_rows_kernel,
)

_POINTEES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}

#: Pointer arithmetic on a two-dimensional tile of pointers by 32-bit offsets, whose name is the group.
NARROW_OFFSET = re.compile(r"tt\.addptr %[\w#]+, (%[\w#]+) .*tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+xi32>")


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
            if self.aligned
            and n not in constants
            and not self.kernel.params[i].do_not_specialize
            and not signature[n].startswith("tensordesc")
        }
        return ASTSource(self.kernel, signature, constants, divisible)


def tiles(
    dtype: torch.dtype, capability: int, descriptors: bool, stored: bool = True
) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and options of the logits kernel, with the block sizes of the launcher."""
    blocks = block_sizes(dtype, capability=divmod(capability, 10), descriptors=descriptors, stored=stored)
    constants = {
        "DESCRIPTORS": descriptors,
        "UPCAST": False,
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_COLUMNS": blocks.columns,
        "BLOCK_HIDDEN": blocks.hidden,
        "PROMOTE": blocks.promote,
        "GROUP": blocks.group,
        "SLAB_SCALE": hardware.slab_scale(dtype),
    }
    return constants, {"num_warps": blocks.warps, "num_stages": blocks.stages}


def descriptor(pointee: str, *block: int) -> str:
    """The type of a tensor descriptor."""
    return f"tensordesc<{pointee}{list(block)}>".replace(" ", "")


def softmax(dtype: torch.dtype) -> Iterator[Variant]:
    """The kernels around the library's products of wider operands, as a forward and as a backward launches them."""
    pointee = _POINTEES[dtype]
    pointers = {f"{n}_ptr": f"*{pointee}" for n in ("logits", "bias", "shift", "tile_shift", "tile_sum")}
    pointers |= {"target_ptr": "*i64"}
    blocks = block_sizes(dtype)
    shape = {"BLOCK_ROWS": blocks.rows, "BLOCK_COLUMNS": blocks.columns}
    for name, statistics, store in (
        ("statistics, stored", True, True),
        ("statistics", True, False),
        ("stored", False, True),
    ):
        constants = shape | {"HAS_BIAS": not statistics, "STATISTICS": statistics, "STORE": store}
        kept = {} if statistics else {"shift_ptr": "*fp64"}
        yield Variant(softmax_kernel, dtype, pointers | kept, constants, {"num_warps": blocks.warps}, True, name)


def logits(dtype: torch.dtype, capability: int) -> Iterator[Variant]:
    """The logits kernel as a forward and as a backward launches it."""
    pointee = _POINTEES[dtype]
    shared = {"bias_ptr": f"*{pointee}", "target_ptr": "*i64", "limit_ptr": "*i64", "scale": "fp32"}
    shared |= {f"{n}_ptr": "*fp32" for n in ("shift", "tile_shift", "tile_sum")}
    pointers = {n: f"*{pointee}" for n in ("input", "weight", "slab")}
    # What a forward keeps for its backward is float64.
    kept = {"shift_ptr": "*fp64"}
    forward = {"STATISTICS": True, "STORE": True, "TILE_RELATIVE": dtype == torch.float16}
    scored = forward | {"STORE": False, "TILE_RELATIVE": False}
    backward = scored | {"STATISTICS": False, "STORE": True}
    modes = {"statistics, stored": forward, "statistics": scored, "stored": backward}
    for aligned in (True, False):
        # Each branch is compiled once: with a bias where nothing is aligned, without one where everything is.
        # Strided float16 differs from bfloat16 in nothing but the instructions' names.
        if dtype == torch.float16 and not aligned:
            continue
        label = "aligned" if aligned else "strided, bias"
        launched = {f"{label}, {mode}": constants for mode, constants in modes.items()}
        for name, constants in launched.items():
            tile, options = tiles(dtype, capability, descriptors=False, stored=constants["STORE"])
            tile |= {"HAS_BIAS": not aligned, "EVEN_HIDDEN": aligned, "HAS_LIMIT": not constants["STORE"]} | constants
            given = shared | pointers | ({} if constants["STATISTICS"] else kept)
            yield Variant(logits_kernel, dtype, given, tile, options, aligned, name)
    if capability == 90:
        for mode, constants in modes.items():
            tile, options = tiles(dtype, capability, descriptors=True, stored=constants["STORE"])
            rows, columns, hidden = (tile[f"BLOCK_{n}"] for n in ("ROWS", "COLUMNS", "HIDDEN"))
            described = {
                "input": descriptor(pointee, rows, hidden),
                "weight": descriptor(pointee, columns, hidden),
                "slab": descriptor(pointee, rows, columns // 2),
            }
            tile |= {"HAS_BIAS": False, "EVEN_HIDDEN": True, "HAS_LIMIT": not constants["STORE"]} | constants
            given = shared | described | ({} if constants["STATISTICS"] else kept)
            yield Variant(logits_kernel, dtype, given, tile, options, True, f"descriptors, {mode}")


def gradients(dtype: torch.dtype, capability: int) -> Iterator[Variant]:
    """The gradient kernels."""
    wide = accumulator_dtype(dtype)
    pointee, accumulator = _POINTEES[dtype], _POINTEES[wide]
    sums = {f"{n}_ptr": f"*{accumulator}" for n in ("scale", "coefficient", "factor", "sum")}
    indices = {"target_ptr": "*i32"} | {f"{n}_ptr": "*i64" for n in ("order", "bound", "place")}
    shared = sums | indices | {f"{n}_ptr": f"*{pointee}" for n in ("input", "weight", "slab", "grad")}
    targets = shared | {"grad_weight_ptr": f"*{accumulator}"}
    constants = {"ACCUMULATOR": hardware.ACCUMULATORS[wide], "BLOCK_ROWS": 32, "BLOCK_HIDDEN": 64}
    yield Variant(add_target_terms_kernel, dtype, targets, constants, {}, True, "aligned")
    blocks = WEIGHT_GRADIENT
    constants = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": blocks.columns}
    yield Variant(bias_gradient_kernel, dtype, shared | {"grad_ptr": f"*{accumulator}"}, constants, {}, True, "aligned")
    constants = {"BLOCK_ROWS": 4, "BLOCK_HIDDEN": 512}
    unsorted = shared | {"target_ptr": "*i64"}
    yield Variant(finish_input_gradient_kernel, dtype, unsorted, constants, {}, True, "aligned")
    if dtype.itemsize == 2 and capability == 90:
        described = {
            "slab": descriptor(pointee, blocks.rows, blocks.columns),
            "weighted_input": descriptor(pointee, blocks.rows, blocks.hidden),
            "grad_rows": descriptor(pointee, blocks.columns, blocks.hidden // 2),
        }
        constants = {
            "UPCAST": False,
            "BLOCK_COLUMNS": blocks.columns,
            "BLOCK_HIDDEN": blocks.hidden,
            "BLOCK_ROWS": blocks.rows,
            "BLOCK_TARGETS": 32,
            "GROUP": blocks.group,
        }
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        yield Variant(weight_gradient_kernel, dtype, shared | described, constants, options, True, "descriptors")


def rows(dtype: torch.dtype, capability: int) -> Iterator[Variant]:
    """The kernels that work row by row."""
    pointee, accumulator = _POINTEES[dtype], _POINTEES[accumulator_dtype(dtype)]
    names = ("logit", "target_logit", "token_logp", "token_others", "row_shift", "row_factor")
    doubles = {f"{n}_ptr": "*fp64" for n in names} | {"differ_ptr": "*i32"}
    wide = {f"{n}_ptr": f"*{accumulator}" for n in ("shift", "tile_shift", "tile_sum")}
    narrow = {f"{n}_ptr": f"*{pointee}" for n in ("input", "weight", "bias", "slab")}
    pointers = doubles | wide | narrow | {"target_ptr": "*i64"}
    constants: dict[str, Any] = {"HAS_BIAS": True, "BLOCK_ROWS": 8, "BLOCK_HIDDEN": 256}
    yield Variant(target_logits_kernel, dtype, pointers, constants, {}, True, "aligned")
    relative = {"TILE_RELATIVE": dtype == torch.float16, "SLAB_SCALE": hardware.slab_scale(dtype)}
    yield Variant(
        reduce_tiles_kernel,
        dtype,
        pointers,
        relative | {"BLOCK_ROWS": 32, "BLOCK_TILES": 32},
        {"num_warps": 8},
        True,
        "aligned",
    )
    descriptors = dtype.itemsize == 2 and capability == 90
    width = block_sizes(dtype, capability=divmod(capability, 10), descriptors=descriptors).columns
    constants = {
        "BLOCK_ROWS": 32,
        "BLOCK_COLUMNS": width,
        "TILES": 4,
        "ROWS_AT_A_TIME": 16 // accumulator_dtype(dtype).itemsize,
    }
    yield Variant(rescale_slab_kernel, dtype, pointers, constants, {}, True, "aligned")
    scaled = {"rows_ptr": f"*{pointee}", "factor_ptr": f"*{accumulator}", "scaled_ptr": f"*{pointee}"}
    yield Variant(scale_rows_kernel, dtype, scaled, {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 512}, {}, True, "aligned")


def sums(dtype: torch.dtype) -> Iterator[Variant]:
    """Sums over columns and tokens, and the rows' coefficients."""
    pointee, accumulator = _POINTEES[dtype], _POINTEES[accumulator_dtype(dtype)]
    doubles = ("sum", "column_sum", "part", "sound", "upstream", "others", "factor")
    pointers = {f"{n}_ptr": "*fp64" for n in doubles} | {"target_ptr": "*i64", "place_ptr": "*i64"}
    pointers |= {
        f"{n}_ptr": f"*{accumulator}" for n in ("largest", "column_largest", "at_target", "elsewhere", "scale")
    }
    pointers |= {f"{n}_ptr": f"*{pointee}" for n in ("weight", "input", "bias")}
    tile = {"BLOCK_ROWS": 16, "BLOCK_HIDDEN": 256}
    yield Variant(column_sums_kernel, dtype, pointers, tile, {}, True, "aligned")
    yield Variant(input_sums_kernel, dtype, pointers, tile | {"BLOCK_STRETCHES": 8}, {}, True, "aligned")
    constants = {"HAS_BIAS": True, "BLOCK_SEQUENCES": 16, "BLOCK": 2048}
    yield Variant(logit_sums_kernel, dtype, pointers, constants, {}, True, "bias")
    yield Variant(row_coefficients_kernel, dtype, pointers, {"BLOCK": 2048}, {"num_warps": 16}, True, "aligned")


def variants(capability: int) -> Iterator[Variant]:
    """Every kernel in every dtype with the block sizes of the launcher."""
    for dtype in _POINTEES:
        yield from softmax(dtype) if dtype.itemsize > 2 else logits(dtype, capability)
        yield from gradients(dtype, capability)
        yield from rows(dtype, capability)
        yield from sums(dtype)
    wide = {f"{n}_ptr": "*fp64" for n in ("policy", "reference", "kl", "logit_sum", "slope")}
    wide |= {"label_ptr": "*u8", "loss_ptr": "*fp32", "metric_ptr": "*fp32"}
    wide |= dict.fromkeys(("beta", "desirable_weight", "undesirable_weight"), "i64")
    modes = {"HAS_REFERENCE": True, "HAS_KL": True, "SKIP_NAN": True, "BLOCK": 128}
    for reduction in ("mean", "none"):
        constants = modes | {"REDUCTION": reduction}
        yield Variant(formula_kernel, torch.float64, wide, constants, {}, True, reduction)
    counts = {"target_ptr": "*i64", "count_ptr": "*i64", "bound_ptr": "*i64"}
    yield Variant(
        stretch_bounds_kernel,
        torch.int32,
        counts | {"target_ptr": "*i32"},
        {"STRETCH": 128, "BLOCK": 128},
        {},
        True,
        "aligned",
    )
    packed = {f"{n}_ptr": "*i64" for n in ("target", "row", "packed", "start", "count")}
    yield Variant(pack_targets_kernel, torch.int64, packed, {"BLOCK": 2048}, {"num_warps": 8}, True, "aligned")
    summed = {"value_ptr": "*fp64", "start_ptr": "*i64", "sum_ptr": "*fp64"}
    yield Variant(sequence_sums_kernel, torch.float64, summed, {"BLOCK": 1024}, {}, True, "aligned")


def chosen(offered: Iterable[Variant]) -> list[Variant]:
    """One variant of each kernel, which counts twice if tensor descriptors serve it too; the dtypes take turns."""
    kernels: dict[tuple[Any, bool], list[Variant]] = {}
    for variant in offered:
        described = any(pointer.startswith("tensordesc") for pointer in variant.pointers.values())
        kernels.setdefault((variant.kernel, described), []).append(variant)
    dtypes = itertools.cycle(_POINTEES)
    return [
        next((variant for variant in versions if variant.dtype == dtype), versions[0])
        for versions, dtype in zip(kernels.values(), dtypes, strict=False)
    ]


def narrow_offsets(ttir: str) -> list[str]:
    """Lines that add 32-bit products of indices and strides to pointers; a plain column index may have 32 bits."""
    made = dict(re.findall(r"^\s*(%[\w#]+) = (.*)$", ttir, re.MULTILINE))

    def is_product(name: str, seen: set[str]) -> bool:
        if name.startswith("%stride_"):
            return True
        text = made.get(name, "")
        if name in seen or re.search(r"\bto tensor<.*i64>|tt\.load", text):
            return False
        seen.add(name)
        if text.startswith("arith.muli") and ": tensor<" in text:
            return True
        return any(is_product(operand, seen) for operand in re.findall(r"%[\w#]+", text))

    found = (NARROW_OFFSET.search(line) for line in ttir.splitlines())
    return [match.string.strip() for match in found if match and is_product(match[1], set())]


def heading(variant: Variant, capability: int, compiled: bool) -> dict[str, Any]:
    """What a line says of a variant whether it is compiled or not."""
    return {
        "kernel": variant.kernel.__name__,
        "dtype": str(variant.dtype).removeprefix("torch."),
        "variant": variant.label,
        "capability": capability,
        "compiled": compiled,
    }


def build(variant: Variant, capability: int) -> dict[str, Any]:
    """What the compiler and ptxas say of one kernel on one target."""
    found = heading(variant, capability, True)
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
    narrow = narrow_offsets(compiled.asm["ttir"])
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


def main(capabilities: list[int], one_for_each_kernel: bool) -> None:
    """Print one line for each variant."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for capability in capabilities:
            offered = list(variants(capability))
            wanted = chosen(offered) if one_for_each_kernel else offered
            for variant in offered:
                compiled = variant in wanted
                line = build(variant, capability) if compiled else heading(variant, capability, False)
                sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("capabilities", type=int, nargs="+")
    parser.add_argument("--one-for-each-kernel", action="store_true")
    given = parser.parse_args()
    main(given.capabilities, given.one_for_each_kernel)
