"""Which worker uses which GPU: leases by file lock.

A worker's number cannot decide it, because the worker that replaces gw2 may be gw4. A lease is a lock on a file in the
run's folder. The system releases it when the worker ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

__all__ = ["GpuLease", "lease_gpu", "use_gpu", "visible_gpus"]

# More workers than this on one GPU is a mistake: each needs memory for a CUDA context of its own.
_MOST_PER_GPU = 64


class GpuLease:
    """This process's right to use a GPU, until it ends or `release` is called.

    Attributes:
        gpu: Its name in ``CUDA_VISIBLE_DEVICES``: an index or a UUID.
        slot: 0 for the GPU's first worker, 1 for its second ...
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

    # Through NVML: torch.cuda.is_available() would read CUDA_VISIBLE_DEVICES for good.
    count = torch.cuda.device_count()
    listed = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(listed[:count]) if len(listed) >= count and listed else tuple(map(str, range(count)))


def lease_gpu(folder: Path, gpus: Sequence[str]) -> GpuLease:
    """Lease the least used GPU.

    Every GPU's first slot is tried before any second one, so that workers spread evenly.

    Args:
        folder: Shared by the workers of one run and by nobody else.
        gpus: Names of the GPUs, in the same order in every worker.

    Raises:
        RuntimeError: Every slot is taken.
    """
    for slot in range(_MOST_PER_GPU):
        for number, gpu in enumerate(gpus):
            file = (folder / f"gpu{number}-slot{slot}.lock").open("w", encoding="utf-8")
            try:
                # A POSIX lock: unlike flock's, it stays with this process and is not shared by children it forks, which
                # may outlive it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                continue
            return GpuLease(gpu, slot, file)
    raise RuntimeError(f"no free slot on {len(gpus)} GPUs, {_MOST_PER_GPU} workers each: start fewer workers")


def use_gpu(lease: GpuLease, gpus: Sequence[str]) -> None:
    """Make the leased GPU the one that this process uses."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.set_device(list(gpus).index(lease.gpu))
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = lease.gpu
