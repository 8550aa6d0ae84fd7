"""Reading a few numbers off the device while it goes on computing."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["Fetch"]


class Fetch:
    """The elements that a small tensor has once the work launched so far is done.

    The caller launches further work before it calls `values`. `values` does not wait for that work, because it copies
    on a stream of its own. A plain ``.tolist()`` would wait for everything launched by then, and leave the device idle
    until the next launch. A step with several of those took 66 ms on an H100, of which kernels ran for 57. Without them
    the profiler shows no gap between the first product and the last.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._done: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(tensor.device))

    def values(self) -> list[float]:
        """The tensor's elements, flat."""
        if self._done is None:
            return [float(v) for v in self._tensor.flatten().tolist()]
        stream = _copies(self._tensor.device)
        with torch.cuda.stream(stream):
            stream.wait_event(self._done)
            return [float(v) for v in self._tensor.flatten().tolist()]


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """A stream for nothing but copies to the host."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
