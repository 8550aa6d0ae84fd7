"""Private copies of a case's tensors for the candidate, which may write to whatever it gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ktonum.declare.evaluation import Run
from ktonum.declare.tensor_copies import private_copy

__all__ = ["lent"]


def lent(values: Mapping[str, Any], *, owner: Run) -> dict[str, Any]:
    """``values`` with a copy, of the same strides, of each tensor that shares memory with a tensor of ``owner``.

    A candidate that writes to its inputs would change the results of the owner's other runs. If it writes the same
    values in each run, a check would compare its second run with inputs that it had changed before, and see no change.

    Args:
        values: Inputs or upstream gradients by name. Only tensors of ``owner``, and views of them, are copied.
        owner: The run whose tensors must stay as they are.
    """
    owned = {
        t.untyped_storage().data_ptr()
        for t in (*owner.inputs.values(), *owner.upstream.values())
        if isinstance(t, Tensor)
    }

    def shared(value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in owned

    return {name: private_copy(value) if shared(value) else value for name, value in values.items()}
