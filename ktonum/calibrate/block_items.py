"""A calibration as items of a session: each block of seeds is one, and its samples go to a file."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from ktonum.calibrate.block_errors import sample_block
from ktonum.calibrate.samples_file import append_samples, made_with, read_samples
from ktonum.calibrate.seed_blocks import Block, Wanted, blocks_of
from ktonum.declare.op import Op
from ktonum.errors import CandidateError, InputError, UsageError
from ktonum.results import CheckResult, Verdict

__all__ = ["BlockWork", "SamplesFile", "block_works"]


class SamplesFile:
    """The file, read once in each process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept = read_samples(path)

    def has(self, block: Block) -> bool:
        """Whether the block was measured before, with the same code, versions and device."""
        kept = self._kept.get(block.name)
        return kept is not None and kept[0] == made_with(block)


@dataclass(frozen=True)
class BlockWork:
    """Measures a block unless it was before.

    Samples decide nothing: the result is INCONCLUSIVE, but FAIL where an error is beyond the derived bound, for then
    the candidate or the bound is wrong and no tolerance can rest on it. Its samples are kept all the same.
    """

    block: Block
    file: SamplesFile

    @property
    def name(self) -> str:
        """What takes a check's place in the item's name."""
        return f"{self.block.seeds} seeds of {self.block.candidate}"

    def __call__(self) -> CheckResult:
        """Measure it."""
        started = time.perf_counter()
        verdict, reason, details = self._measure()
        seconds = time.perf_counter() - started
        return CheckResult(self.block.case.name, self.name, verdict, reason=reason, details=details, seconds=seconds)

    def _measure(self) -> tuple[Verdict, str, str]:
        try:
            if self.file.has(self.block):
                return Verdict.INCONCLUSIVE, "measured before", ""
            series = sample_block(self.block)
            append_samples(self.file.path, self.block, series)
        except (CandidateError, InputError) as error:
            first, _, rest = str(error).partition("\n")
            return Verdict.ERROR, f"the candidate {first}", rest
        except UsageError as error:  # it lacks what the point asks for
            return Verdict.ERROR, f"the candidate cannot run this point: {error}", ""
        except Exception as error:
            return Verdict.ERROR, f"{type(error).__name__}: {error}", traceback.format_exc()
        beyond = [s.beyond for s in series if s.beyond]
        return (Verdict.FAIL, "; ".join(beyond), "") if beyond else (Verdict.INCONCLUSIVE, "measured", "")


def block_works(op: Op, wanted: Wanted, samples: Path) -> list[BlockWork]:
    """The blocks of an op, and the work of measuring each."""
    file = SamplesFile(samples)
    return [BlockWork(block, file) for block in blocks_of(op, wanted)]
