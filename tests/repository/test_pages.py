"""The pages for readers: links lead to headings, outputs shown were printed, scripts would write their pages again."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from ktonum.declare.cases import DTYPES
from support.command_line import run_script
from support.repository import ROOT

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("**/*.md")),
]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text("utf-8")
#: A Python file that a page shows, and the output that it shows behind it.
SHOWN = re.findall(
    r"^```python file=(\S+)\n((?:(?!```).*\n)*)```\n\n[^`#\n]+\n\n```text\n((?:(?!```).*\n)*)```$",
    "\n".join(page.read_text("utf-8") for page in PAGES),
    re.MULTILINE,
)


def headings(page: str) -> set[str]:
    """What a link to a heading of the page may have behind its #."""
    without_code = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def lost_links(page: Path, text: str) -> list[str]:
    """Links to headings that do not exist."""
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text)
    return [
        f"{file}#{heading}"
        for file, heading in links
        if heading not in headings((page.parent / file).read_text("utf-8") if file else text)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_headings(page: Path) -> None:
    assert not lost_links(page, page.read_text("utf-8"))


def test_a_link_to_a_heading_that_is_not_there_is_found() -> None:
    text = "# Title\n\n[a](#title) [b](#other) [c](glossary.md#oracle) [d](glossary.md#orakel)\n\n```sh\n# other\n```\n"
    assert lost_links(ROOT / "docs" / "page.md", text) == ["#other", "glossary.md#orakel"]


def test_the_glossary_lists_what_it_explains() -> None:
    table, _, entries = GLOSSARY.partition("\n## ")
    listed = re.findall(r"\[[^]]+\]\(#([^)]+)\)", table)
    explained = re.findall(r"^##+ (.+)$", f"## {entries}", re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == {title.lower().replace(" ", "-") for title in explained}


def missing_from(output: str, shown: str) -> list[str]:
    """Parts of an output shown, between ``...``, that the output lacks; numbers may differ from machine to machine."""

    def masked(text: str) -> str:
        return re.sub(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", "N", text)

    parts = [part.strip() for line in shown.splitlines() for part in line.split("...")]
    return [part for part in parts if masked(part) not in masked(output)]


@pytest.mark.parametrize(("name", "code", "shown"), SHOWN, ids=[name for name, *_ in SHOWN])
def test_the_output_shown_is_printed(name: str, code: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(code, encoding="utf-8")
    status, out, err = run_script(tmp_path / name, tmp_path)
    assert status == 0, out + err
    # In a session that interprets Triton's kernels the device class has that name.
    assert not missing_from(out.replace(" on interpreter", " on cpu"), shown), out


def test_outputs_are_shown_and_another_output_is_noticed() -> None:
    of_readme = {"check_gradient.py", "check_result.py", "compare_tensors.py"}
    assert {name for name, *_ in SHOWN} == of_readme | {"row_dot_audit.py"}
    assert missing_from("gradcheck PASS: off by 3.1e-07, fine", "gradcheck PASS: off by 2e-09 ...\n...\n") == []
    assert missing_from("gradcheck PASS", "gradcheck ... FAIL") == ["FAIL"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The scripts that write whole pages."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return {name: importlib.import_module(name) for name in ("defect_matrix", "count_false_alarms")}


def test_pages_that_scripts_write_are_as_the_scripts_would_write_them(scripts: dict[str, ModuleType]) -> None:
    alarms = scripts["count_false_alarms"]
    blocks = alarms._read(ROOT / "benchmarks" / "results" / "false_alarms.jsonl")
    page = (ROOT / "docs" / "false_alarms.md").read_text("utf-8")
    assert alarms.document([blocks[number] for number in sorted(blocks)]) == page

    def prose(text: str) -> list[str]:
        """Lines that do not hold figures of single defects."""
        return [line for line in text.splitlines() if not re.match(r"\||- .*times the floor$", line)]

    matrix = scripts["defect_matrix"]
    flagged = (True,) * len(matrix.JUDGES)
    rows = [matrix.Row(d.name, dtype, 1.0, 1.0, flagged) for d in matrix.planted_defects() for dtype in DTYPES]
    written = prose((ROOT / "docs" / "defect_matrix.md").read_text("utf-8"))
    assert [line for line in prose(matrix.document(rows, [])) if line] == [line for line in written if line]
