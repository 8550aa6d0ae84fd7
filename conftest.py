"""What every test session needs before its first test module is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# Triton decides when a kernel is defined whether its interpreter runs it, so this comes before anything imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# With as many workers as cores, threads within a worker only take turns; and a sum split over threads depends on them.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# For what test modules share. Not the root: a second copy of the kernels would become importable from there.
sys.path.append(str(Path(__file__).parent / "tests"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: a GPU where there is one, else the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
