"""How wrong may a right implementation be? `AtItsLimits` takes the sums and functions of a formula to their limits.

The error of a single right implementation may be small by luck, above all in float64, where it repeats the oracle
operation by operation. Other implementations add in another order and call the functions of another library.

Under `AtItsLimits`, PyTorch adds the terms of sums, means and products one by one in their own dtype. Its rsqrt,
sigmoid, exp and log (in log-softmax) are wrong by up to `ktonum.bounds.FUNCTION_ERROR`. The references of the shipped
ops consist of these operations.

PyTorch keeps one sum: that in the gradient of log-softmax. A smoothed loss gives it V equal terms. If they were added
one by one, all roundings would go in the same direction, and the error would grow with V to three times the bounds. No
standard allows this error, and no implementation adds in this way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ktonum.bounds import FUNCTION_ERROR, unit_roundoff
from ktonum.declare.cases import seed_of

__all__ = ["AtItsLimits"]

_aten = torch.ops.aten
# PyTorch itself handles the narrower dtypes: it adds them up in float32.
_WIDE = (torch.float32, torch.float64)


def _one_by_one(terms: Tensor) -> Tensor:
    """Sum over the last dim, each partial sum rounded. NumPy's accumulate keeps the dtype; torch's cumsum does not."""
    if not terms.shape[-1]:
        return terms.sum(-1)
    return torch.from_numpy(np.add.accumulate(terms.detach().numpy(), axis=-1)[..., -1].copy())


def _sum(t: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    t = t if dtype is None else t.to(dtype)
    over = [d % t.ndim for d in dims] if dims else list(range(t.ndim))
    kept = [d for d in range(t.ndim) if d not in over]
    added = _one_by_one(t.permute(*kept, *over).reshape(*(t.shape[d] for d in kept), -1))
    return added.reshape([1 if d in over else t.shape[d] for d in range(t.ndim)]) if keepdim else added


def _mean(t: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    added = _sum(t, dims, keepdim, dtype=dtype)
    return added / (t.numel() // max(1, added.numel()))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices."""
    return _one_by_one(a.unsqueeze(1) * b.T.unsqueeze(0))


def _product_added(added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * added + alpha * _product(a, b)


class AtItsLimits(TorchDispatchMode):
    """A context in which sums are added one by one and functions are wrong, in float32 and float64 on a CPU.

    Args:
        name: Seed of the functions' errors.

    Attributes:
        handled: The operations that were called and changed.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed_of(f"at its limits: {name}"))
        self._handlers: Mapping[Any, Callable[..., Tensor]] = {
            _aten.sum.default: _sum,
            _aten.sum.dim_IntList: _sum,
            _aten.mean.default: _mean,
            _aten.mean.dim: _mean,
            _aten.mm.default: _product,
            _aten.addmm.default: _product_added,
            _aten.rsqrt.default: self._wrong(torch.rsqrt),
            _aten.sigmoid.default: self._wrong(torch.sigmoid),
            _aten._log_softmax.default: self._log_softmax,
            _aten._log_softmax_backward_data.default: self._log_softmax_backward,
        }
        self.handled: set[Any] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        handler = self._handlers.get(func)
        first = next((a for a in args if isinstance(a, Tensor)), None)
        if handler is None or first is None or first.dtype not in _WIDE:
            return func(*args, **(kwargs or {}))
        self.handled.add(func)
        return handler(*args, **(kwargs or {}))

    def _wrong(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def wrong(tensor: Tensor) -> Tensor:
            exact = function(tensor.double())
            share = torch.rand(exact.shape, generator=self._generator, dtype=torch.float64) * 2 - 1
            # The rounding of the result is one of the roundings that FUNCTION_ERROR counts.
            return (exact + share * (FUNCTION_ERROR - 1) * unit_roundoff(tensor.dtype) * exact).to(tensor.dtype)

        return wrong

    def _log_softmax(self, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        largest = x.amax(dim, keepdim=True)
        added = _sum(self._wrong(torch.exp)(x - largest), [dim], True)
        return x - (largest + self._wrong(torch.log)(added))

    def _log_softmax_backward(self, gradient: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        # PyTorch's own sum: the docstring of this module says why.
        return gradient - self._wrong(torch.exp)(output) * gradient.sum(dim, keepdim=True)
