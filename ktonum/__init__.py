"""ktonum: the numerics library that GPU-kernel authors trust.

Public names load on first use, so that importing ktonum (as the pytest plugin does) costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktonum.audit_plan import load_op as load_op
    from ktonum.auditing import audit as audit
    from ktonum.auditing import audit_case as audit_case
    from ktonum.cases import Case as Case
    from ktonum.cases import Point as Point
    from ktonum.comparison import Comparison as Comparison
    from ktonum.comparison import compare as compare
    from ktonum.edge_dims import edge_points as edge_points
    from ktonum.errors import GradcheckError as GradcheckError
    from ktonum.errors import InputError as InputError
    from ktonum.errors import KtonumError as KtonumError
    from ktonum.errors import ToleranceError as ToleranceError
    from ktonum.gradient_check.gradcheck import gradcheck as gradcheck
    from ktonum.gradient_check.result import GradcheckResult as GradcheckResult
    from ktonum.op import Law as Law
    from ktonum.op import Op as Op
    from ktonum.results import CheckResult as CheckResult
    from ktonum.results import Localisation as Localisation
    from ktonum.results import Measurement as Measurement
    from ktonum.results import Power as Power
    from ktonum.results import Report as Report
    from ktonum.results import Verdict as Verdict
    from ktonum.tolerances import assert_within as assert_within

__version__ = "0.1.0"

_HOME = {
    "Case": "cases",
    "CheckResult": "results",
    "Comparison": "comparison",
    "GradcheckError": "errors",
    "GradcheckResult": "gradient_check.result",
    "InputError": "errors",
    "KtonumError": "errors",
    "Law": "op",
    "Localisation": "results",
    "Measurement": "results",
    "Op": "op",
    "Point": "cases",
    "Power": "results",
    "Report": "results",
    "ToleranceError": "errors",
    "Verdict": "results",
    "assert_within": "tolerances",
    "audit": "auditing",
    "audit_case": "auditing",
    "compare": "comparison",
    "edge_points": "edge_dims",
    "gradcheck": "gradient_check.gradcheck",
    "load_op": "audit_plan",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ktonum' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(importlib.import_module(f"ktonum.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
