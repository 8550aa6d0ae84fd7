"""Dataclasses as flat lists: a custom operator of PyTorch takes and returns nothing but tensors and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar, get_type_hints

from torch import Tensor

__all__ = ["Layout"]

#: What a schema calls the types that fields may have.
_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "SymInt"}

T = TypeVar("T")


class Layout(Generic[T]):
    """The order in which the fields of a dataclass follow each other in a list.

    The fields of a dataclass inside it take the place of that field. So the fields are written down once, in the
    dataclass, and all else is read off them: the schema of an operator, its arguments, and what they mean.

    Args:
        kind: The dataclass. Its fields are tensors, optional tensors, integers, booleans, or dataclasses of these.

    Attributes:
        names: What each element of the list is called in a schema: the fields' names from the outside in, joined by
            underscores.

    Raises:
        TypeError: A field has another type.
    """

    def __init__(self, kind: type[T]) -> None:
        # Read now, because torch.compile does not trace through type hints.
        self._kind = kind
        # Of each field: its name, where it begins in the list, and its own layout, if it is a dataclass.
        self._fields: list[tuple[str, int, Layout[Any] | None]] = []
        self.names: list[str] = []
        self._types: list[str] = []
        hints = get_type_hints(kind)
        for field in fields(kind):  # type: ignore[arg-type]
            name, hint = field.name, hints[field.name]
            if isinstance(hint, type) and is_dataclass(hint):
                inner: Layout[Any] = Layout(hint)
                self._fields.append((name, len(self.names), inner))
                self.names += [f"{name}_{further}" for further in inner.names]
                self._types += inner._types
            elif hint in _SCHEMA_TYPES:
                self._fields.append((name, len(self.names), None))
                self.names.append(name)
                self._types.append(_SCHEMA_TYPES[hint])
            else:
                raise TypeError(f"{kind.__name__}.{name} is a {hint}, which no operator takes")

    @property
    def schema(self) -> str:
        """The arguments of an operator's schema."""
        return ", ".join(f"{kind} {name}" for kind, name in zip(self._types, self.names, strict=True))

    def to_flat(self, value: T) -> list[Any]:
        """The fields of ``value`` as a list."""
        flat: list[Any] = []
        for name, _, inner in self._fields:
            given = getattr(value, name)
            flat += [given] if inner is None else inner.to_flat(given)
        return flat

    def from_flat(self, flat: Sequence[Any]) -> T:
        """The value whose `to_flat` is ``flat``.

        Raises:
            ValueError: ``flat`` has another length.
        """
        if len(flat) != len(self.names):
            raise ValueError(f"{self._kind.__name__} is a list of {len(self.names)} elements, not of {len(flat)}")
        found = {
            name: flat[first] if inner is None else inner.from_flat(flat[first : first + len(inner.names)])
            for name, first, inner in self._fields
        }
        return self._kind(**found)

    def by_name(self, flat: Sequence[Any]) -> dict[str, Any]:
        """What belongs to each of `names`, in a list of as many elements.

        Raises:
            ValueError: ``flat`` has another length.
        """
        return dict(zip(self.names, flat, strict=True))
