"""One differentiated tensor as an array of real float64 numbers, whatever its dtype and layout are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ktonum.declare.tensor_copies import private_copy
from ktonum.errors import InputError
from ktonum.gradient_check.seeded_signs import seeded_signs

__all__ = ["Leaf", "real_array"]

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def real_array(tensor: Tensor) -> Tensor:
    """``tensor`` as real float64 numbers: a complex tensor gets a last dimension of 2, for real and imaginary part.

    Keeps the graph of a tensor that has one.
    """
    if tensor.is_complex():
        # complex32 has few kernels, and a view of a conjugate cannot be seen as real.
        tensor = torch.view_as_real(
            (tensor if tensor.dtype != torch.complex32 else tensor.to(torch.complex64)).resolve_conj()
        )
    return tensor.double()


class Leaf:
    """A tensor that is differentiated.

    A gradient check moves real numbers. For a complex tensor these are the real and imaginary parts. With torch's
    convention for complex gradients (the conjugate Wirtinger derivative) the change of a real s along d is the sum over
    both parts of g times d, as for real tensors. For a sparse tensor they are the elements of the dense tensor.

    Attributes:
        name: E.g. ``input 0``, ``input 1['scale']`` or ``parameter weight``.
        original: The caller's tensor, detached.
        value: Its numbers: strided, float64.
        fixed: Where the numbers stay as they are, bool, shape of ``value``; None where all of them move. Infinities and
            NaN stay, and so do the unspecified elements of a masked sparse tensor.
        magnitude: The mean magnitude of the numbers that move; 1 where all of these are zero.
    """

    def __init__(self, name: str, original: Tensor, *, masked: bool) -> None:
        self.name = name
        self.original = original.detach()
        self._pattern: Tensor | None = None
        dense = self.original
        if dense.layout != torch.strided:
            dense = self._dense()
            self._pattern = self.original if masked else self._every_element(dense)
        self.value = real_array(dense)
        fixed = ~self.value.isfinite()
        if self._pattern is not None:
            unspecified = torch.ones_like(dense).sparse_mask(self._pattern).to_dense() == 0
            fixed |= unspecified.view(*dense.shape, *(1,) * (self.value.ndim - dense.ndim))
        self.fixed = fixed if bool(fixed.any()) else None
        self.magnitude = self._mean_magnitude()
        # Then a sum of numbers is a private tensor already.
        self._plain = original.dtype == torch.float64 and dense is self.original and original.is_contiguous()

    def _dense(self) -> Tensor:
        if self.original.layout not in _SPARSE:
            raise InputError(
                f"{self.name} has the layout {self.original.layout}; accepted are strided tensors and the sparse "
                f"layouts COO, CSR, CSC, BSR and BSC: convert it inside fn"
            )
        return self.original.to_dense()

    def _every_element(self, dense: Tensor) -> Tensor:
        """A tensor of the original's layout in which every element is specified."""
        ones, layout = torch.ones_like(dense), self.original.layout
        if layout not in (torch.sparse_bsr, torch.sparse_bsc):
            return ones.to_sparse(layout=layout)
        rows, columns = self.original.values().shape[1:3]
        return ones.to_sparse(layout=layout, blocksize=(rows, columns))

    def _mean_magnitude(self) -> float:
        sizes = self.value.abs()
        if self.fixed is not None:
            sizes = sizes.masked_fill(self.fixed, 0.0)
        largest = float(sizes.amax()) if sizes.numel() else 0.0
        # Divided first, because a sum of numbers near the largest float64 overflows.
        mean = largest * float((sizes / largest).mean()) if largest > 0.0 else 0.0
        return mean if mean > 0.0 else 1.0

    @property
    def fills_up(self) -> bool:
        """Whether elements become specified when the numbers move."""
        return self._pattern is not None and self._pattern is not self.original

    @property
    def numbers_that_move(self) -> int:
        """How many numbers a direction moves."""
        return self.value.numel() - (0 if self.fixed is None else int(self.fixed.sum()))

    @property
    def unit(self) -> float:
        """The power of two nearest to `magnitude`."""
        return 2.0 ** max(-1070, min(1023, round(math.log2(self.magnitude))))

    def direction(self, *key: int) -> Tensor:
        """Random numbers of both signs in the unit of the tensor's mean magnitude, 0 where the numbers stay fixed."""
        direction = seeded_signs(self.value.shape, self.value.device, *key).mul_(self.unit)
        return direction if self.fixed is None else direction.masked_fill_(self.fixed, 0.0)

    def tensor(self, value: Tensor | None = None) -> Tensor:
        """A private copy of the tensor that holds the numbers ``value``, in the caller's dtype, layout and strides.

        Of a sparse tensor that is not masked every element is then specified, as in torch's own check. So the steps do
        not change which ones are.

        Args:
            value: Like `value`, and made for this purpose: it may become the tensor. None for a copy of the original.
        """
        original = self.original
        if self._plain and value is not None:
            return value
        if value is None:
            return private_copy(original) if original.layout == torch.strided else original.clone()
        numbers = torch.view_as_complex(value.contiguous()) if original.is_complex() else value
        if original.layout == torch.strided:
            return private_copy(original, numbers.to(original.dtype))
        assert self._pattern is not None
        return numbers.to(original.dtype).sparse_mask(self._pattern)

    def gradient(self, gradient: Tensor | None) -> Tensor:
        """A gradient as an array like ``value``, with zeros where the numbers stay fixed; zeros for None."""
        if gradient is None:
            return torch.zeros_like(self.value)
        dense = gradient.detach()
        dense = dense if dense.layout == torch.strided else dense.to_dense()
        if self.original.is_complex() and not dense.is_complex():
            dense = dense.to(self.original.dtype)
        array = real_array(dense)
        return array if self.fixed is None else array.masked_fill(self.fixed, 0.0)

    def index_in_words(self, index: tuple[int, ...]) -> str:
        """The index of one number as a reader would write it, e.g. ``element [3, 1], imaginary part``."""
        place, part = index, ""
        if self.original.is_complex():
            place, part = index[:-1], f", {('real', 'imaginary')[index[-1]]} part"
        return f"element {list(place)}{part}" if place else f"the only element{part}"
