"""``ktonum`` on the command line: exit statuses, refusals in one line, reports, and results after crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import ktonum
from ktonum.cli import command_line as cli
from ktonum.results import Cause, Report, Verdict
from support.command_line import ROOT, audit, run, run_process, start
from support.throwaway_ops import write_ops


def comparable(report: Report) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.to_record().items() if k != "seconds"} for r in report.results]


def test_a_right_candidate_passes_and_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    outputs = ("--html", "report.html", "--junit", "junit.xml")
    status, out, err, alone = audit(tmp_path, "right", "-n", "0", *outputs)
    assert (status, err) == (0, ""), out
    assert alone.ok and len(alone.results) == 45
    assert "The audit passes: 45 passed" in out
    assert sum(line.startswith("PASS") for line in out.splitlines()) == 45
    assert alone.environment["audit"]["planned"] == 45 and alone.environment["audit"]["interrupted"] is False
    assert "torch" in alone.environment["packages"]

    tests = list(ET.parse(tmp_path / "junit.xml").iter("testcase"))
    assert len(tests) == 45
    assert {"right[N=4,M=33]-fp32-cpu::forward"} <= {t.get("name") for t in tests}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The audit passes" in page and "right[N=4,M=33]-fp32-cpu" in page
    assert "<link" not in page and "src=" not in page

    status, _, err, spread = audit(tmp_path, "right", "-n", "2")
    assert (status, err) == (0, "")
    assert comparable(spread) == comparable(alone)


def test_a_wrong_gradient_fails_and_says_where_and_how_much(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --doesnotexist\n", encoding="utf-8")
    (tmp_path / "conftest.py").write_text("raise RuntimeError('not the audit business')\n", encoding="utf-8")
    status, out, _, report = audit(
        tmp_path, "wrong", "-n", "0", PYTEST_ADDOPTS="--alsonot", PYTEST_PLUGINS="no_such_plugin"
    )
    assert status == 1
    of_gradients = {"gradients", "upstream", "graph", "autocast", "special_values", "bias"}
    assert {r.check for r in report.failures} == of_gradients
    assert len(report.failures) == 3 * len(of_gradients)
    question = "every gradient is within its rounding-error bound of the float64 oracle"
    assert f"gradients fails on 3 of 3 cases; expected: {question}" in " ".join(out.split())
    assert "grad_x/" in out and "= 0.05" in out
    assert "ktonum audit throwaway.py:wrong --device cpu --dtype fp32 --only 'wrong[N=" in out
    assert "The audit fails: 27 passed, 18 FAIL" in out


@pytest.mark.parametrize(
    ("op", "reason"),
    [("raises", "ValueError: no such luck"), ("structure", "returned no 'output'")],
)
def test_a_candidate_that_raises_or_returns_nonsense_is_an_error(tmp_path: Path, op: str, reason: str) -> None:
    status, out, err, report = audit(tmp_path, op, "-n", "0", "--only", "forward")
    assert status == 1 and err == ""
    assert [r.verdict for r in report.results] == [Verdict.ERROR] * 3
    assert all(reason in r.reason for r in report.results)
    assert "ERROR on 3 of 3" in out and reason in out
    if op == "raises":
        assert "in raises_" in report.results[0].details


MISFORTUNES = """
def unlucky_(x):
    return {5: exits_, 6: poisoned_, 7: hangs_}.get(len(x), right_)(x[:5]) if len(x) in (5, 6, 7) else right_(x)


