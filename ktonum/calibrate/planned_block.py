"""A calibration as items of a session. Each item is a block of seeds, and writes its samples to a file."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ktonum.auditing.plan import PlannedItem
from ktonum.calibrate.block_errors import sample_block
from ktonum.calibrate.samples_file import append_samples, made_with, read_samples
from ktonum.calibrate.seed_blocks import Block, Wanted, blocks_of
from ktonum.declare.op import Op
from ktonum.errors import CandidateError, InputError, UsageError
from ktonum.results import Cause, CheckResult, Verdict

__all__ = ["PlannedBlock", "SamplesFile", "planned_blocks"]


class SamplesFile:
    """The file of samples, which each process reads once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept = read_samples(path)

    def has(self, block: Block) -> bool:
        """Whether the file has the block's samples, measured with the same code, versions and device."""
        kept = self._kept.get(block.name)
        return kept is not None and kept[0] == made_with(block)


@dataclass(frozen=True, kw_only=True)
class PlannedBlock(PlannedItem):
    """Measures a block, unless its samples are in the file.

    Samples decide nothing, so the result is INCONCLUSIVE. It is FAIL if an error is beyond the derived bound: then the
    candidate or the bound is wrong, and tolerances cannot be made from these samples. The file keeps them anyway.
    """

    block: Block
    file: SamplesFile

    @classmethod
    def of(cls, block: Block, file: SamplesFile) -> PlannedBlock:
        """The item of a block."""
        return cls(case=block.case, check=f"{block.seeds} seeds of {block.candidate}", block=block, file=file)

    def run(self) -> CheckResult:
        """Measure the block."""
        started = time.perf_counter()
        result = self._measure()
        return replace(result, seconds=time.perf_counter() - started)

    def _measure(self) -> CheckResult:
        def result(verdict: Verdict, cause: Cause, reason: str, details: str = "") -> CheckResult:
            return CheckResult(
                self.case.name, self.check, verdict, cause=cause, reason=reason, details=details, parts=self.case.parts
            )

        try:
            if self.file.has(self.block):
                return result(Verdict.INCONCLUSIVE, Cause.CANNOT_TELL, "measured before")
            series = sample_block(self.block)
            append_samples(self.file.path, self.block, series)
        except (CandidateError, InputError) as error:
            first, _, rest = str(error).partition("\n")
            return result(Verdict.ERROR, Cause.CANDIDATE_WRONG, first, rest)
        except UsageError as error:  # the candidate lacks a feature of the point
            return result(Verdict.ERROR, Cause.CANNOT_RUN, str(error))
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            return result(Verdict.ERROR, Cause.CHECK_RAISED, words, traceback.format_exc())
        beyond = [s.beyond for s in series if s.beyond]
        if beyond:
            return result(Verdict.FAIL, Cause.BEYOND_BOUND, "; ".join(beyond))
        return result(Verdict.INCONCLUSIVE, Cause.CANNOT_TELL, "measured")


def planned_blocks(ops: Sequence[Op], wanted: Wanted, samples: Path) -> list[PlannedBlock]:
    """The items of all blocks of these ops."""
    file = SamplesFile(samples)
    return [PlannedBlock.of(block, file) for op in ops for block in blocks_of(op, wanted)]
