"""The rules of `layout_rules` hold, and find what breaks them; what loads first loads alone."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import pytest

import ktonum
import ktonum.kernels
from support.layout_rules import BANS, KERNELS, LIBRARY, MAX_LINES, sources, violations
from support.repository import ROOT


def test_the_layout_holds() -> None:
    assert len(sources(ROOT)) > 10, "the walk found too few files to mean anything"
    assert not (found := violations(ROOT)), "\n".join(found)


def test_every_listed_room_is_there_and_few_files_are_in_none() -> None:
    files = sources(ROOT)
    for package, rooms in (("ktonum", LIBRARY), ("ktonum.kernels", KERNELS)):
        modules = {source.module for source in files}
        assert not [name for name in rooms if f"{package}.{name}" not in modules]
    for folder in ("ktonum", "kernels"):
        assert len(list((ROOT / folder).glob("*.py"))) <= 15


def test_no_folder_of_tests_is_taken_for_another_package() -> None:
    """tests/ is on ``sys.path``: a folder ``kernels`` there would be a package that transformers probes for."""
    assert not (ROOT / "tests" / "kernels").exists()


LEGAL = {
    "ktonum/__init__.py": '"""Names."""\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n'
    "    from ktonum.declare.op import Op as Op\n",
    "ktonum/errors.py": "class KtonumError(Exception):\n    pass\n",
    "ktonum/bounds/formats.py": "import torch\n",
    "ktonum/bounds/standards.py": "import torch\nfrom ktonum.bounds.formats import spacing\n",
    "ktonum/declare/cases.py": "from ktonum.errors import KtonumError\n\ndef dtype():\n    import torch\n",
    "ktonum/declare/op.py": "import torch\nfrom ktonum.declare import cases\n",
    "ktonum/measure/comparison.py": "import torch\nfrom ktonum.bounds.formats import spacing\n",
    "ktonum/measure/probe.py": "def interpreter():\n    import triton\n",
    "ktonum/gradient_check/differences.py": "import torch\n",
    "ktonum/gradient_check/verdict.py": "from ktonum.gradient_check import differences\n",
    "ktonum/checks/__init__.py": '"""Checks."""\nfrom ktonum.checks import forward, gradients\n',
    "ktonum/checks/check.py": "from ktonum.measure.probe import interpreter\n",
    "ktonum/checks/forward.py": "from ktonum.checks.check import interpreter\n",
    "ktonum/checks/gradients.py": "from ktonum.measure.comparison import compare\n",
    "ktonum/tolerances/tables.py": "",
    "ktonum/pytest_plugin.py": "from ktonum.errors import KtonumError\n",
    "ktonum/cli/command_line.py": "from ktonum import __version__\nfrom ktonum.checks import CHECKS\n",
    "ktonum/ready_ops/__init__.py": '"""Ops."""\nSHIPPED = {"kto": "ktonum.kernels.audit.kto_op:OP"}\n',
    "kernels/__init__.py": '"""Names."""\n',
    "kernels/contract/formula.py": "import torch\nfrom ktonum.errors import KtonumError\n",
    "kernels/device/logits/kernels.py": "import triton\n",
    "kernels/device/logits/launch.py": "import triton\nfrom ktonum.kernels.device.logits import kernels\n",
    "kernels/audit/kto_op.py": "import ktonum\nfrom ktonum.declare.op import Op\n"
    "from ktonum.kernels.device.logits import launch\n",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for folder in {path.parent for path in root.rglob("*.py")}:
        if not (folder / "__init__.py").exists():
            (folder / "__init__.py").write_text('"""A room."""\n', encoding="utf-8")
    (root / "ktonum" / "kernels").symlink_to("../kernels")
    return root


def test_a_lawful_tree_is_not_accused(tmp_path: Path) -> None:
    assert violations(plant(tmp_path, LEGAL)) == []


@pytest.mark.parametrize(
    ("path", "text", "why"),
    [
        ("ktonum/declare/cases.py", "from ktonum.measure.probe import Probe", "rooms above it"),
        ("ktonum/declare/cases.py", "from ktonum.measure import probe", "rooms above it"),
        ("ktonum/declare/cases.py", "from ..measure import probe", "rooms above it"),
        ("ktonum/declare/cases.py", "def late():\n    from ktonum.measure.probe import Probe", "rooms above it"),
        ("ktonum/declare/cases.py", "if TYPE_CHECKING:\n    from ktonum.measure.probe import Probe", "rooms above it"),
        ("ktonum/declare/op.py", "from ktonum import Case", "rooms above it"),
        ("ktonum/declare/op.py", "import ktonum", "rooms above it"),
        ("ktonum/declare/op.py", "from ktonum.checks import CHECKS", "rooms above it"),
        ("ktonum/checks/forward.py", "from ktonum.checks.gradients import check", "checks do not import each other"),
        ("ktonum/checks/forward.py", "from ktonum.checks import gradients", "checks do not import each other"),
        ("ktonum/checks/forward.py", "from ..checks.gradients import check", "checks do not import each other"),
        ("ktonum/power/row_defects.py", "from ktonum.power import tile_defects", "defects do not import each other"),
        ("ktonum/measure/comparison.py", "from ktonum.bounds import bound", "knows no threshold"),
        ("ktonum/measure/comparison.py", "from ktonum.bounds.standards import ErrorBound", "knows no threshold"),
        ("ktonum/measure/comparison.py", "from ktonum.tolerances import tables", "rooms above it"),
        ("ktonum/gradient_check/differences.py", "import torch\nx = torch.autograd.grad", "oracle of autograd"),
        ("ktonum/gradient_check/differences.py", "from torch.autograd import grad", "oracle of autograd"),
        ("ktonum/gradient_check/differences.py", "from torch import autograd", "oracle of autograd"),
        ("ktonum/declare/cases.py", "import torch", "whether torch is needed"),
        (
            "ktonum/pytest_plugin.py",
            "try:\n    from torch import Tensor\nexcept ImportError:\n    pass",
            "whether torch",
        ),
        ("ktonum/declare/op.py", "class A:\n    import triton.language as tl", "where Triton is absent"),
        ("ktonum/cli/command_line.py", "import ktonum.kernels.audit.kto_op", "knows no kernels"),
        ("ktonum/cli/command_line.py", "def run():\n    from ktonum import kernels", "knows no kernels"),
        ("ktonum/auditing/judge.py", "OP = 'ktonum.kernels.audit.kto_op:OP'", "names ktonum.kernels.audit.kto_op:OP"),
        ("kernels/contract/formula.py", "from ktonum.measure.comparison import compare", "of ktonum only errors"),
        ("kernels/contract/formula.py", "from ktonum.kernels.device.logits import launch", "rooms above it"),
        ("kernels/contract/formula.py", "from kernels.device import launch", "another package"),
        ("kernels/contract/formula.py", "def f():\n    import triton", "plain PyTorch"),
        ("kernels/device/logits/kernels.py", "import torch", "device code alone"),
        ("kernels/audit/kto_op.py", "from ktonum.kernels import FusedLinearKTOLoss", "rooms above it"),
        ("kernels/novelty.py", "", "is in no room"),
        ("ktonum/novelty/thing.py", "", "is in no room"),
        ("ktonum/declare/__init__.py", "", "what the room is for"),
        ("ktonum/checks/check_utils.py", "", "grab bag"),
        ("ktonum/checks/helpers.py", "", "grab bag"),
        ("ktonum/cli/command_line.py", "x = 1\n" * (MAX_LINES + 1), "one concern a file"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, text: str, why: str) -> None:
    found = violations(plant(tmp_path, {"ktonum/power/tile_defects.py": "", **LEGAL, path: text}))
    assert found
    # A room that is not listed is accused with all its files.
    assert all(f.startswith((f"{path}:", f"{Path(path).parent}/__init__.py:")) for f in found)
    assert any(why in f for f in found), found


def test_a_circle_inside_a_room_is_found_once(tmp_path: Path) -> None:
    circle = {
        "ktonum/gate/decision.py": "def late():\n    from ktonum.gate import pairing\n",
        "ktonum/gate/pairing.py": "from ktonum.gate.report_reading import read\n",
        "ktonum/gate/report_reading.py": "from ktonum.gate.decision import decide\n",
    }
    (found,) = violations(plant(tmp_path / "closed", LEGAL | circle))
    assert found == (
        "ktonum/gate/decision.py:2 imports in a circle: ktonum.gate.decision imports ktonum.gate.pairing "
        "imports ktonum.gate.report_reading imports ktonum.gate.decision"
    )
    assert violations(plant(tmp_path / "open", LEGAL | circle | {"ktonum/gate/report_reading.py": ""})) == []


def python(code: str, cwd: Path) -> str:
    """What ``code`` prints in a process that has imported nothing yet, away from the repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_plugin_loads_without_torch(tmp_path: Path) -> None:
    banned = [ban.who for ban in BANS if ban.on_import_only and "torch" in ban.what]
    modules = [
        "ktonum.kernels",
        *(s.module for s in sources(ROOT) if any(fnmatchcase(s.module, who) for who in banned)),
    ]
    code = (
        f"import sys, {', '.join(modules)}\nprint(sorted({{'torch', 'triton', 'numpy', 'scipy'}} & set(sys.modules)))"
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


@pytest.mark.parametrize("package", [ktonum, ktonum.kernels], ids=lambda package: package.__name__)
def test_every_public_name_loads(package: ModuleType) -> None:
    names = [name for name in package.__all__ if name != "__version__"]
    assert names and all(hasattr(package, name) for name in names)
    with pytest.raises(
        AttributeError, match=f"module '{package.__name__}' has no attribute 'novelty'; it has .*{names[0]}"
    ):
        _ = package.novelty
