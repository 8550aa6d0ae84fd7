"""The rules of `layout_rules` hold, and find what breaks them; what loads first loads alone."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from layout_rules import MAX_LINES, ROOT, sources, violations

import ktonum


def test_the_layout_holds() -> None:
    assert len(sources(ROOT)) > 10, "the walk found too few files to mean anything"
    assert not (found := violations(ROOT)), "\n".join(found)


LEGAL = {
    "ktonum/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ktonum.op import Op as Op\n",
    "ktonum/errors.py": "class KtonumError(Exception):\n    pass\n",
    "ktonum/cases.py": "from ktonum.errors import KtonumError\n\ndef dtype():\n    import torch\n",
    "ktonum/comparison.py": "import torch\nfrom ktonum import cases\n",
    "ktonum/bounds.py": "import torch\n",
    "ktonum/differences.py": "import torch\n",
    "ktonum/op.py": "import torch\nSHIPPED = {'kto': 'ktonum.kernels.kto_op:OP'}\n",
    "ktonum/probe.py": "def interpreter():\n    import triton\n",
    "ktonum/checks/__init__.py": "from ktonum.checks import forward, gradients\n",
    "ktonum/checks/forward.py": "from ktonum.probe import interpreter\n",
    "ktonum/checks/gradients.py": "from ktonum.compare import compare\n",
    "ktonum/cli.py": "from ktonum import __version__\nfrom ktonum.checks import CHECKS\n",
    "kernels/__init__.py": "",
    "kernels/formula.py": "import torch\nfrom ktonum.errors import KtonumError\n",
    "kernels/logits_kernels.py": "import triton\n",
    "kernels/launch.py": "import triton\nfrom ktonum.kernels.logits_kernels import logits_kernel\n",
    "kernels/kto_op.py": "import ktonum\nfrom ktonum.op import Op\nfrom ktonum.kernels import launch\n",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "ktonum" / "kernels").symlink_to("../kernels")
    return root


def test_a_lawful_tree_is_not_accused(tmp_path: Path) -> None:
    assert violations(plant(tmp_path, LEGAL)) == []


@pytest.mark.parametrize(
    ("path", "text", "why"),
    [
        ("ktonum/cases.py", "from ktonum.op import Op", "point down only"),
        ("ktonum/cases.py", "from ktonum import op", "point down only"),
        ("ktonum/cases.py", "from . import op", "point down only"),
        ("ktonum/cases.py", "from .op import Op", "point down only"),
        ("ktonum/cases.py", "def late():\n    from ktonum.op import Op", "point down only"),
        ("ktonum/cases.py", "if TYPE_CHECKING:\n    from ktonum.op import Op", "point down only"),
        ("ktonum/op.py", "from ktonum import Case", "point down only"),
        ("ktonum/op.py", "import ktonum", "point down only"),
        ("ktonum/checks/forward.py", "from ktonum.checks.gradients import check", "point down only"),
        ("ktonum/checks/forward.py", "from ktonum.checks import gradients", "point down only"),
        ("ktonum/checks/forward.py", "from ..checks.gradients import check", "point down only"),
        ("ktonum/comparison.py", "from ktonum.bounds import bound", "knows no threshold"),
        ("ktonum/comparison.py", "from ktonum import tables", "point down only"),
        ("ktonum/differences.py", "import torch\nx = torch.autograd.grad", "oracle of autograd"),
        ("ktonum/differences.py", "from torch.autograd import grad", "oracle of autograd"),
        ("ktonum/differences.py", "from torch import autograd", "oracle of autograd"),
        ("ktonum/cases.py", "import torch", "whether torch is needed"),
        (
            "ktonum/pytest_plugin.py",
            "try:\n    from torch import Tensor\nexcept ImportError:\n    pass",
            "whether torch",
        ),
        ("ktonum/op.py", "class A:\n    import triton.language as tl", "where Triton is absent"),
        ("ktonum/cli.py", "import ktonum.kernels.kto_op", "knows no kernels"),
        ("ktonum/cli.py", "def run():\n    from ktonum import kernels", "knows no kernels"),
        ("ktonum/runner.py", "OP = 'ktonum.kernels.kto_op:OP'", "names ktonum.kernels.kto_op:OP"),
        ("kernels/formula.py", "from ktonum.compare import compare", "of ktonum only errors"),
        ("kernels/formula.py", "from ktonum.kernels.launch import launch", "point down only"),
        ("kernels/formula.py", "from kernels.launch import launch", "another package"),
        ("kernels/formula.py", "def f():\n    import triton", "plain PyTorch"),
        ("kernels/logits_kernels.py", "import torch", "device code alone"),
        ("kernels/kto_op.py", "from ktonum.kernels import FusedLinearKTOLoss", "point down only"),
        ("kernels/novelty.py", "", "has no place in ORDER"),
        ("ktonum/checks/check_utils.py", "", "grab bag"),
        ("ktonum/helpers/__init__.py", "", "grab bag"),
        ("ktonum/cli.py", "x = 1\n" * (MAX_LINES + 1), "one concern a file"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, text: str, why: str) -> None:
    found = violations(plant(tmp_path, {"ktonum/tables.py": "", **LEGAL, path: text}))
    assert found
    assert all(f.startswith(f"{path}:") for f in found)
    assert any(why in f for f in found), found


def python(code: str, cwd: Path) -> str:
    """What ``code`` prints in a process that has imported nothing yet, away from the repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_plugin_loads_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, ktonum, ktonum.pytest_plugin, ktonum.results, ktonum.cases, ktonum.kernels\n"
        "print(sorted({'torch', 'triton', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    assert python(code, tmp_path) == "[]"


def test_the_numerics_library_loads_without_triton(tmp_path: Path) -> None:
    modules = [s.module for s in sources(ROOT) if not s.in_kernels]
    code = (
        "import importlib, sys\n"
        "sys.modules['triton'] = None\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "print([m for m in sys.modules if m.startswith(('ktonum.kernels', 'kernels'))])"
    )
    assert python(code, tmp_path) == "[]"


def test_no_module_takes_the_name_of_a_public_function() -> None:
    """Importing a module binds it in its package: a module ``ktonum.gradcheck`` would replace the function."""
    modules = {m.name for m in pkgutil.iter_modules(ktonum.__path__)}
    assert not modules & set(ktonum.__all__)
    assert all(callable(getattr(ktonum, name)) for name in ("audit", "compare", "gradcheck"))
