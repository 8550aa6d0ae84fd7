"""The message of a failing `ktonum.assert_within`: what is wrong, where, by which row, and what to do next."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

import ktonum
from ktonum.errors import ToleranceError
from ktonum.tolerances.table_files import find_table
from support.command_line import environment_of_a_user, run_pytest
from support.rounded_oracles import KTO, SUM, gradient, truncated


def test_the_message_says_what_where_by_which_row_and_what_next() -> None:
    expected = gradient(60, 80)
    with pytest.raises(ToleranceError) as caught:
        ktonum.assert_within(actual=truncated(expected), expected=expected, **KTO)
    message = str(caught.value)
    table = find_table("kto")
    assert table is not None
    for part in (
        "kto/grad_weight in bf16 on interpreter: 2 of 3 measures beyond tolerance",
        "BEYOND grad_weight/signed_bias: measured 0.9",
        "rounding_norm",
        "row grad_weight/signed_bias/bf16/interpreter of",
        "kto.toml",
        table.provenance["interpreter"].date,
        "torch 2.",
        "largest of 200 measured errors",
        "at sizes up to B=",
        "actual ",
        "expected ",
        "signed bias -0.2",
        "examine: ktonum audit kto --dtype bf16 --device cpu",
        "where: all elements together: no single element exceeds its bound",
        "pytest tests/tolerances/test_tolerance_messages.py::test_the_message_says",
    ):
        assert part in message
    assert isinstance(caught.value, AssertionError)


def test_the_message_of_a_derived_tolerance_shows_the_derivation() -> None:
    expected = gradient(60, 80)
    with pytest.raises(ToleranceError) as caught:
        ktonum.assert_within(actual=1.01 * expected.float(), expected=expected, operand_roundings=2, **SUM)
    for part in (
        "64 terms, 2 operand roundings and one of fp32",
        "Higham and Mary 2019",
        "there is no table somebody_elses.toml",
        "signed bias +1 % of expected, error norm 1 %",
        "ktonum audit your.module:OP",
    ):
        assert part in str(caught.value)


PLAIN = """
import os

import ktonum
import pytest
import torch


def oracle():
    return torch.randn(30, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def check(actual):
    ktonum.assert_within(
        actual=actual, expected=oracle(), op="mine", output="y", terms=40, dims={"N": 30, "H": 40}
    )


def test_right():
    check(oracle().bfloat16())


@pytest.mark.parametrize("what", ["all of it", "it's a tile"])
def test_wrong(what, tmp_path):
    os.chdir(tmp_path)
    actual = oracle().bfloat16()
    actual[:, 32 if "tile" in what else 0 :] *= 1.25
    check(actual)


if __name__ == "__main__":
    check(1.02 * oracle().bfloat16())
"""


ELSEWHERE = {"PYTEST_ADDOPTS": "-p no:cacheprovider", "TRITON_INTERPRET": "0"}


def _in_a_shell(folder: Path, command: str) -> str:
    """Standard output and errors of a command line, run without the environment of this test session."""
    environment = environment_of_a_user(**ELSEWHERE)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def _here(folder: Path, command: str) -> str:
    """The same for ``cd FOLDER && pytest ARGUMENTS``, in this process."""
    words = shlex.split(command)
    if words[0] == "cd":
        _, target, and_then, *words = words
        assert and_then == "&&"
        folder = folder / target
    assert words[0] == "pytest"
    _, out, err = run_pytest(folder, *words[1:], **ELSEWHERE)
    return out + err


@pytest.mark.parametrize("started_in", ["", "mykernels", "mykernels/tests"])
def test_a_plain_pytest_file_elsewhere_uses_it_and_its_message_reproduces_the_failure(
    tmp_path: Path, started_in: str
) -> None:
    """pytest may be started in any folder; its rootdir is the folder with the configuration."""
    folder = tmp_path / "mykernels" / "tests"
    folder.mkdir(parents=True)
    (tmp_path / "mykernels" / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_plain.py").write_text(PLAIN)
    command = shlex.join(["pytest", "--rootdir", str(tmp_path / "mykernels"), str(folder)])
    out = _here(tmp_path / started_in, command)
    assert "2 failed, 1 passed" in out, out
    for part in (
        "mine/y in bf16 on cpu:",
        "BEYOND y/signed_bias: measured",
        "source of the tolerance: derived for 40 terms",
        "worst element at [",
        "where: the last tile along dim 1 (H), from 32 on",
        "where: everywhere",
    ):
        assert part in out, out
    commands = [
        line.split("reproduce: ")[1] for line in out.splitlines() if line.startswith("E ") and "reproduce: " in line
    ]
    assert len(commands) == 2 and all("tests/test_plain.py::test_wrong[" in c for c in commands), out
    for command in commands:
        # Run the command that is harder to quote in a real shell, once.
        call = _in_a_shell if "tile" in command and not started_in else _here
        again = call(tmp_path, command)
        assert "1 failed" in again and "mine/y in bf16 on cpu:" in again, (command, again)


def test_outside_pytest_the_message_says_where_the_call_is_and_how_to_repeat_it(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    out = _in_a_shell(tmp_path, f"{shlex.quote(sys.executable)} plain.py")
    assert "ToleranceError: mine/y in bf16 on cpu:" in out, out
    line = PLAIN.splitlines().index("    ktonum.assert_within(") + 1
    assert f"reproduce: python plain.py (the call is at {tmp_path / 'plain.py'}:{line}" in out, out


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda a: a[7].mul_(1.5), "row 7"),
        (lambda a: a[:, 9].zero_(), "column 9"),
        (lambda a: a[3, 4].add_(9.0), "element [3, 4]"),
        (lambda a: a[48:].mul_(-1), "the last tile along dim 0 (V), from 48 on"),
        (lambda a: a[32:40, :].fill_(math.nan), "the tile 32 to 39 along dim 0 (V)"),
        (lambda a: a.mul_(1.5), "everywhere"),
    ],
)
def test_the_message_names_row_column_and_tile(change: Callable[[Tensor], Tensor], place: str) -> None:
    expected = gradient(60, 80)
    actual = expected.float()
    change(actual)
    with pytest.raises(ToleranceError) as caught:
        ktonum.assert_within(actual=actual, expected=expected, dims={"V": 60, "H": 80}, **SUM)
    assert f"  where: {place}\n" in str(caught.value)
