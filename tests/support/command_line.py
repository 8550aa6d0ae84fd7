"""Runs ``ktonum``, pytest and scripts as commands, in this process or in a new one.

A new process costs seconds before it does anything, because it imports torch. In this process a command starts with the
modules that earlier tests have imported. A test about imports, crashes or signals therefore needs a new process.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ktonum.cli import command_line as cli
from ktonum.results import Report
from support.repository import ROOT
from support.throwaway_ops import write_ops

__all__ = ["ROOT", "audit", "environment_of_a_user", "run", "run_process", "run_pytest", "run_script", "start"]

#: Exit status, standard output, standard error.
Ended = tuple[int, str, str]


def environment_of_a_user(**changes: str) -> dict[str, str]:
    """This session's environment, without the variables that pytest and an audit add."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "KTONUM_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """``ktonum ARGUMENTS`` in a new process, which has its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "ktonum", *arguments],
        cwd=folder,
        env=environment_of_a_user(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_interruptions,
    )


def _heed_interruptions() -> None:
    """Needed because a test session in the background of a shell ignores SIGINT, and its processes inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_process(folder: Path, *arguments: str, **environment: str) -> Ended:
    """``ktonum ARGUMENTS`` in a new process, until it ends."""
    process = start(folder, *arguments, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def run(folder: Path, *arguments: str, **environment: str) -> Ended:
    """``ktonum ARGUMENTS`` in this process. Afterwards the process is as before."""
    return _here(folder, lambda: cli.main(arguments), environment)


def audit(folder: Path, op: str, *arguments: str, **environment: str) -> tuple[int, str, str, Report]:
    """Audit a throwaway op on the CPU in fp32; status, output, errors and the report."""
    write_ops(folder)
    common = ("--device", "cpu", "--dtype", "fp32", "--json", "report.json")
    status, out, err = run(folder, "audit", f"throwaway.py:{op}", *common, *arguments, **environment)
    return status, out, err, Report.from_json(folder / "report.json")


def run_pytest(folder: Path, *arguments: str, **environment: str) -> Ended:
    """``pytest ARGUMENTS`` in this process. Afterwards the process is as before."""
    return _here(folder, lambda: sys.exit(pytest.main(list(arguments))), environment)


def run_script(script: Path, folder: Path, **environment: str) -> Ended:
    """``python SCRIPT`` in this process. Afterwards the process is as before."""

    def call() -> None:
        sys.path.insert(0, str(script.parent))
        sys.argv[:] = [str(script)]
        runpy.run_path(str(script), run_name="__main__")

    return _here(folder, call, environment)


def _here(folder: Path, call: Callable[[], None], environment: dict[str, str]) -> Ended:
    status: Any = 0
    with _put_back(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        os.chdir(folder)
        kept = environment_of_a_user(**environment)
        os.environ.clear()
        os.environ.update(kept)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                call()
            except SystemExit as ended:
                status = ended.code
                if isinstance(status, str):  # as the interpreter does with one
                    sys.stderr.write(f"{status}\n")
                    status = 1
    return int(status or 0), out.getvalue(), err.getvalue()


@contextlib.contextmanager
def _put_back(folder: Path) -> Iterator[None]:
    """Undoes what a command changes in its process, and unloads modules that it has loaded from ``folder``."""
    # Before the environment changes: when Triton is imported, the environment decides whether it interprets kernels.
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
    there, path, variables, threads = Path.cwd(), list(sys.path), dict(os.environ), torch.get_num_threads()
    bytecode, finders, modules = sys.dont_write_bytecode, list(sys.meta_path), dict(sys.modules)
    words = list(sys.argv)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A test may write a file twice within a second. If its size stays, Python takes the old bytecode for up to date.
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        os.chdir(there)
        os.environ.clear()
        os.environ.update(variables)
        sys.argv[:], sys.path[:], sys.meta_path[:], sys.dont_write_bytecode = words, path, finders, bytecode
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name, module in list(sys.modules.items()):
            if module is not modules.get(name) and _is_in(module, folder.resolve()):
                del sys.modules[name]
        sys.modules.update({n: m for n, m in modules.items() if n not in sys.modules})


def _is_in(module: Any, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).resolve().is_relative_to(folder)
