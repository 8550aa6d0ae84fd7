"""Samples are kept as long as no source file changes that their errors may depend on. These files are computed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ktonum.calibrate.source_closure import source_closure

PACKAGE = {
    "__init__.py": "from made_up import public\n",
    "public.py": "import made_up.op\n",
    "op.py": "from made_up.inner import kernel\nimport json\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
    "    from made_up import types\n",
    "types.py": "",
    "unused.py": "",
    "inner/__init__.py": "from .names import NAMES\n",
    "inner/names.py": "NAMES = ()\n",
    "inner/kernel.py": "def late():\n    from .. import rounding\n    return rounding\n",
    "rounding.py": "from made_up.op import rounded  # a circle\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in PACKAGE.items():
        file = tmp_path / "made_up" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text if name != "__init__.py" else "", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path / "made_up"


def test_it_holds_what_is_imported_and_nothing_else(package: Path) -> None:
    found = source_closure(["made_up.op"])
    assert list(found) == [
        "made_up", "made_up.inner", "made_up.inner.kernel", "made_up.inner.names", "made_up.op", "made_up.rounding"
    ]  # fmt: skip
    assert found["made_up.inner.kernel"] == package / "inner" / "kernel.py"


def test_a_public_face_is_not_followed(package: Path) -> None:
    (package / "__init__.py").write_text(PACKAGE["__init__.py"], encoding="utf-8")
    assert "made_up.public" not in source_closure(["made_up.rounding"])


def test_what_measures_holds_the_files_that_a_list_by_hand_had_missed() -> None:
    found = source_closure(["ktonum.calibrate.block_errors"])
    assert {
        "ktonum.measure.over_draws",
        "ktonum.declare.op",
        "ktonum.declare.tensor_copies",
        "ktonum.measure.against_bound",
    } <= set(found)
    # If the way in which results are shown changes, samples need not be measured again.
    assert not [name for name in found if name.startswith(("ktonum.report", "ktonum.cli", "ktonum.kernels"))]
