"""ktonum: the numerics library that GPU-kernel authors trust.

Public names load on first use, so that importing ktonum (as the pytest plugin does) costs nothing.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktonum.auditing.in_process import audit as audit
    from ktonum.auditing.in_process import audit_case as audit_case
    from ktonum.auditing.op_loading import load_op as load_op
    from ktonum.declare.cases import Case as Case
    from ktonum.declare.cases import Point as Point
    from ktonum.declare.edge_dims import edge_points as edge_points
    from ktonum.declare.error_model import DerivedErrors as DerivedErrors
    from ktonum.declare.op import Law as Law
    from ktonum.declare.op import Op as Op
    from ktonum.errors import InputError as InputError
    from ktonum.errors import KtonumError as KtonumError
    from ktonum.errors import ToleranceError as ToleranceError
    from ktonum.gradient_check.gradcheck import gradcheck as gradcheck
    from ktonum.gradient_check.gradcheck_error import GradcheckError as GradcheckError
    from ktonum.gradient_check.gradgradcheck import gradgradcheck as gradgradcheck
    from ktonum.gradient_check.result import GradcheckResult as GradcheckResult
    from ktonum.measure.comparison import Comparison as Comparison
    from ktonum.measure.comparison import compare as compare
    from ktonum.results import BoundKind as BoundKind
    from ktonum.results import BoundSource as BoundSource
    from ktonum.results import Cause as Cause
    from ktonum.results import CheckResult as CheckResult
    from ktonum.results import Localisation as Localisation
    from ktonum.results import Measurement as Measurement
    from ktonum.results import Power as Power
    from ktonum.results import Report as Report
    from ktonum.results import Verdict as Verdict
    from ktonum.tolerances.assertion import assert_within as assert_within

__version__ = "0.1.0"

# The imports above, which type checkers follow and Python does not, are the one list of public names and their modules.
_HOME = {
    public.name: statement.module
    for block in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    if isinstance(block, ast.If)
    for statement in block.body
    if isinstance(statement, ast.ImportFrom) and statement.module
    for public in statement.names
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ktonum' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
