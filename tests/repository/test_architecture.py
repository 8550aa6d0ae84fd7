"""The architecture page names files and rooms that exist, and all of the rooms; tests keep to public names."""

from __future__ import annotations

import ast
import re

from support.layout_rules import KERNELS, LIBRARY
from support.repository import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
#: Where a path on the page may begin.
PLACES = (ROOT, ROOT / "ktonum", ROOT / "kernels", ROOT / "kernels" / "device")


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"(?<![\w*/.])[a-z_]\w*(?:/\w+)*\.py\b", PAGE)) - {"kernels.py", "launch.py"}
    assert named
    assert not {name for name in named if not any((place / name).is_file() for place in PLACES)}


def test_every_room_is_in_the_table_in_the_order_of_imports() -> None:
    rows = re.findall(r"^\| (`[^|]*`) \|", PAGE.partition("| `ktonum/` |")[2], re.MULTILINE)
    rooms = [re.sub(r"(\.py|/)$", "", name) for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert rooms == [*LIBRARY[:-1], "kernels", *KERNELS], "__main__ only calls cli"


#: Test files that still patch a private name.
PATCHING = {"test_comparison.py", "test_defects.py", "test_signatures.py", "test_tolerances.py"}


def test_no_test_patches_a_private_name() -> None:
    """A limit that a test changes is a parameter. What a test counts is recorded by `ktonum.kernels.device.trace`."""

    def patched(source: str) -> list[str]:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        setting = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "setattr"]
        values = [getattr(argument, "value", None) for call in setting for argument in call.args[:2]]
        names = [value.rpartition(".")[2] for value in values if isinstance(value, str)]
        return [name for name in names if name.startswith("_") and not name.startswith("__")]

    assert patched('monkeypatch.setattr(a, "_B", 1)\nmonkeypatch.setattr("a.b._C", 1)') == ["_B", "_C"]
    assert not patched('monkeypatch.setattr(a, "B", "_C")\nmonkeypatch.setattr(A, "__init__", 1)')
    files = [path for path in (ROOT / "tests").rglob("*.py") if path.name not in PATCHING]
    assert not {path.name: found for path in files if (found := patched(path.read_text("utf-8")))}
