"""The pytest plugin in a project that uses ktonum, and how workers share GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ktonum.auditing.gpu_slots import visible_gpus
from support.command_line import ROOT, environment_of_a_user, run_pytest
from support.throwaway_ops import write_ops

ON_CPU = ("--ktonum-device", "cpu", "--ktonum-dtype", "fp32")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with an op, a test of its own and a ``pyproject.toml``.

    pytester is not used. It removes every module from this process that was imported meanwhile, also torch and Triton.
    """
    package = tmp_path / "mykernels"
    package.mkdir()
    (package / "__init__.py").touch()
    write_ops(package, only="right").rename(package / "audits.py")
    settings = '[tool.ktonum]\nops = ["mykernels.audits"]\n[tool.pytest.ini_options]\n'
    (tmp_path / "pyproject.toml").write_text(settings, encoding="utf-8")
    (tmp_path / "test_mine.py").write_text("def test_mine():\n    pass\n", encoding="utf-8")
    return tmp_path


def run(project: Path, *arguments: str) -> pytest.RunResult:
    """pytest as users call it. Not ``python -m pytest``, because that makes the project's root importable."""
    ended = run_pytest(project, *_without_cache(), *arguments)
    return _result(*ended)


def run_process(project: Path, *arguments: str, **environment: str) -> pytest.RunResult:
    """The same in a process of its own."""
    code = "import sys, pytest; sys.path[:] = [p for p in sys.path if p]; sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *_without_cache(), *arguments],
        cwd=project,
        env=environment_of_a_user(**environment),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return _result(done.returncode, done.stdout, done.stderr)


def _result(status: int, out: str, err: str) -> pytest.RunResult:
    return pytest.RunResult(status, out.splitlines(), err.splitlines(), 0.0)


def _without_cache() -> tuple[str, ...]:
    plugin = () if "ktonum" in _entry_points() else ("-p", "ktonum.pytest_plugin")
    return (*plugin, "-p", "no:cacheprovider")


def _entry_points() -> set[str]:
    from importlib.metadata import entry_points

    return {entry.name for entry in entry_points(group="pytest11")}


def test_declared_ops_are_collected_beside_the_projects_tests(project: Path) -> None:
    result = run(project, "--ktonum", "-v", "-k", "mine or forward", *ON_CPU)
    assert result.ret == 0
    result.assert_outcomes(passed=4, deselected=42)
    result.stdout.fnmatch_lines(["*test_mine.py::test_mine PASSED*"])
    result.stdout.fnmatch_lines(["ktonum::right[[]N=4,M=33[]]-fp32-cpu::forward PASSED*"])
    result.stdout.fnmatch_lines(["*Standard precise (it decides): met in fp32.", "The audit passes: 3 passed."])


def test_without_the_option_nothing_is_collected_nor_torch_imported(project: Path) -> None:
    loaded = "{'torch', 'triton', 'ktonum.auditing.in_process'} & set(sys.modules)"
    test = f"import sys\n\ndef test_mine():\n    assert not {loaded}\n"
    (project / "test_mine.py").write_text(test, encoding="utf-8")
    result = run_process(project)
    assert result.ret == 0
    result.assert_outcomes(passed=1)


# A worker that read these options would find no op, and would refuse the profile.
OTHER_OPTIONS = """
def pytest_cmdline_main(config):
    if hasattr(config, "workerinput"):
        config.option.ktonum = False
        config.option.ktonum_op = ["absent.py:OP"]
        config.option.ktonum_profile = "absent"
"""


def test_workers_take_the_settings_that_were_sent_and_a_crash_is_a_verdict_like_any_other(project: Path) -> None:
    result = _with_workers(project, "exits")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*ERROR: the process died while the candidate ran*"])
    _check_junit(project, tests=4, failed=1)


@pytest.mark.exhaustive
def test_a_worker_that_loses_its_cuda_context_is_replaced(project: Path) -> None:
    result = _with_workers(project, "exits", "poisoned")
    result.assert_outcomes(passed=5, failed=2)
    result.stdout.fnmatch_lines(["*ERROR: the process died while the candidate ran*"])
    result.stdout.fnmatch_lines(["*ERROR: the candidate raised RuntimeError: CUDA error: an illegal memory access*"])
    _check_junit(project, tests=7, failed=2)


def _with_workers(project: Path, *ops: str) -> pytest.RunResult:
    write_ops(project)
    (project / "conftest.py").write_text(OTHER_OPTIONS, encoding="utf-8")
    named = [f"--ktonum-op=throwaway.py:{op}" for op in ops]
    result = run_process(
        project, "-n", "2", "--ktonum", *named, "--ktonum-select", "forward", "--junitxml", "junit.xml", *ON_CPU
    )
    assert result.ret == 1
    return result


def _check_junit(project: Path, *, tests: int, failed: int) -> None:
    junit = (project / "junit.xml").read_text(encoding="utf-8")
    assert junit.count("<testcase") == tests and junit.count("<failure") + junit.count("<error") == failed


