"""Reading a few numbers off the device while it goes on computing."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Fetch"]


class Fetch:
    """A copy of a small tensor, under way to the host since the object was made.

    Between the copy and `values` the caller launches further work; `values` waits for what came before the copy alone.
    A plain ``.tolist()`` would wait for everything launched by then and leave the device idle until the next launch.
    With several of them a step of 66 ms on an H100 had 57 ms of kernels; since they are gone the profiler shows no gap
    between the first product and the last.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor.detach()
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))

    def values(self) -> list[float]:
        """The tensor's elements, flat."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return [float(v) for v in self._host.flatten().tolist()]
