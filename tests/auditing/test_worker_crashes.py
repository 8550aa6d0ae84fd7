"""The trace that a worker leaves when it dies, and the errors after which its CUDA context is lost.

`tests/cli/test_cli.py` has workers that end, hang and lose their context.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ktonum.auditing.worker_crashes import CrashTrace, context_lost

# The format of faulthandler: the main thread comes last, and extension modules after it.
FATAL = """Fatal Python error: Segmentation fault

Thread 0x00007f01 (most recent call first):
  File "execnet/gateway_base.py", line 411 in read

Current thread 0x00007f02 (most recent call first):
  File "mine.py", line 3 in kernel
  File "mine.py", line 9 in candidate

Extension modules: numpy._core, torch._C (total: 2)
"""


@pytest.mark.parametrize(
    ("text", "cause", "timed_out"),
    [
        (FATAL, "Fatal Python error: Segmentation fault", False),
        (FATAL.replace("Fatal Python error: Segmentation fault", "Timeout (0:00:04)!"), "Timeout (0:00:04)!", True),
    ],
)
def test_a_trace_has_the_cause_and_the_stack_of_the_main_thread(
    tmp_path: Path, text: str, cause: str, timed_out: bool
) -> None:
    (tmp_path / "gw3.trace").write_text(text, encoding="utf-8")
    trace = CrashTrace.read(tmp_path, "gw3")
    assert trace is not None and (trace.cause, trace.timed_out) == (cause, timed_out)
    assert trace.stack.splitlines() == ['  File "mine.py", line 3 in kernel', '  File "mine.py", line 9 in candidate']
    assert trace.text == f"{cause}\n{trace.stack}"


def test_a_worker_that_ended_itself_leaves_no_trace(tmp_path: Path) -> None:
    assert CrashTrace.read(tmp_path, "gw0") is None
    (tmp_path / "gw0.trace").touch()
    assert CrashTrace.read(tmp_path, "gw0") is None


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("ValueError: bad shape", False),
    ],
)
def test_only_errors_that_outlast_their_call_cost_the_process(text: str, lost: bool) -> None:
    assert context_lost(text) is lost