def test_items_are_named_on_the_command_line_and_need_no_tests_beside_them(project: Path) -> None:
    (project / "test_mine.py").unlink()
    result = run(project, "--ktonum", "ktonum::right[N=5,M=64]-fp32-cpu::linearity", *ON_CPU)
    assert result.ret == 0
    result.assert_outcomes(passed=1)


def test_a_failure_is_reported_without_our_traceback(project: Path) -> None:
    write_ops(project)
    result = run(project, "--ktonum-only", "--ktonum-op=throwaway.py:wrong", "--ktonum-select=5,M=64", *ON_CPU)
    assert result.ret == 1
    result.assert_outcomes(failed=6, passed=9)
    result.stdout.fnmatch_lines(
        [
            "FAIL: grad_x is wrong",
            "  where grad_x is wrong: everywhere",
            "  grad_x looks like: scaled by *",
            "  or: pytest --ktonum 'ktonum::wrong[[]N=5,M=64]-fp32-cpu::*'",
            "  measured: grad_x/* = 0.05, * times the bound *",
        ]
    )
    assert "pytest_items.py" not in result.stdout.str()
    assert "gradients fails on 1 of 1 case" in result.stdout.str()


def test_inconclusive_is_a_skip_with_its_reason_and_fails_when_strict(project: Path) -> None:
    file = write_ops(project)
    extra = "from ktonum.errors import UsageError\ndef f(x):\n    raise UsageError('never')\npicky_ = op('picky', f)\n"
    file.write_text(file.read_text(encoding="utf-8") + extra, encoding="utf-8")
    asked = ("--ktonum", "--ktonum-op=throwaway.py:picky_", "--ktonum-select=forward", "-rs", *ON_CPU)
    result = run(project, *asked)
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(["SKIPPED*INCONCLUSIVE: the candidate cannot run this case: never*"])
    result = run(project, *asked, "--ktonum-strict")
    result.assert_outcomes(passed=1, failed=3)


@pytest.mark.parametrize(
    ("arguments", "toml", "words"),
    [
        (("--ktonum",), "", "nothing to audit: name ops with --ktonum-op"),
        (("--ktonum",), '[tool.ktonum]\nops = "mykernels.audits"\n', "write a list like"),
        (("--ktonum",), "[tool.ktonum\n", ""),
        (("--ktonum",), '[tool.ktonum]\nops = ["mykernels.absent"]\n', "cannot import 'mykernels.absent'"),
        (("--ktonum",), '[tool.ktonum]\nops = ["mykernels"]\n', "'mykernels' defines no ktonum.Op"),
        (("--ktonum-dtype=fp32",), "", "add --ktonum"),
        (("--ktonum", "--ktonum-profile=slow"), None, "unknown profile 'slow': use quick, full"),
        (("--ktonum", "-n2", "--dist=loadgroup"), None, "use load or worksteal"),
        (("--ktonum", "--ktonum-op=mykernels/audits.py", "--ktonum-op=mykernels.audits"), None, "two ops are called"),
    ],
)
def test_wrong_usage_is_one_clear_error(
    project: Path, arguments: tuple[str, ...], toml: str | None, words: str
) -> None:
    if toml is not None:
        (project / "pyproject.toml").write_text(toml, encoding="utf-8")
    asked = arguments if arguments == ("--ktonum-dtype=fp32",) else (*arguments, "--ktonum-device=cpu")
    result = run(project, *asked)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    error = result.stderr.str()
    assert "ERROR" in error and words in error and "Traceback" not in error


LEASE = """
import json, sys
from pathlib import Path
from ktonum.auditing.gpu_slots import lease_gpu, use_gpu
gpus = ["4", "7"]
lease = lease_gpu(Path(sys.argv[1]), gpus)
use_gpu(lease, gpus)
import os
print(json.dumps([lease.gpu, lease.slot, os.environ["CUDA_VISIBLE_DEVICES"]]), flush=True)
sys.stdin.readline()
"""


def worker(folder: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LEASE, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def leased(process: subprocess.Popen[str]) -> list[object]:
    assert process.stdout is not None
    found: list[object] = json.loads(process.stdout.readline())
    return found


def test_workers_spread_over_gpus_and_a_dead_one_frees_its_own(tmp_path: Path) -> None:
    workers = [worker(tmp_path) for _ in range(4)]
    try:
        slots = [leased(w) for w in workers]
        assert sorted(slots) == [["4", 0, "4"], ["4", 1, "4"], ["7", 0, "7"], ["7", 1, "7"]]
        victim = slots.index(["7", 0, "7"])
        workers[victim].kill()
        workers[victim].wait()
        workers.append(worker(tmp_path))
        assert leased(workers[-1]) == ["7", 0, "7"]
    finally:
        for w in workers:
            w.kill()
            w.communicate()


def test_visible_gpus_keep_the_names_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5f2c")
    assert visible_gpus() == ("3", "GPU-5f2c")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert visible_gpus() == ()
