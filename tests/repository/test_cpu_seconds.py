"""The budget of the test session: a session that exceeds it fails, and names its slowest files."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from support import cpu_seconds
from support.cpu_seconds import CpuSeconds, read_budget, yardstick

pytest_plugins = ["pytester"]

TESTS = {
    "test_quick": "def test_nothing():\n    pass\n",
    "test_slow": "def test_loop():\n    assert sum(i * i for i in range(3_000_000))\n",
}


def session(pytester: pytest.Pytester, budget: str) -> pytest.RunResult:
    """A session of two files in this process. One file is slow. A yardstick is a hundredth of a second."""
    pytester.makepyfile(**TESTS)
    (pytester.path / "budget.txt").write_text(f"# A comment.\n{budget}\n", encoding="utf-8")
    return pytester.runpytest_inprocess("-p", "support.cpu_seconds", "--cpu-budget", "budget.txt", "-n", "0")


@pytest.fixture(autouse=True)
def short_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_seconds, "yardstick", lambda: 0.01)


def test_a_session_within_its_budget_passes_and_names_its_slowest_file_first(pytester: pytest.Pytester) -> None:
    result = session(pytester, "1e6")
    assert result.ret == 0
    lines = result.outlines
    slowest = lines.index(next(line for line in lines if "the 10 slowest files" in line))
    slow, quick, total = (line.split() for line in lines[slowest + 1 :] if line and "===" not in line)
    assert slow[1] == "test_slow.py" and quick[1] == "test_quick.py"
    assert float(slow[0]) > max(0.05, float(quick[0]))
    assert " ".join(total).endswith("the budget is 1e+06")


def test_a_session_beyond_its_budget_fails_although_its_tests_pass(pytester: pytest.Pytester) -> None:
    result = session(pytester, "2")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["The session costs more than its budget.*"])


@pytest.mark.parametrize("text", ["", "many", "1\n2", "-1", "inf"])
def test_a_budget_that_is_none_is_refused(pytester: pytest.Pytester, text: str) -> None:
    result = session(pytester, text)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --cpu-budget budget.txt*: write *number*"])


def test_the_yardsticks_of_workers_are_taken_in() -> None:
    counter = CpuSeconds(1.0)
    counter.pytest_testnodedown(SimpleNamespace(workeroutput={"yardsticks": [1.0, 2.0]}))
    counter.pytest_testnodedown(SimpleNamespace())  # it crashed
    assert counter.yardsticks == [1.0, 2.0]


def test_the_yardstick_is_work_and_the_budget_of_this_repository_can_be_read(pytestconfig: pytest.Config) -> None:
    assert yardstick() > 0.05
    assert read_budget(pytestconfig.rootpath / ".ci" / "cpu_budget.txt") > 100
