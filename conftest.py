"""What every test session needs before its first test module is imported."""

from __future__ import annotations

import os

# Before NumPy and torch are loaded here or in a worker: with as many workers as cores, threads within a worker only
# wait for one another; and a sum split over threads depends on their number.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# Triton decides when a kernel is defined whether its interpreter runs it, so this comes before anything imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["support.cpu_seconds"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: a GPU where there is one, else the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
