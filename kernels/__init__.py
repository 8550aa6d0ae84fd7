"""The fused-linear KTO loss in Triton, its reference, and the op under audit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktonum.kernels.contract.config import KTOConfig as KTOConfig
    from ktonum.kernels.contract.reference import ReferenceKTOLoss as ReferenceKTOLoss
    from ktonum.kernels.loss import FusedLinearKTOLoss as FusedLinearKTOLoss
    from ktonum.kernels.loss import fused_linear_kto_loss as fused_linear_kto_loss

_HOME = {
    "FusedLinearKTOLoss": "loss",
    "KTOConfig": "contract.config",
    "ReferenceKTOLoss": "contract.reference",
    "fused_linear_kto_loss": "loss",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ktonum.kernels' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"ktonum.kernels.{_HOME[name]}"), name)
