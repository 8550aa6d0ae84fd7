"""The architecture page names files and rooms that exist, and all of the rooms."""

from __future__ import annotations

import re

from support.layout_rules import KERNELS, LIBRARY
from support.repository import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
#: Where a path on the page may begin.
PLACES = (ROOT, ROOT / "ktonum", ROOT / "kernels", ROOT / "kernels" / "device")


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"(?<![\w*/.])[a-z_]\w*(?:/\w+)*\.py\b", PAGE)) - {"kernels.py", "launch.py"}
    assert len(named) > 40
    assert not {name for name in named if not any((place / name).is_file() for place in PLACES)}


def test_every_room_is_in_the_table_in_the_order_of_imports() -> None:
    rows = re.findall(r"^\| (`[^|]*`) \|", PAGE.partition("| `ktonum/` |")[2], re.MULTILINE)
    rooms = [re.sub(r"(\.py|/)$", "", name) for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert rooms == [*LIBRARY[:-1], "kernels", *KERNELS], "__main__ only calls cli"
