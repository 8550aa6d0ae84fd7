"""``ktonum audit --reproductions``: each failure gets a script that fails with the defect and passes without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ktonum
from ktonum.auditing.reduce.own_process import Source, reduce_elsewhere
from ktonum.auditing.reduce.reproductions import distinct
from ktonum.declare.cases import Case, Point
from ktonum.errors import UsageError
from ktonum.results import CheckResult, Localisation, Verdict
from support.command_line import audit, environment_of_a_user, run, run_script
from support.throwaway_ops import write_ops


def execute(script: Path, folder: Path) -> tuple[int, str]:
    """A script's exit status and output. It runs in its own process and from another folder."""
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=environment_of_a_user(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def test_a_script_fails_with_the_defect_and_passes_without(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "audit", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    only = ("--only", "::gradients", "-n", "0")
    status, out, err, report = audit(folder, "wrong", *only, "--reproductions", "scripts")
    assert (status, err) == (1, ""), out
    assert len(report.failures) == 3
    (script,) = (folder / "scripts").iterdir()
    # With one class the gradient is zero. Two classes show the defect, or a seed for which roundings show it.
    assert script.name.startswith("wrong-N=1-M=") and script.name.endswith("-gradients-grad_x.py")
    assert f"Written: scripts/{script.name} (reduced in " in out
    assert "where grad_x is wrong: everywhere" in out and "grad_x looks like: scaled by 1.05" in out
    text = script.read_text(encoding="utf-8")
    assert "# gradients: FAIL in wrong[N=" in text and "# grad_x looks like: scaled by 1.05" in text
    status, printed = execute(script, elsewhere)
    assert status == 1 and printed.startswith("FAIL: grad_x is wrong\n  expected: every gradient is within")
    ops = folder / "throwaway.py"
    ops.write_text(ops.read_text(encoding="utf-8").replace("1.05 * (grad", "1.0 * (grad"), encoding="utf-8")
    status, printed, _ = run_script(script, elsewhere)
    assert status == 0 and printed.startswith("PASS")


def test_an_exception_has_a_script_that_raises_it_again(tmp_path: Path) -> None:
    status, out, _, _ = audit(tmp_path, "raises", "--only", "::forward", "-n", "0", "--reproductions", "scripts")
    assert status == 1
    (script,) = (tmp_path / "scripts").iterdir()
    assert "(not reduced)" in out
    status, printed, _ = run_script(script, tmp_path)
    assert status == 1 and "no such luck" in printed


def test_a_right_candidate_leaves_no_script(tmp_path: Path) -> None:
    status, out, _, _ = audit(tmp_path, "right", "--only", "::forward", "-n", "0", "--reproductions", "scripts")
    assert status == 0 and "scripts" not in out and not (tmp_path / "scripts").exists()


@pytest.mark.parametrize(("folder", "words"), [("file", "is a file: name a folder"), ("no/such", "create it first")])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, folder: str, words: str) -> None:
    write_ops(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    status, _, err = run(tmp_path, "audit", "throwaway.py:right", "--reproductions", folder)
    assert status == 2 and words in err and len(err.splitlines()) == 1


def test_one_check_of_one_case_by_public_names(tmp_path: Path) -> None:
    op = ktonum.load_op(f"{write_ops(tmp_path)}:wrong", candidate=f"{tmp_path / 'throwaway.py'}:right_")
    (case,) = (c for c in op.cases(profile="quick", dtypes=["fp32"], device="cpu") if c.point.dims["N"] == 4)
    assert ktonum.audit_case(op, case, "gradients").verdict is Verdict.PASS
    with pytest.raises(UsageError, match="no check called 'gradient' applies"):
        ktonum.audit_case(op, case, "gradient")
    with pytest.raises(UsageError, match=r"has 8 ops: name one of them as .*throwaway.py:NAME"):
        ktonum.load_op(str(tmp_path / "throwaway.py"))


CASES = {c.name: c for n in (7, 3) for c in (Case("op", Point({"N": n}), "fp32", "cpu"),)}


def _failed(check: str, tensor: str, n: int, verdict: Verdict = Verdict.FAIL, reason: str = "") -> CheckResult:
    places = (Localisation(tensor, "everywhere", ""),) if verdict is Verdict.FAIL else ()
    (name,) = (name for name, case in CASES.items() if case.point.dims["N"] == n)
    return CheckResult(name, check, verdict, reason=reason, localisations=places)


def test_failures_are_the_same_by_check_and_tensor_and_errors_by_their_reason() -> None:
    failures = [
        _failed("gradients", "grad_x", 7),
        _failed("gradients", "grad_x", 3),
        _failed("gradients", "grad_w", 7),
        _failed("forward", "y", 7),
        _failed("forward", "", 7, Verdict.ERROR, "raised"),
        _failed("gradients", "", 7, Verdict.ERROR, "raised"),
    ]
    kept = distinct(failures, CASES)
    assert kept == (failures[1], failures[2], failures[3], failures[4])


def test_a_crash_leaves_the_smallest_case_until_then(tmp_path: Path) -> None:
    """The candidate is wrong, and ends its process at the smallest size."""
    write_ops(tmp_path)
    ops = tmp_path / "throwaway.py"
    crash = "def crashing(x):\n    os._exit(7) if x.shape[0] < 3 else None\n    return right_(x) * 1.5\n"
    ops.write_text(
        ops.read_text(encoding="utf-8") + f"\n{crash}\ncrashes = op('crashes', crashing)\n", encoding="utf-8"
    )
    case = Case("crashes", Point({"N": 3, "M": 64}), "fp32", "cpu")
    source = Source(f"{ops}:crashes", None, str(tmp_path), "precise")
    found, words = reduce_elsewhere(source, case, "forward", "output")
    assert found.point.dims == {"N": 3, "M": 1} and words.endswith("its process died")
