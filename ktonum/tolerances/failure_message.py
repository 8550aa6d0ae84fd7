"""The message of a failing `ktonum.assert_within`: what is wrong, where, what to run, then errors and tolerances."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ktonum.locate.places import dim_names, find_place
from ktonum.measure.in_roundings import Errors
from ktonum.report.sentences import bound_words
from ktonum.results import Measurement

__all__ = ["Failure", "reproduction"]

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Failure:
    """A result that is beyond a tolerance.

    Attributes:
        heading: Op, output, dtype and device class in words.
        actual: The result.
        expected: The oracle, same shape.
        errors: The measured errors.
        measurements: The same errors with their tolerances.
        exceeding: True for elements beyond the tolerance of ``element``, same shape.
        dims: The case's sizes by name. The message calls the dims of the tensor by these names.
        examine: A command that audits the op.
    """

    heading: str
    actual: Tensor
    expected: Tensor
    errors: Errors
    measurements: Sequence[Measurement]
    exceeding: Tensor
    dims: Mapping[str, int]
    examine: str

    def message(self) -> str:
        """The message, in several lines."""
        beyond = sum(not m.within for m in self.measurements)
        lines = [f"{self.heading}: {beyond} of {len(self.measurements)} measures beyond tolerance", *self._places()]
        lines += [f"  reproduce: {reproduction()}", f"  examine: {self.examine}"]
        for m in self.measurements:
            verdict = "ok    " if m.within else "BEYOND"
            lines.append(f"  {verdict} {m.name}: measured {m.value:.4g}, tolerance {m.bound:.4g} {m.unit}")
            lines.append(f"         source of the tolerance: {bound_words(m.bound_source)}")
        return "\n".join(lines)

    def _places(self) -> Iterator[str]:
        free = (self.actual == 0).cpu() & (self.expected == 0).cpu()
        yield f"  where: {find_place(self.exceeding, dim_names(self.actual.shape, self.dims), free).words}"
        errors, index = self.errors, self.errors.worst
        a, e = float(self.actual[index]), float(self.expected[index])
        place = f"{list(index)} of {list(self.actual.shape)}: actual {a:.9g}, expected {e:.9g}"
        if errors.nonfinite:
            count = self.actual.numel()
            yield f"  {errors.nonfinite} of {count} elements are wrongly NaN or infinite, the first at {place}"
        else:
            yield f"  worst element at {place}, off by {a - e:.3g}"
            yield f"  signed bias {100 * errors.signed:+.3g} % of expected, error norm {100 * errors.norm:.3g} %"


def reproduction() -> str:
    """A command that runs the caller's test again from any directory. Outside pytest: the place of the call."""
    running, _, _ = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")
    if running:
        file = running.partition("::")[0]
        root = _root_of(file)
        if root is None:
            return f"pytest {shlex.quote(running)} (from pytest's rootdir)"
        # The id is relative to pytest's rootdir. pytest may have been started elsewhere, and tests change directory.
        go = "" if root == Path.cwd() else f"cd {shlex.quote(str(root))} && "
        return f"{go}pytest {shlex.quote(running)}"
    filename, line = next(((f, n) for f, n in _stack() if _PACKAGE not in Path(f).resolve().parents), (sys.argv[0], 0))
    again = shlex.join(["python", *sys.argv]) if Path(sys.argv[0]).is_file() else "run that line again"
    return f"{again} (the call is at {filename}:{line}; in a pytest test this line names the test)"


def _root_of(file: str) -> Path | None:
    """The folder that a test file's name is relative to.

    It is found from the running code of a file with this name, or else from the current folder and those above it.
    """
    running = (Path(filename) for filename, _ in _stack())
    folders = [
        p.parents[len(Path(file).parts) - 1] for p in running if p.is_absolute() and p.as_posix().endswith(f"/{file}")
    ]
    folders += [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / file).is_file()]
    return folders[0] if folders else None


def _stack() -> Iterator[tuple[str, int]]:
    """File and line of each running function, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