dims = [{"N": n, "M": 7} for n in (4, 5, 6, 7, 8)]
unlucky = Op(name="unlucky", candidate=unlucky_, reference=reference, sample=sample, dims=dims)
"""


def test_a_process_that_dies_costs_only_its_own_verdict(tmp_path: Path) -> None:
    """A candidate ends its process, loses the CUDA context, or hangs. Each costs a worker; another one continues."""
    file = write_ops(tmp_path)
    file.write_text(file.read_text(encoding="utf-8") + MISFORTUNES, encoding="utf-8")
    common = ("--device", "cpu", "--dtype", "fp32", "--json", "report.json", "--junit", "junit.xml")
    status, out, _ = run(
        tmp_path, "audit", "throwaway.py:unlucky", *common, "-n", "1", "--only", "forward", "--timeout", "4"
    )
    assert status == 1
    report = Report.from_json(tmp_path / "report.json")
    verdicts = {f"N={r.parts.dims['N']}": r for r in report.results}
    assert {n: r.verdict.value for n, r in verdicts.items()} == {
        "N=4": "PASS",
        "N=5": "ERROR",
        "N=6": "ERROR",
        "N=7": "ERROR",
        "N=8": "PASS",
    }, out
    assert verdicts["N=5"].cause is Cause.DIED
    assert verdicts["N=6"].cause is Cause.CANDIDATE_WRONG and "an illegal memory access" in verdicts["N=6"].reason
    assert verdicts["N=7"].cause is Cause.HUNG and "in hangs_" in verdicts["N=7"].details
    assert "the candidate hung: no verdict within the time limit of 4 s" in out
    tests = list(ET.parse(tmp_path / "junit.xml").iter("testcase"))
    assert len(tests) == 5, "a worker's end is no test of its own"


def test_without_workers_a_lost_context_fails_later_items(tmp_path: Path) -> None:
    status, _, _, report = audit(tmp_path, "poisoned", "-n", "0", "--only", "forward")
    assert status == 1
    assert [r.verdict.value for r in report.results] == ["PASS", "ERROR", "ERROR"]
    last = report.results[2]
    assert last.cause is Cause.NOT_RUN
    assert "an earlier item crashed CUDA in this process (poisoned[N=5" in last.reason


def test_results_before_an_interruption_are_written(tmp_path: Path) -> None:
    """SIGTERM is sent from another process."""
    write_ops(tmp_path)
    arguments = ("audit", "throwaway.py:slow", "--device", "cpu", "--dtype", "fp32", "-n", "0", "--json", "report.json")
    process = start(tmp_path, *arguments, PYTHONUNBUFFERED="1")
    assert process.stdout is not None
    while not process.stdout.readline().startswith("PASS"):
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    _check_interrupted(out, Report.from_json(tmp_path / "report.json"))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_either_signal_interrupts_while_the_candidate_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: signal.Signals
) -> None:
    file = write_ops(tmp_path)
    text = file.read_text(encoding="utf-8").replace(
        "time.sleep(0.3)", f"x.shape[0] == 5 and os.kill(os.getpid(), {stop:d})"
    )
    file.write_text(text, encoding="utf-8")
    # A test session in the background of a shell ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        common = ("--device", "cpu", "--dtype", "fp32", "--json", "report.json")
        status, out, err = run(tmp_path, "audit", "throwaway.py:slow", *common, "-n", "0")
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130, err
    _check_interrupted(out, Report.from_json(tmp_path / "report.json"))


def _check_interrupted(out: str, report: Report) -> None:
    assert 1 <= len(report.results) < 45
    assert report.environment["audit"]["interrupted"] is True
    assert "The audit is unfinished" in out and "not run" in out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The single line that the command prints for wrong usage."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("kot",), ("'kot'", "did you mean 'kto'", "module:attr")),
        (("no_such_module:OP",), ("no_such_module", "No module named")),
        (("nowhere.py:OP",), ("nowhere.py", "no such file")),
        (("throwaway.py:absent",), ("throwaway.py", "'absent'")),
        (("throwaway.py:not_an_op",), ("is a int", "name a ktonum.Op")),
        (("throwaway.py:right", "--candidate", "mine"), ("unknown candidate 'mine'", "module:attr")),
        (("throwaway.py:right", "--candidate", "no_such_module:f"), ("no_such_module", "No module named")),
        (("throwaway.py:right", "--candidate", "throwaway.py:not_an_op"), ("is a int", "callable")),
        (("throwaway.py:right", "--dtype", "bf17"), ("'bf17'", "bf16, fp16, fp32, fp64")),
        (("throwaway.py:right", "--dtype", ""), ("dtype", "bf16, fp16, fp32, fp64")),
        (("throwaway.py:right", "--device", "tpu"), ("'tpu'", "auto, cpu, cuda")),
        (("throwaway.py:right", "--profile", "slow"), ("'slow'", "quick, full")),
        (("throwaway.py:right", "--standard", "sloppy"), ("'sloppy'", "precise, eager")),
        (("throwaway.py:right", "-n", "many"), ("'many'", "auto")),
        (("throwaway.py:right", "-n", "-1"), ("-1",)),
        (("throwaway.py:right", "--only", "nothing-like-it"), ("nothing-like-it", "right[N=4,M=33]")),
        (("throwaway.py:right", "--json", "no/such/folder/r.json"), ("--json", "no folder", "create it")),
        (("throwaway.py:right", "--html", "."), ("--html", "is a folder")),
        (("throwaway.py:right", "--nonsense"), ("--nonsense", "ktonum --help")),
        (("throwaway.py:right", "--timeout", "soon"), ("'soon'", "seconds")),
    ],
)
def test_wrong_usage_is_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    write_ops(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if "--device" not in arguments:
        arguments = (*arguments, "--device", "cpu")
    line = refused(capsys, "audit", *arguments)
    assert all(word in line for word in words), line


def test_an_op_whose_module_raises_is_refused_with_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('half written')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "half written" in refused(capsys, "audit", "broken.py:OP", "--device", "cpu")


def test_html_without_jinja2_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'ktonum[report]'" in refused(capsys, "audit", "--html", "page.html")


def test_cuda_is_refused_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "use device cpu" in refused(capsys, "audit", "--device", "cuda")


def test_the_shipped_op_resolves() -> None:
    from ktonum.auditing.op_loading import load_ops
    from ktonum.ready_ops import SHIPPED

    assert [op.name for op in load_ops(list(SHIPPED.values()))] == list(SHIPPED)


def test_inconclusive_passes_unless_strict_and_an_audit_without_a_pass_fails(tmp_path: Path) -> None:
    file = write_ops(tmp_path)
    file.write_text(
        file.read_text(encoding="utf-8")
        + "\nfrom ktonum.errors import UsageError\n"
        + "def picky(x):\n    if x.shape[0] == 5:\n        raise UsageError('not five')\n    return right_(x)\n"
        + "picky_op = op('picky', picky)\n",
        encoding="utf-8",
    )
    base = ("audit", "throwaway.py:picky_op", "--device", "cpu", "--dtype", "fp32", "-n", "0")
    status, out, _ = run(tmp_path, *base, "--only", "forward")
    assert status == 0 and "not five" in out and "1 INCONCLUSIVE" in out
    status, out, _ = run(tmp_path, *base, "--only", "forward", "--strict", "--junit", "junit.xml")
    assert status == 1 and "--strict" in out
    assert len(list(ET.parse(tmp_path / "junit.xml").iter("failure"))) == 1
    status, out, _ = run(tmp_path, *base, "--only", "N=5,M=64]-fp32-cpu::forward")
    assert status == 1 and "decided nothing" in out


def test_help_and_version_load_no_torch(tmp_path: Path) -> None:
    code = "import sys, ktonum.cli; print(sorted({'torch', 'triton', 'pytest'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.stdout.decode().strip() == "[]", done.stderr.decode()
    status, out, _ = run_process(tmp_path, "--version")
    assert status == 0 and out.strip() == f"ktonum {ktonum.__version__}"


def test_doctor_reports_versions_and_the_interpreter(tmp_path: Path) -> None:
    status, out, _ = run(tmp_path, "doctor")
    assert status == 0, out
    assert "torch 2" in out and "An audit can run here" in out
    pytest.importorskip("triton")
    assert "dot float64" in out.partition("interpreter is right in")[2].splitlines()[0]
    assert "dot bfloat16" in out.partition("interpreter is wrong in")[2]
