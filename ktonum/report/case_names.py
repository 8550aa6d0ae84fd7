"""A case's name taken apart again, for reports of results whose cases are not at hand."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["CaseName"]

_CASE = re.compile(
    r"(?P<op>[^\[]+)\[(?P<dims>.*)\]-(?P<dtype>[a-z0-9]+)-(?P<device>cpu|cuda)(-(?P<distribution>.*?))?(?P<offset>\+\d+)?"
)


@dataclass(frozen=True)
class CaseName:
    """A case's name taken apart; a name of another form is all ``dims``."""

    op: str
    dims: str
    dtype: str
    device: str
    distribution: str
    offset: str = ""

    @classmethod
    def read(cls, name: str) -> CaseName:
        """The parts of ``Case.name``."""
        match = _CASE.fullmatch(name)
        if match is None:
            return cls("", name, "", "", "")
        return cls(
            match["op"],
            match["dims"],
            match["dtype"],
            match["device"],
            match["distribution"] or "",
            match["offset"] or "",
        )

    @property
    def short(self) -> str:
        """Dtype, dims and, if they are not the usual ones, distribution and offset of the seed."""
        tail = f" ({self.distribution})" if self.distribution else ""
        tail += f" {self.offset}" if self.offset else ""
        return f"{self.dtype} {self.dims}{tail}".strip()
