"""What docs/findings.md says of other implementations is still so: each reproduction there ends in an assertion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
REPRODUCTIONS = dict(re.findall(r"^```python file=(\S+)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE))


def test_every_finding_has_a_reproduction_that_asserts_it() -> None:
    assert len(REPRODUCTIONS) == len(re.findall(r"^## \d", PAGE, re.MULTILINE)) >= 6
    assert all("\nassert " in code for code in REPRODUCTIONS.values())


@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_a_reproduction_shows_its_finding(name: str, tmp_path: Path) -> None:
    if "liger" in REPRODUCTIONS[name]:
        pytest.importorskip("liger_kernel")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ".cuda()" not in REPRODUCTIONS[name]:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    elif not torch.cuda.is_available():
        pytest.skip("the finding is about a GPU, and there is none here")
    (tmp_path / name).write_text(REPRODUCTIONS[name], encoding="utf-8")
    done = subprocess.run([sys.executable, name], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
