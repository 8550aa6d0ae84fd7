"""A record of what a step launches: kernels and matrix products of the library, by name, dims and dtype.

    with trace.recorded() as launches:
        loss, metrics = fused_linear_kto_loss(inputs)

It serves tests, and anybody who asks what a step costs. While nobody records, `note` only looks at an empty list.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Launch", "note", "recorded"]


@dataclass(frozen=True)
class Launch:
    """A launched kernel, or a matrix product that the library was asked for.

    Attributes:
        name: The kernel's name; or ``logits_product``, ``input_product`` or ``weight_product``, after the result.
        dtype: Of the operands.
        dims: Sizes by name: ``rows`` (tokens that are scored), ``columns`` (vocabulary entries), ``hidden``,
            ``sequences``, ``tokens`` (masked ones included), ``width`` (of scaled rows), ``tiles``.
        statistics: Whether softmax statistics were written. Only a forward needs them.
        stored: Whether exponentials were written.
        descriptors: Whether tiles were loaded through tensor descriptors.
    """

    name: str
    dtype: torch.dtype
    dims: dict[str, int]
    statistics: bool = False
    stored: bool = False
    descriptors: bool = False


# Not local to a thread: autograd runs the backward of CUDA tensors in threads of its own.
_recording: list[list[Launch]] = []


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches within, of all threads, in their order. Recordings may be nested; each has all launches."""
    launches: list[Launch] = []
    _recording.append(launches)
    try:
        yield launches
    finally:
        # By identity: two recordings that are both empty are equal.
        _recording[:] = [other for other in _recording if other is not launches]


def note(
    name: str,
    dtype: torch.dtype,
    *,
    statistics: bool = False,
    stored: bool = False,
    descriptors: bool = False,
    **dims: int,
) -> None:
    """Add a launch to every open recording; the arguments are `Launch`'s."""
    for launches in _recording:
        launches.append(Launch(name, dtype, dims, statistics, stored, descriptors))
