"""The README and docs are true: their code and commands run, and their links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.command_line import ROOT, run, run_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("**/*.md")),
]
SHOWN = re.findall(r"^ktonum bench .*--show .*$", "\n".join(page.read_text("utf-8") for page in PAGES), re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the rest of its first line, and its text."""

    language: str
    title: str
    text: str


BLOCKS = [Block(*m) for m in re.findall(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", README, re.MULTILINE)]
FILES = {b.title.removeprefix("file="): b.text for b in BLOCKS if b.language == "python"}
COMMANDS = [
    line.partition("#")[0].strip() for b in BLOCKS if b.language == "sh" for line in b.text.splitlines() if line.strip()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the README shows."""
    made = tmp_path_factory.mktemp("readme")
    for name, text in FILES.items():
        (made / name).write_text(text, encoding="utf-8")
    return made


def run_command(folder: Path, command: str, *more: str) -> str:
    """The output of a command of the README, which must succeed, in this process."""
    name, *arguments = shlex.split(command)
    assert name == "ktonum"
    status, out, err = run(folder, *arguments, *more)
    assert status == 0, out + err
    return out


@pytest.mark.parametrize("name", FILES)
def test_code_runs(name: str, folder: Path) -> None:
    status, out, err = run_script(folder / name, folder)
    assert status == 0, out + err
    if name == "check_gradient.py":
        assert "1e-07" in out or "e-07" in out, "the gradient that is 5e-7 off was not reported"
    if name == "compare_tensors.py":
        assert -0.004 < float(out) < -0.002, out


# Without workers, each of which would import torch. `test_cli` and `test_calibrate_command` compare the two ways.
HERE = ("-n", "0")


def test_the_audit_command_and_the_gate(folder: Path) -> None:
    audit, gate = (next(c for c in COMMANDS if c.startswith(f"ktonum {name}")) for name in ("audit", "gate"))
    run_command(folder, audit, *HERE)
    (folder / "baseline.json").write_bytes((folder / "report.json").read_bytes())
    assert "The gate passes" in run_command(folder, gate)


def test_the_calibrate_command(folder: Path) -> None:
    (command,) = (c for c in COMMANDS if c.startswith("ktonum calibrate"))
    run_command(folder, command, *HERE)
    assert (folder / "rms_norm.toml").is_file()


@pytest.mark.parametrize("command", SHOWN)
def test_results_are_shown_again(command: str, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    out = run_command(tmp_path, command)
    assert "8 x 1024" in out and "GiB" in out


def test_the_readme_has_the_figures_of_the_results() -> None:
    """Each row of its table: times, memory and errors as `ktonum bench` wrote them."""
    document = json.loads((ROOT / "benchmarks" / "results" / "h100-goals.json").read_text("utf-8"))
    by_case = {r["case"]["name"]: {m["contender"]: m for m in r["measured"]} for r in document["results"]}
    full, masked = by_case["8 x 1024"], by_case["half masked"]
    for name, m in full.items():
        cells = [f"{m['milliseconds']:.1f} ms", f"{masked[name]['milliseconds']:.1f} ms"]
        if m["peak_bytes"] is not None:
            cells += [f"{m['peak_bytes'] / 2**30:.2f} GiB"]
            cells += [f"{m['errors'][k]:.1e}".replace("e-0", "e-") for k in ("loss", "gradient")]
        assert " | ".join(cells) in README.replace("**", ""), (name, cells)


def test_the_output_shown_is_of_todays_audit() -> None:
    """The numbers of cases, checks and verdicts that it shows are those of an audit today."""
    from ktonum.auditing.in_process import audit_items
    from ktonum.declare.cases import DTYPES
    from ktonum.kernels.audit.kto_op import OP

    items = audit_items(OP, profile="quick", dtypes=tuple(DTYPES), device="cpu")
    cases = len({case.name for case, _ in items})
    _, heading, shown = README.partition(f"{cases} cases, {len(items)} checks")
    assert heading
    closing = re.search(r"^The audit passes: (\d+) passed(?:, (\d+) INCONCLUSIVE)?\. [\d.]+ s\.$", shown, re.MULTILINE)
    assert closing is not None and sum(int(n or 0) for n in closing.groups()) == len(items)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken
    named = re.findall(r"`(?:python )?((?:benchmarks|kernels|ktonum|tests|docs)/[\w/.-]+)", page.read_text("utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]
