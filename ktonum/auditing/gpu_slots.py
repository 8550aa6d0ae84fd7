"""Decides which worker uses which GPU. A lease is a lock on a file in the run's folder.

The worker's number cannot decide it, because the worker that replaces gw2 may be gw4. When a worker ends or crashes,
the system releases its lock.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

__all__ = ["GpuLease", "lease_gpu", "use_gpu", "visible_gpus"]

# More workers than this on one GPU are a mistake, because each needs memory for its own CUDA context.
_MOST_PER_GPU = 64


class GpuLease:
    """The right of this process to use a GPU, until the process ends or `release` is called.

    Attributes:
        gpu: Its name in ``CUDA_VISIBLE_DEVICES``: an index or a UUID.
        slot: 0 for the GPU's first worker, 1 for its second one, and so on.
    """

    def __init__(self, gpu: str, slot: int, file: IO[str]) -> None:
        self.gpu = gpu
        self.slot = slot
        self._file = file

    def release(self) -> None:
        """Give the GPU back."""
        self._file.close()


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them, without initialising CUDA."""
    import torch

    # Counts through NVML. After torch.cuda.is_available(), torch would not read CUDA_VISIBLE_DEVICES again.
    count = torch.cuda.device_count()
    listed = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(listed[:count]) if len(listed) >= count and listed else tuple(map(str, range(count)))


def lease_gpu(folder: Path, gpus: Sequence[str]) -> GpuLease:
    """Lease the GPU with the fewest workers.

    The first slot of every GPU is tried before the second slot of any GPU, so that workers spread evenly.

    Args:
        folder: A folder for the workers of this run only.
        gpus: Names of the GPUs, in the same order in every worker.

    Raises:
        RuntimeError: Every slot is taken.
    """
    for slot in range(_MOST_PER_GPU):
        for number, gpu in enumerate(gpus):
            file = (folder / f"gpu{number}-slot{slot}.lock").open("w", encoding="utf-8")
            try:
                # A POSIX lock. Forked children do not share it, but they would share a lock of flock, and they may live
                # longer than this process.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                continue
            return GpuLease(gpu, slot, file)
    raise RuntimeError(f"all {_MOST_PER_GPU} worker slots on each of {len(gpus)} GPUs are taken: start fewer workers")


def use_gpu(lease: GpuLease, gpus: Sequence[str]) -> None:
    """Make the leased GPU the one that this process uses."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.set_device(list(gpus).index(lease.gpu))
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = lease.gpu
