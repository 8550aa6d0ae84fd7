"""Small ops in plain PyTorch. Tests that run an audit as a command write them to a folder."""

from __future__ import annotations

from pathlib import Path

__all__ = ["OPS", "write_ops"]

#: Each op is a softmax at three sizes. All but the first and the last are wrong: `exits`, `poisoned` and `hangs` at the
#: second size only, the others at every size. `slow` is right but takes its time.
OPS = ("right", "wrong", "raises", "structure", "exits", "poisoned", "hangs", "slow")

_SOURCE = """
from __future__ import annotations

import os
import time

import torch

from ktonum.declare.op import Op


def sample(draw):
    return {"x": draw.normal(draw.dims["N"], draw.dims["M"])}


def reference(x):
    return torch.softmax(x, -1)


def right_(x):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.softmax(x.to(wide), -1).to(x.dtype)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = right_(x.detach())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return 1.05 * (grad - (grad * y).sum(-1, keepdim=True)) * y


def raises_(x):
    raise ValueError("no such luck")


def structure_(x):
    return {"other": right_(x)}


def exits_(x):
    if x.shape[0] == 5:
        os._exit(7)
    return right_(x)


def poisoned_(x):
    if x.shape[0] == 5:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return right_(x)


def hangs_(x):
    if x.shape[0] == 5:
        time.sleep(1000)
    return right_(x)


def slow_(x):
    time.sleep(0.3)
    return right_(x)


def op(name, candidate):
    dims = [{"N": 4, "M": 33}, {"N": 5, "M": 64}, {"N": 6, "M": 7}]
    return Op(name=name, candidate=candidate, reference=reference, sample=sample, dims=dims)


right = op("right", right_)
wrong = op("wrong", WrongGradient.apply)
raises = op("raises", raises_)
structure = op("structure", structure_)
exits = op("exits", exits_)
poisoned = op("poisoned", poisoned_)
hangs = op("hangs", hangs_)
slow = op("slow", slow_)
not_an_op = 3
"""


def write_ops(folder: Path, *, only: str = "") -> Path:
    """The ops as ``throwaway.py`` in ``folder``; with ``only``, that op alone is left at the module's top level."""
    source = _SOURCE
    if only:
        source += f"\ndel {', '.join(name for name in OPS if name != only)}\n"
    file = folder / "throwaway.py"
    file.write_text(source, encoding="utf-8")
    return file
