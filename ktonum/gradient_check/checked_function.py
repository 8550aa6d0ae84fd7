"""The function under a gradient check: counted calls on private copies of its inputs.

Nothing here decides anything; `ktonum.gradcheck` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ktonum.declare.tensor_copies import private_copy
from ktonum.errors import InputError, KtonumError
from ktonum.gradient_check.leaf import Leaf, real_array
from ktonum.gradient_check.structures import named_tensors, with_tensors

__all__ = ["CheckedFunction", "first_bad_element", "output_arrays"]

#: A displacement of each differentiated tensor by its position; positions that are left out stay.
Directions = Mapping[int, Tensor]


def first_bad_element(tensor: Tensor) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity, or None."""
    bad = ~torch.isfinite(tensor.detach())
    if not bool(bad.any()):
        return None
    return tuple(int(i) for i in bad.nonzero()[0])


def output_arrays(value: Any) -> list[tuple[Tensor, Tensor]]:
    """The floating and complex tensors in fn's result, each with its real float64 array. Others are skipped.

    Raises:
        InputError: A tensor is sparse.
    """
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return [(value, real_array(value))] if value.is_floating_point() or value.is_complex() else []
    found = []
    for name, tensor in named_tensors(value, "the result of fn"):
        if tensor.layout != torch.strided:
            raise InputError(
                f"{name} is sparse ({tensor.layout}); gradients of strided outputs are checked: return "
                f"x.to_dense(), with masked_grad=True or False as you mean it"
            )
        if tensor.is_floating_point() or tensor.is_complex():
            found.append((tensor, real_array(tensor)))
    return found


class CheckedFunction:
    """``fn`` with its inputs: counts calls, never hands out the caller's tensors, notices when fn writes to its own.

    Attributes:
        leaves: The tensors that are differentiated: those of the inputs that require grad, and the parameters of a
            module. Positions elsewhere in this package count these.
        empty: Names of tensors that require grad and have no elements.
        calls: Forward evaluations so far.
        budget: Most forward evaluations; the caller of `at` keeps to it.
    """

    def __init__(
        self, fn: Callable[..., Any], inputs: Sequence[Any], budget: int, *, masked: bool, names: Sequence[str]
    ) -> None:
        self.fn = fn
        self.budget = budget
        self.calls = 0
        self._inputs = tuple(zip(names, inputs, strict=True))
        self._module = fn if isinstance(fn, torch.nn.Module) else None
        tensors = [named for name, value in self._inputs for named in named_tensors(value, name)]
        self._parameters: dict[str, str] = {}
        if self._module is not None:
            for name, parameter in self._module.named_parameters():
                self._parameters[f"parameter {name}"] = name
                tensors.append((f"parameter {name}", parameter))
        wanted = [(n, t) for n, t in tensors if t.requires_grad and (t.is_floating_point() or t.is_complex())]
        self.empty = tuple(name for name, tensor in wanted if not tensor.numel())
        self.leaves = tuple(Leaf(name, tensor, masked=masked) for name, tensor in wanted if tensor.numel())
        self._originals = {name: tensor for name, tensor in tensors if not tensor.requires_grad}
        self._shared = {name: _copy(tensor) for name, tensor in tensors}
        self._shared |= {leaf.name: leaf.tensor(leaf.value) for leaf in self.leaves if leaf.fills_up}
        self._nested = any(isinstance(value, (tuple, list, Mapping)) for _, value in self._inputs)
        self._needs_grad = False

    @property
    def not_finite(self) -> bool:
        """Whether an input, differentiated or not, has elements that are not finite."""
        fixed = [leaf.value for leaf in self.leaves if leaf.fixed is not None]
        others = [t for t in self._originals.values() if t.is_floating_point() or t.is_complex()]
        strided = [t for t in others if t.layout == torch.strided]
        return any(not bool(t.isfinite().all()) for t in (*fixed, *strided))

    @property
    def pairs_left(self) -> int:
        """Central differences that the budget still allows."""
        return (self.budget - self.calls) // 2

    def with_graph(self) -> tuple[list[Tensor], Any]:
        """One call with gradients recorded: the differentiated tensors, in the order of `leaves`, and fn's result."""
        tensors = []
        for leaf in self.leaves:
            copy = leaf.tensor()
            # Elements that share memory are handed over as they came, so that the layout stays what the caller tests.
            same = copy.layout != torch.strided or copy.stride() == leaf.original.stride()
            tensors.append((copy if same else leaf.original).detach().requires_grad_())
        with torch.enable_grad():
            return tensors, self.call(dict(enumerate(tensors)))

    def again(self) -> Any:
        """fn's result at x once more, without gradients unless fn needs them, e.g. because it registers hooks."""
        try:
            return self.at({}, 0.0)
        except KtonumError:
            raise
        except Exception:
            self._needs_grad = True
            return self.at({}, 0.0)

    def at(self, directions: Directions, step: float) -> Any:
        """fn's result at ``x + step * direction``."""
        moved = {
            p: self.leaves[p].tensor(torch.add(self.leaves[p].value, d, alpha=step)) for p, d in directions.items()
        }
        if self._needs_grad:
            every = {p: moved[p] if p in moved else leaf.tensor() for p, leaf in enumerate(self.leaves)}
            with torch.enable_grad():
                return self.call({p: tensor.requires_grad_() for p, tensor in every.items()})
        with torch.no_grad():
            return self.call(moved)

    def call(self, moved: Mapping[int, Tensor]) -> Any:
        """fn's result where the differentiated tensors at some positions are others. Counts as an evaluation."""
        tensors = {**self._shared, **{self.leaves[p].name: tensor for p, tensor in moved.items()}}
        if self._nested:
            arguments = [with_tensors(value, name, tensors) for name, value in self._inputs]
        else:
            arguments = [tensors.get(name, value) for name, value in self._inputs]
        handed_out = [(name, tensor, tensor._version) for name, tensor in tensors.items()]
        self.calls += 1
        if self._module is None:
            result = self.fn(*arguments)
        else:
            state = {name: tensors[full] for full, name in self._parameters.items()}
            # A module may write to its buffers, as batch normalisation does: it gets fresh ones each time.
            state |= {name: _copy(buffer) for name, buffer in self._module.named_buffers()}
            result = torch.func.functional_call(self._module, state, tuple(arguments))
        for name, tensor, version in handed_out:
            if tensor._version != version:
                self._refuse_write(name)
        return result

    def refuse_hidden_writes(self) -> None:
        """Compare the copies that fn was given with the originals, for kernels write past torch's version counter.

        Raises:
            InputError: fn changed one of its inputs.
        """
        for name, original in self._originals.items():
            copy = self._shared[name]
            if original.layout == torch.strided and not bool(
                ((copy == original) | ((copy != copy) & (original != original))).all()
            ):
                self._refuse_write(name)

    def _refuse_write(self, name: str) -> None:
        raise InputError(
            f"fn writes to its {name}; a gradient check needs a function that leaves its inputs alone: clone the input "
            f"inside fn, e.g. lambda *inputs: op(*(x.clone() for x in inputs))"
        )


def _copy(tensor: Tensor) -> Tensor:
    return private_copy(tensor) if tensor.layout == torch.strided else tensor.detach().clone()
