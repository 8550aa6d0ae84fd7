"""What a calibration was asked to do, and the session items that follow from it.

Imports torch only inside functions, as `ktonum.auditing.audit_settings` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ktonum.auditing.audit_settings import SessionSettings
from ktonum.declare.cases import parse_dtypes
from ktonum.errors import UsageError

if TYPE_CHECKING:
    from ktonum.calibrate.planned_block import PlannedBlock
    from ktonum.calibrate.seed_blocks import Wanted
    from ktonum.declare.op import Op

__all__ = ["FIRST_FRESH_SEED", "FIRST_SEED", "CalibrationSettings"]

#: The offset of the first case that is measured: an audit runs offset 0, and reducing a failure tries the next ones.
FIRST_SEED = 1000
#: That of the first case which is held against a table: no table was made with these.
FIRST_FRESH_SEED = 1_000_000
# Inputs at each point and dtype: Triton's interpreter needs minutes for kto, and a GPU about as long.
_SEEDS = {"cpu": 36, "cuda": 200}


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings(SessionSettings["PlannedBlock"]):
    """What a calibration was asked to do.

    Attributes:
        samples: The file in which samples are kept.
        candidates: Implementations to measure; empty for those that `ktonum.calibrate.seed_blocks` takes to be right.
        seeds: How many inputs are drawn at each point; 0 for a number that suits the device.
        first_seed: The offset of the first case.
    """

    samples: str
    candidates: tuple[str, ...] = ()
    seeds: int = 0
    first_seed: int = FIRST_SEED

    def check(self) -> None:
        """See `SessionSettings.check`."""
        super().check()
        if self.seeds < 0:
            raise UsageError(f"invalid --seeds {self.seeds}: use 1 or more, or 0 for a number that suits the device")

    def wanted(self, device: str) -> Wanted:
        """What is to be measured of each op on ``cpu`` or ``cuda``."""
        from ktonum.calibrate.seed_blocks import Wanted

        seeds = self.seeds or _SEEDS[device]
        return Wanted(self.candidates, self.profile, parse_dtypes(self.dtypes), device, self.first_seed, seeds)

    def items(self, ops: Sequence[Op], device: str) -> list[PlannedBlock]:
        """Every block of seeds."""
        from ktonum.calibrate.planned_block import planned_blocks

        return planned_blocks(ops, self.wanted(device), Path(self.samples))
