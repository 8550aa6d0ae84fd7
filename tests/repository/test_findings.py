"""The findings of docs/findings.md about other implementations still hold: each reproduction there is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.command_line import run_script
from support.repository import ROOT

PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
REPRODUCTIONS = dict(re.findall(r"^```python file=(\S+)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE))


@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_a_reproduction_shows_its_finding(name: str, tmp_path: Path) -> None:
    if "liger" in REPRODUCTIONS[name]:
        pytest.importorskip("liger_kernel")
    (tmp_path / name).write_text(REPRODUCTIONS[name], encoding="utf-8")
    if ".cuda()" not in REPRODUCTIONS[name]:
        _run_in_the_interpreter(tmp_path / name)
    elif torch.cuda.is_available():
        _run_here(tmp_path / name)
    else:
        pytest.skip("the finding is about a GPU, and there is none here")


def _run_in_the_interpreter(script: Path) -> None:
    """Run the script in this process if its kernels are interpreted anyway, else in a new one. It must succeed."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        _run_here(script)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, script.name], cwd=script.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _run_here(script: Path) -> None:
    status, out, err = run_script(script, script.parent)
    assert status == 0, out + err
