"""Lets Triton kernels of other projects run in Triton's interpreter, for which they were not written.

- A compiled kernel gets a Python float as a float32 scalar, which has a method ``to``. The interpreter passes the bare
  float. Here it becomes a float32 scalar.
- An autotuner measures times, which mean nothing in the interpreter. Here it takes its first configuration.
- libdevice is a CUDA library. Here NumPy and SciPy replace its functions.

This is done only under ``TRITON_INTERPRET=1``, and only in modules that are passed to `make_interpretable`. The
interpreter itself is changed only while such a kernel runs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

__all__ = ["make_interpretable"]

_LIBDEVICE = ("erf", "rsqrt", "tanh")


class _Launched:
    """A kernel of the interpreter. A launch passes floats as float32 scalars; a call by another kernel is unchanged."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            kernel = self._kernel
            while hasattr(kernel, "configs"):
                named = {**kernel.configs[0].kwargs, **named}
                kernel = kernel.fn
            with _float_scalars():
                kernel[grid](*arguments, **named)

        return launch

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._kernel(*arguments, **named)


def make_interpretable(module: ModuleType) -> None:
    """Make the kernels that ``module`` defines or imports run in the interpreter. A second call changes nothing.

    Without ``TRITON_INTERPRET=1``, the module is not changed.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    autotuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    for name, value in list(vars(module).items()):
        if isinstance(value, (interpreter.InterpretedFunction, autotuner)):
            setattr(module, name, _Launched(value))
        elif name in _LIBDEVICE and getattr(value, "__module__", "").endswith("libdevice"):
            setattr(module, name, _from_numpy(name))


@contextmanager
def _float_scalars() -> Iterator[None]:
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    numpy = importlib.import_module("numpy")
    convert = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), language.float32)
        return language.tensor(handle, language.float32)

    interpreter._implicit_cvt = converted
    try:
        yield
    finally:
        interpreter._implicit_cvt = convert


def _from_numpy(name: str) -> Callable[[Any], Any]:
    """A replacement for a libdevice function of one argument: elementwise, in the argument's dtype."""
    numpy = importlib.import_module("numpy")
    special = importlib.import_module("scipy.special")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    functions: dict[str, Callable[[Any], Any]] = {
        "erf": special.erf,
        "rsqrt": lambda x: 1 / numpy.sqrt(x),
        "tanh": numpy.tanh,
    }

    def apply(x: Any) -> Any:
        data = functions[name](x.handle.data).astype(x.handle.data.dtype)
        return language.tensor(interpreter.TensorHandle(data, x.handle.dtype), x.type)

    return apply
