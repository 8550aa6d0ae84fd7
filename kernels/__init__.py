"""The fused-linear KTO loss in Triton, its reference, and the op under audit."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktonum.kernels.contract.config import KTOConfig as KTOConfig
    from ktonum.kernels.contract.reference import ReferenceKTOLoss as ReferenceKTOLoss
    from ktonum.kernels.loss import FusedLinearKTOLoss as FusedLinearKTOLoss
    from ktonum.kernels.loss import fused_linear_kto_loss as fused_linear_kto_loss

# The imports above, which type checkers follow and Python does not, are the one list of public names and their modules.
_HOME = {
    public.name: statement.module
    for block in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    if isinstance(block, ast.If)
    for statement in block.body
    if isinstance(statement, ast.ImportFrom) and statement.module
    for public in statement.names
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ktonum.kernels' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)
