"""``ktonum doctor``: what this machine has and lacks for audits."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata

from rich.console import Console
from rich.text import Text

__all__ = ["examine"]

_NEEDED = ("ktonum", "torch", "numpy", "scipy", "rich", "typer", "pytest", "pytest-xdist")
_OPTIONAL = {
    "triton": "needed for Triton kernels, such as ktonum's own; pip install triton",
    "jinja2": "needed for --html; pip install 'ktonum[report]'",
    "liger-kernel": "needed for --candidate liger; pip install 'ktonum[peers]'",
    "trl": "needed for --candidate trl; pip install 'ktonum[peers]'",
    "transformers": "needed for --candidate trl; pip install 'ktonum[peers]'",
}
_PROBE_SECONDS = 120


class _Findings:
    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.sound = True

    def add(self, mark: str, text: str) -> None:
        """Print a finding: ``ok``, ``note`` (an audit can do without it) or ``lack`` (an audit needs it)."""
        style = {"ok": "green", "note": "yellow", "lack": "bold red"}[mark]
        self.console.print(Text.assemble((f"{mark:<5}", style), text))
        self.sound = self.sound and mark != "lack"


def examine() -> int:
    """Print what this machine has and lacks.

    Returns:
        0 when an audit can run here, else 1.
    """
    found = _Findings()
    found.add("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _NEEDED:
        version = _version(package)
        found.add("ok" if version else "lack", f"{package} {version or 'is not installed: pip install ktonum'}")
    for package, why in _OPTIONAL.items():
        version = _version(package)
        found.add("ok" if version else "note", f"{package} {version}" if version else f"{package} is missing: {why}")
    gpus = _gpus(found)
    if gpus:
        _compiler(found)
    if _version("triton"):
        _interpreter(found, required=not gpus)
    if os.environ.get("TRITON_INTERPRET") == "1" and gpus:
        found.add("note", "TRITON_INTERPRET=1 is set: audits run on the CPU and use no GPU")
    found.console.print("An audit can run here." if found.sound else "An audit cannot run here: see what it lacks.")
    return 0 if found.sound else 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package == "ktonum":
            from ktonum import __version__

            return f"{__version__} (not installed, imported from its sources)"
        return None


def _gpus(found: _Findings) -> int:
    try:
        import torch
    except Exception as error:  # a broken build of torch raises what it likes
        found.add("lack", f"torch cannot be imported: {type(error).__name__}: {error}")
        return 0
    count = torch.cuda.device_count()
    for index in range(count):
        try:
            p = torch.cuda.get_device_properties(index)
        except RuntimeError as error:
            found.add("lack", f"GPU {index} cannot be used: {str(error).splitlines()[0]}")
            continue
        memory = p.total_memory / 2**30
        found.add("ok", f"GPU {index}: {p.name}, sm_{p.major}{p.minor}, {memory:.0f} GiB, CUDA {torch.version.cuda}")
    if not count:
        found.add("note", "no CUDA device: audits run on the CPU, Triton kernels in Triton's interpreter")
    return count


def _compiler(found: _Findings) -> None:
    """Triton builds a launcher in C for every kernel signature on a GPU."""
    named = os.environ.get("CC")
    compiler = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    if compiler:
        found.add("ok", f"C compiler {compiler}")
    else:
        hint = f"CC={named} was not found" if named else "neither gcc nor clang was found"
        found.add("lack", f"no C compiler, which Triton needs on a GPU: {hint}; install gcc, or name one in CC")


def _interpreter(found: _Findings, *, required: bool) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "ktonum.case.interpreter_selftest"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        found.add("lack" if required else "note", f"Triton's interpreter did not answer within {_PROBE_SECONDS} s")
        return
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        found.add("lack" if required else "note", f"Triton's interpreter does not run: {last}")
        return
    findings = json.loads(done.stdout)
    right = [name for name, sound in findings.items() if sound is True]
    wrong = [name for name, sound in findings.items() if sound is False]
    if right:
        found.add("ok", f"Triton's interpreter is right in: {', '.join(right)}")
    if wrong:
        known = all("bfloat16" in name for name in wrong)
        advice = "kernels that calculate in bfloat16 give wrong results there; upcast after loading, round outside"
        mark = "note" if known or not required else "lack"
        found.add(mark, f"Triton's interpreter is wrong in: {', '.join(wrong)}; {advice}")
