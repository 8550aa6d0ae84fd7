"""Tensors that the function depends on and that the check was not given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["remark_on_other_leaves"]

# A graph with more nodes is not searched to its end.
_MOST_NODES = 100_000


def remark_on_other_leaves(outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> str:
    """A sentence on tensors that require grad, take part in the outputs and were not checked; empty if there are none.

    Args:
        outputs: Outputs with their graph.
        tensors: The leaves of that graph that were checked.
    """
    known = {id(tensor) for tensor in tensors}
    waiting: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(waiting)
    others: dict[int, Tensor] = {}
    while waiting and len(seen) < _MOST_NODES:
        node = waiting.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in known:
            others[id(variable)] = variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    if not others:
        return ""
    shapes = ", ".join(str(list(other.shape)) for other in list(others.values())[:3])
    count = len(others)
    return (
        f"Not checked: {count} other tensor{'s' * (count != 1)} that require{'s' * (count == 1)} grad and take part in "
        f"the outputs (shapes {shapes}{', ...' if count > 3 else ''}); pass {'it' if count == 1 else 'them'} as "
        f"inputs, or the module itself as func."
    )
