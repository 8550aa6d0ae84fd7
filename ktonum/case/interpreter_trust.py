"""Which results of Triton's interpreter are worth nothing: those of kernels that calculate in bfloat16 there.

The interpreter keeps bfloat16 as 16-bit integers. It loads, stores, selects and upcasts them exactly; it adds and
multiplies their bit patterns as integers, and casts to bfloat16 by truncation. A kernel that is right on a GPU comes
out wrong, so that nothing it computes is evidence.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ktonum.errors import UsageError

__all__ = ["refusing_bfloat16_of_the_interpreter"]

_INTERPRETER = "triton.runtime.interpreter"
# Methods of the interpreter's builder that calculate with what their first argument holds, and those that convert it.
_CALCULATIONS = (
    "binary_op",
    "unary_op",
    "create_rsqrt",
    "create_erf",
    "create_fma",
    "create_clampf",
    "create_dot",
    "create_histogram",
)
_CASTS = ("cast_impl", "create_fp_to_fp")


@contextmanager
def refusing_bfloat16_of_the_interpreter() -> Iterator[None]:
    """Within, it is noticed if an interpreted kernel calculates in bfloat16. Without the interpreter nothing is done.

    Raises:
        UsageError: On leaving, if a kernel calculated in bfloat16, or was given another number by a cast to or from it
            than rounding to nearest gives. What was raised within is its cause.
    """
    interpreter = sys.modules.get(_INTERPRETER)
    if os.environ.get("TRITON_INTERPRET") != "1" or interpreter is None:
        yield
        return
    found: set[str] = set()
    cause: Exception | None = None
    with ExitStack() as stack:

        def watch(
            owner: Any, name: str, watching: Callable[[Callable[..., Any], set[str]], Callable[..., Any]]
        ) -> None:
            method = getattr(owner, name)
            stack.callback(setattr, owner, name, method)
            setattr(owner, name, watching(method, found))

        for name in _CALCULATIONS:
            watch(interpreter.InterpreterBuilder, name, _calculating)
        for name in _CASTS:
            watch(interpreter.InterpreterBuilder, name, _casting)
        watch(interpreter.ReduceScanOpInterface, "apply", _reducing)
        try:
            yield
        except Exception as error:
            if not found:
                raise
            cause = error
    if found:
        raise UsageError(
            f"its kernels calculate in bfloat16 ({', '.join(sorted(found))}), which Triton's interpreter gets wrong; "
            f"audit it on a GPU, or upcast after loading and round outside the kernel"
        ) from cause


def _is_bfloat16(dtype: Any) -> bool:
    name: str = dtype.scalar.name
    return name == "bf16"


def _calculating(method: Callable[..., Any], found: set[str]) -> Callable[..., Any]:
    def watched(builder: Any, handle: Any, *rest: Any, **named: Any) -> Any:
        if _is_bfloat16(handle.dtype):
            found.add("arithmetic")
        return method(builder, handle, *rest, **named)

    return watched


def _reducing(method: Callable[..., Any], found: set[str]) -> Callable[..., Any]:
    def watched(reduction: Any, operand: Any) -> Any:
        if any(_is_bfloat16(t.dtype) for t in (operand if isinstance(operand, tuple) else (operand,))):
            found.add("reductions")
        return method(reduction, operand)

    return watched


def _casting(method: Callable[..., Any], found: set[str]) -> Callable[..., Any]:
    def watched(builder: Any, handle: Any, dtype: Any, *rest: Any) -> Any:
        made = method(builder, handle, dtype, *rest)
        came, went = _is_bfloat16(handle.dtype), _is_bfloat16(dtype)
        if came and not went and dtype.scalar.name != "fp32":  # the integers that stand for it, cast as integers
            found.add("casts")
        if went and not came:
            wanted = torch.from_numpy(handle.data.astype("float32")).to(torch.bfloat16)
            if not torch.equal(wanted.view(torch.int16), torch.from_numpy(made.data.view("int16"))):
                found.add("casts")
        return made

    return watched
