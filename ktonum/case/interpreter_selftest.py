"""What Triton's interpreter can vouch for: run as a program with ``TRITON_INTERPRET=1``, it prints findings as JSON.

A process of its own, for Triton decides once whether it interprets. Names are short because device code reads them.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["probe"]


def _dot(x: Any, y: Any, out: Any, N: tl.constexpr) -> None:
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)).to(tl.float32))


def _cast(x: Any, out: Any, N: tl.constexpr) -> None:
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


def probe() -> dict[str, bool | str]:
    """Whether products of each dtype are right, and whether a cast to bfloat16 rounds to nearest even."""
    import torch

    triton = importlib.import_module("triton")
    # Device code looks names up in its module, and triton must not be imported with this one.
    globals()["tl"] = importlib.import_module("triton.language")
    dot, cast = triton.jit(_dot), triton.jit(_cast)
    generator = torch.Generator().manual_seed(0)
    findings: dict[str, bool | str] = {"triton": str(triton.__version__)}
    size = 16
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x, y = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty(size, size)
        dot[(1,)](x, y, out, N=size)
        wanted = (x.double() @ y.double()).float()
        findings[f"dot {str(dtype).removeprefix('torch.')}"] = bool((out - wanted).norm() <= 1e-5 * wanted.norm())
    values = torch.randn(256, generator=generator)
    rounded = torch.empty(256, dtype=torch.bfloat16)
    cast[(1,)](values, rounded, N=256)
    findings["cast to bfloat16 rounds to nearest"] = bool(torch.equal(rounded, values.to(torch.bfloat16)))
    return findings


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe()) + "\n")
