"""Runs Liger-Kernel's own KTO test, unmodified, with another class in place of its loss.

    git clone https://github.com/linkedin/Liger-Kernel
    python benchmarks/run_liger_tests.py --checkout Liger-Kernel

This needs ``pip install 'ktonum[peers]'``, because the test runs against the installed liger-kernel and imports
transformers and tokenizers. Nothing is written into the checkout. The exit status is pytest's, or 2 for a wrong
argument.

This file is also a pytest plugin. pytest imports it in a second process. There it replaces
``liger_kernel.chunked_loss.LigerFusedLinearKTOLoss`` with the candidate before the test file is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

CANDIDATE_VARIABLE = "KTONUM_LIGER_CANDIDATE"
DEFAULT_CANDIDATE = "ktonum.kernels:FusedLinearKTOLoss"
TEST_FILE = Path("test", "chunked_loss", "test_kto_loss.py")
SWAPPED = "LigerFusedLinearKTOLoss"


def split(target: str) -> tuple[str, str]:
    """``module:attribute`` in two.

    Raises:
        ValueError: It does not have that form.
    """
    module, _, attribute = target.partition(":")
    if not (module and attribute):
        raise ValueError(f"candidate {target!r}: write module:Class, for example {DEFAULT_CANDIDATE}")
    return module, attribute


def load(target: str) -> Any:
    """The class named by ``module:attribute``.

    Raises:
        ValueError: It does not have that form, or there is no such class.
    """
    module, attribute = split(target)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"candidate {target!r} cannot be found: {error}") from error


def pytest_configure(config: pytest.Config) -> None:
    """Swaps the class, before anything is collected."""
    import liger_kernel.chunked_loss
    import pytest

    try:
        setattr(liger_kernel.chunked_loss, SWAPPED, load(os.environ[CANDIDATE_VARIABLE]))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuses to run tests that do not use the candidate, because they would say nothing about it."""
    import pytest

    candidate = load(os.environ[CANDIDATE_VARIABLE])
    for item in session.items:
        if getattr(getattr(item, "module", None), SWAPPED, None) is not candidate:
            raise pytest.UsageError(f"{item.nodeid} does not import {SWAPPED} from liger_kernel.chunked_loss")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names the candidate in the last lines of pytest's output."""
    terminalreporter.write_line(f"{SWAPPED} was {os.environ[CANDIDATE_VARIABLE]}")


def environment(checkout: Path, candidate: str, device: str) -> dict[str, str]:
    """The environment of the test process: import paths, the candidate, and Triton's interpreter on a CPU."""
    # If a pytest runs this script, its options and worker names must not reach the pytest that this script starts.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    here = Path(__file__).resolve().parent
    paths = [str(checkout), str(here), variables.get("PYTHONPATH", "")]
    variables |= {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONDONTWRITEBYTECODE": "1",
        CANDIDATE_VARIABLE: candidate,
    }
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        variables |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    return variables


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs pytest in a second process, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True, help="a clone of Liger-Kernel")
    parser.add_argument("--candidate", default=DEFAULT_CANDIDATE, help="module:Class (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument(
        "--tests", default="test_correctness and not functional", help="pytest's -k (default: %(default)s)"
    )
    parser.add_argument("pytest_arguments", nargs="*", help="after --: further arguments for pytest")
    options = parser.parse_args(arguments)
    checkout = options.checkout.resolve()
    if not (checkout / TEST_FILE).is_file():
        parser.error(
            f"--checkout {options.checkout}: no {TEST_FILE} there; "
            f"get a checkout: git clone https://github.com/linkedin/Liger-Kernel"
        )
    try:
        split(options.candidate)
    except ValueError as error:
        parser.error(str(error))
    command = [sys.executable, "-m", "pytest", str(TEST_FILE), "-k", options.tests, "-p", Path(__file__).stem]
    # Not Liger's pyproject.toml: it has options of pytest plugins that may not be installed.
    command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(checkout), "-q"]
    command += options.pytest_arguments
    return subprocess.run(
        command, cwd=checkout, env=environment(checkout, options.candidate, options.device), check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
