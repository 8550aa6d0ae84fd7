"""Tensors in nested arguments and results: tuples, named tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["named_tensors", "with_tensors"]


def named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in ``value`` with the name of its place, in order, e.g. ``("input 1['mask'][0]", tensor)``.

    Args:
        value: A tensor, or tuples, lists and dicts of tensors, nested as deep as you like. Other values are skipped.
        name: What ``value`` itself is called.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from named_tensors(item, f"{name}[{number}]")


def with_tensors(value: Any, name: str, tensors: Mapping[str, Tensor]) -> Any:
    """The same structure with other tensors.

    Args:
        value: As for `named_tensors`.
        name: As for `named_tensors`.
        tensors: The new tensors by name. A tensor that is not named stays.
    """
    if isinstance(value, Tensor):
        return tensors.get(name, value)
    if isinstance(value, Mapping):
        return type(value)({k: with_tensors(item, f"{name}[{k!r}]", tensors) for k, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        items = [with_tensors(item, f"{name}[{number}]", tensors) for number, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
