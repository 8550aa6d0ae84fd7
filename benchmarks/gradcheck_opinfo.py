"""`ktonum.gradcheck` and torch's own, side by side, on every operator of torch's test database.

    python benchmarks/gradcheck_opinfo.py [--samples 2] [--only NAME ...] [--out FILE] [--json FILE]

The database (the "OpInfo" entries of ``torch.testing._internal``) has inputs for more than 500 operators. It needs the
package expecttest: install the extra ``opinfo``. Each sample is checked by `ktonum.gradcheck` and by
``torch.autograd.gradcheck(..., fast_mode=True)`` in turns, on one thread. The exit status is 1 if `ktonum.gradcheck`
raised an exception that is not a verdict.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError as TorchGradcheckError
from torch.utils import _pytree as pytree

import ktonum

VERDICTS = ("PASS", "FAIL", "INCONCLUSIVE", "ERROR")
# A message is cut after so many characters in the summary; the JSON file has all of it.
_SHOWN = 300


@dataclass(frozen=True)
class Outcome:
    """The answer of one checker to one sample.

    Attributes:
        verdict: One of `VERDICTS`; ``ERROR`` for any exception that is not a verdict.
        words: The checker's message.
        seconds: CPU time.
        calls: Evaluations of the function.
    """

    verdict: str
    words: str
    seconds: float
    calls: int


@dataclass(frozen=True)
class Row:
    """One sample of one operator, checked by both."""

    operator: str
    sample: int
    ktonum: Outcome
    torch: Outcome


@dataclass(frozen=True)
class Sample:
    """A function of the tensors that require grad, and these tensors.

    Torch's own gradient tests make the same of an entry of the database.
    """

    function: Callable[..., Any]
    tensors: tuple[Tensor, ...]


def samples(op: Any, most: int) -> Iterator[Sample]:
    """The first samples of an entry that have a tensor which requires grad."""
    for sample in islice(op.sample_inputs("cpu", torch.float64, requires_grad=True), most):
        leaves, structure = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

        def function(
            *tensors: Tensor,
            leaves: Any = leaves,
            structure: Any = structure,
            places: Any = places,
            sample: Any = sample,
        ) -> Any:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            first, args, kwargs = pytree.tree_unflatten(filled, structure)
            output = op.gradcheck_wrapper(op.get_op(), first, *args, **kwargs)
            return sample.output_process_fn_grad(output)

        if places:
            yield Sample(function, tuple(leaves[i].detach().requires_grad_() for i in places))


def answer(ask: Callable[[Callable[..., Any], tuple[Tensor, ...]], tuple[str, str]], sample: Sample) -> Outcome:
    """One checker's outcome."""
    calls = 0

    def counted(*tensors: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return sample.function(*tensors)

    started = time.process_time()
    try:
        verdict, words = ask(counted, sample.tensors)
    except TorchGradcheckError as error:
        verdict, words = "FAIL", str(error)
    except Exception as error:
        verdict, words = "ERROR", f"{type(error).__name__}: {error}"
    return Outcome(verdict, words, time.process_time() - started, calls)


def any_sparse(tensors: Sequence[Tensor]) -> bool:
    """Whether to pass ``masked=True``: the database's operators give sparse inputs masked gradients."""
    return any(tensor.layout != torch.strided for tensor in tensors)


def by_ktonum(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> tuple[str, str]:
    """Our verdict and its message."""
    result = ktonum.gradcheck(function, tensors, raise_exception=False, masked=any_sparse(tensors))
    return result.verdict.value, result.summary()


def by_torch(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> tuple[str, str]:
    """Torch's verdict in its fast mode; it raises where a gradient is wrong."""
    torch.autograd.gradcheck(function, tensors, fast_mode=True, masked=any_sparse(tensors))
    return "PASS", ""


def rows(most: int, only: Sequence[str]) -> Iterator[Row]:
    """Every sample, checked by both. The order of the two alternates."""
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db:
        name = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
        if not op.supports_autograd or torch.float64 not in op.supported_backward_dtypes("cpu"):
            continue
        if only and not any(text in name for text in only):
            continue
        torch.manual_seed(0)  # noqa: TID251  # the database draws from the global generator
        try:
            found = list(samples(op, most))
        except Exception as error:  # of the database
            sys.stderr.write(f"{name}: no samples ({type(error).__name__}: {error})\n")
            continue
        for number, sample in enumerate(found):
            if number % 2:
                theirs, ours = answer(by_torch, sample), answer(by_ktonum, sample)
            else:
                ours, theirs = answer(by_ktonum, sample), answer(by_torch, sample)
            yield Row(name, number, ours, theirs)


def summary(found: Sequence[Row], command: str) -> str:
    """The verdicts of both, the times, and each sample that one of the two did not pass."""
    counts = Counter((row.ktonum.verdict, row.torch.verdict) for row in found)
    asked = [v for v in VERDICTS if any(row.torch.verdict == v for row in found)]
    ours, theirs = (sum(getattr(row, who).seconds for row in found) for who in ("ktonum", "torch"))
    calls, their_calls = (sum(getattr(row, who).calls for row in found) for who in ("ktonum", "torch"))
    lines = [
        f"# {command}",
        f"# CPU ({platform.machine()}, 1 thread), Python {platform.python_version()}, torch {torch.__version__}, "
        f"{datetime.date.today().isoformat()}",
        "",
        f"{len(found)} samples of {len({row.operator for row in found})} operators, float64",
        "",
        "samples, by the verdict of ktonum.gradcheck (rows) and of torch.autograd.gradcheck(fast_mode=True) (columns):",
        f"{'':14s}" + "".join(f"{verdict:>14s}" for verdict in asked),
        *(
            f"{verdict:14s}" + "".join(f"{counts[verdict, their]:14d}" for their in asked)
            for verdict in VERDICTS
            if any(counts[verdict, their] for their in asked)
        ),
        "",
        f"CPU time: ktonum {ours:.1f} s, torch's fast mode {theirs:.1f} s: {ours / theirs:.2f} times",
        f"evaluations of the function: ktonum {calls}, torch's fast mode {their_calls}",
        "",
        "samples that one of the two does not pass:",
    ]
    for row in found:
        if (row.ktonum.verdict, row.torch.verdict) == ("PASS", "PASS"):
            continue
        lines.append(f"{row.operator} [{row.sample}]  ktonum {row.ktonum.verdict}  torch {row.torch.verdict}")
        if row.ktonum.verdict != "PASS":
            lines.append(f"    ktonum: {' '.join(row.ktonum.words.split())[:_SHOWN]}")
        if row.torch.verdict != "PASS":
            lines.append(f"    torch: {' '.join(row.torch.words.split())[:_SHOWN]}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check, print the summary, write the files; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=2, help="the most samples of an operator")
    parser.add_argument("--only", nargs="*", default=[], help="operators whose name contains one of these")
    parser.add_argument("--out", type=Path, help="write the summary to this file")
    parser.add_argument("--json", type=Path, help="write every row to this file")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = list(rows(given.samples, given.only))
    if not found:
        parser.error(f"no operator's name contains one of {given.only}")
    text = summary(found, f"python benchmarks/gradcheck_opinfo.py --samples {given.samples}")
    sys.stdout.write(text)
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n", encoding="utf-8")
    return int(any(row.ktonum.verdict == "ERROR" for row in found))


if __name__ == "__main__":
    sys.exit(main())
