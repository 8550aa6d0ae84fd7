"""Liger-Kernel's own, unmodified KTO test with our class in place of its own, and the driver that runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ktonum.declare.op import load_object
from support.command_line import run_pytest
from support.repository import ROOT

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install 'ktonum[peers]'")

DRIVER = ROOT / "benchmarks" / "run_liger_tests.py"
CHECKOUT_VARIABLE = "KTONUM_LIGER_CHECKOUT"

RunHere = Callable[[Path, str], tuple[int, str]]

# The test in a folder that is laid out like Liger's checkout. It passes only for a beta of 0.5 * 0.1, as in `HalfBeta`.
OWN_TEST = """
import torch
from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss
from test.utils import BETA

def test_correctness():
    labels, targets = torch.tensor([True, False]), torch.zeros(2, 1, dtype=torch.long)
    hidden, weight = torch.eye(2).view(2, 1, 2), torch.tensor([[3.0, -1.0], [0.0, 0.0]])
    loss, _ = LigerFusedLinearKTOLoss(beta=BETA)(hidden, weight, targets, preference_labels=labels)
    logps = torch.tensor([3.0, -1.0]) - torch.tensor([3.0, -1.0]).exp().log1p()
    expected = torch.sigmoid(0.05 * torch.tensor([-1.0, 1.0]) * logps).mean()
    assert abs(loss - expected) < 1e-6
"""
CANDIDATES = """
from ktonum.kernels.contract.reference import ReferenceKTOLoss

class HalfBeta(ReferenceKTOLoss):
    def __init__(self, beta):
        super().__init__(beta=0.5 * beta)
"""


def run_driver(checkout: Path, candidate: str, *arguments: str, path: Path | None = None) -> tuple[int, str]:
    """Exit status and output of the driver in a new process. It starts pytest in another one."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(path), environment.get("PYTHONPATH", "")) if p)
    command = [sys.executable, str(DRIVER), "--checkout", str(checkout), "--candidate", candidate, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> RunHere:
    """The driver and its pytest in this process, on the CPU. Its messages about candidates need no new process."""
    import liger_kernel.chunked_loss

    driver = load_object(f"{DRIVER}:main").__globals__
    # The plugin replaces the class and does not put it back, because its own process ends. This process goes on.
    swapped = driver["SWAPPED"]
    monkeypatch.setattr(liger_kernel.chunked_loss, swapped, getattr(liger_kernel.chunked_loss, swapped))

    def call(checkout: Path, candidate: str) -> tuple[int, str]:
        said = []

        def pytest_here(command: list[str], *, cwd: Path, env: dict[str, str], check: bool) -> SimpleNamespace:
            interpreter, minus_m, name, *arguments = command
            assert (interpreter, minus_m, name, check) == (sys.executable, "-m", "pytest", False)
            with monkeypatch.context() as context:
                context.setattr(sys, "path", [*env["PYTHONPATH"].split(os.pathsep), *sys.path])
                status, out, err = run_pytest(cwd, *arguments, **env)
            said.append(out + err)
            return SimpleNamespace(returncode=status)

        monkeypatch.setitem(driver, "subprocess", SimpleNamespace(run=pytest_here))
        status = driver["main"](["--checkout", str(checkout), "--candidate", candidate, "--device", "cpu"])
        return status, "".join(said)

    return call


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    test_file = tmp_path / "test" / "chunked_loss" / "test_kto_loss.py"
    test_file.parent.mkdir(parents=True)
    (tmp_path / "test" / "__init__.py").touch()
    (test_file.parent / "__init__.py").touch()
    (tmp_path / "test" / "utils.py").write_text("BETA = 0.1\n")
    (tmp_path / "candidates.py").write_text(CANDIDATES)
    test_file.write_text(OWN_TEST)
    return tmp_path


def test_the_candidate_takes_the_place_of_ligers_class(checkout: Path) -> None:
    status, output = run_driver(checkout, "candidates:HalfBeta", "--device", "cpu", path=checkout)
    assert status == 0 and "1 passed" in output, output
    assert "LigerFusedLinearKTOLoss was candidates:HalfBeta" in output


def test_a_wrong_candidate_fails(checkout: Path, run_here: RunHere) -> None:
    status, output = run_here(checkout, "ktonum.kernels:ReferenceKTOLoss")
    assert status == 1 and "1 failed" in output, output


def test_a_test_file_that_does_not_use_the_class_is_refused(checkout: Path, run_here: RunHere) -> None:
    (checkout / "test" / "chunked_loss" / "test_kto_loss.py").write_text("def test_correctness(): pass\n")
    status, output = run_here(checkout, "ktonum.kernels:ReferenceKTOLoss")
    assert status != 0 and "does not import LigerFusedLinearKTOLoss" in output, output


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    status, output = run_driver(tmp_path, "ktonum.kernels:FusedLinearKTOLoss")
    assert status == 2
    assert "no test/chunked_loss/test_kto_loss.py there" in output and "git clone" in output


def test_a_candidate_of_the_wrong_form_is_refused(checkout: Path) -> None:
    status, output = run_driver(checkout, "FusedLinearKTOLoss")
    assert status == 2 and "'FusedLinearKTOLoss': write module:Class" in output, output


@pytest.mark.parametrize("candidate", ["ktonum.kernels:Missing", "ktonum.missing:Class"])
def test_a_candidate_that_cannot_be_found_is_named(checkout: Path, run_here: RunHere, candidate: str) -> None:
    status, output = run_here(checkout, candidate)
    assert status != 0 and repr(candidate) in output, output
    assert "Traceback" not in output


@pytest.mark.skipif(
    CHECKOUT_VARIABLE not in os.environ,
    reason=f"set {CHECKOUT_VARIABLE} to a clone of https://github.com/linkedin/Liger-Kernel to run its own KTO test",
)
def test_liger_own_test_passes_with_our_class() -> None:
    status, output = run_driver(Path(os.environ[CHECKOUT_VARIABLE]), "ktonum.kernels:FusedLinearKTOLoss")
    assert status == 0, output
    passed = re.search(r"(\d+) passed", output)
    # Two shapes, two dtypes, with and without each bias, two pairs of ignore_index and beta.
    assert passed is not None and int(passed[1]) >= 32, output
