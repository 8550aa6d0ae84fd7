"""The files that are shipped, the versions that are tested, and the commands that install and run ktonum."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.repository import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
#: The commands of ./run that the pages at the root show.
DOCUMENTED = sorted(
    set(re.findall(r"^\./run \w.*?(?= *(?:#.*)?$)", "\n".join(p.read_text("utf-8") for p in ROOT.glob("*.md")), re.M))
)
#: The package of each folder that pyproject.toml ships under another name.
MAPPED: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
#: Where each folder of the repository is in a wheel.
FOLDERS = {"ktonum": "ktonum", **{folder: package.replace(".", "/") for package, folder in MAPPED.items()}}


def pins(text: str) -> dict[str, str]:
    """The versions in a constraints file, by normalised name. Fails on a line that does not pin one exact version."""
    found: dict[str, str] = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"{line!r} is not an exact public version: write name==version"
        found[canonicalize_name(match[1])] = match[2]
    return found


def shipped_files() -> set[str]:
    """Every file in the packages' folders, as the path that it must have in a wheel."""
    found = set()
    for folder, target in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            inner = path.relative_to(ROOT / folder)
            linked = any((ROOT / folder / parent).is_symlink() for parent in (inner, *inner.parents))
            if path.is_file() and not linked and "__pycache__" not in inner.parts and not inner.name.startswith("."):
                found.add(f"{target}/{inner.as_posix()}")
    return found


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A wheel, an sdist, and a wheel made from that sdist; without build isolation, so nothing is downloaded."""
    pytest.importorskip("setuptools", minversion="77", reason="the build backend is not installed")
    work = tmp_path_factory.mktemp("build")
    tree = work / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    wheel, sdist = build("wheel", tree, work / "wheel"), build("sdist", tree, work / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    return Built(wheel, sdist, build("wheel", unpacked, work / "wheel_of_sdist"))


def build(kind: str, tree: Path, target: Path) -> Path:
    """Call the backend's hook as pip would, in ``tree``."""
    target.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = target.iterdir()
    return result


def members(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]


def test_pyproject_lists_every_package() -> None:
    """By hand, because setuptools cannot find packages that are shipped under another name than their folder's."""
    folders = {Path(file).parent for file in shipped_files() if file.endswith("/__init__.py")}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(".".join(folder.parts) for folder in folders)


def test_the_wheel_holds_every_file_once_and_nothing_else(built: Built) -> None:
    assert sorted(members(built.wheel)) == sorted(shipped_files())


def test_the_sdist_makes_the_same_wheel_and_holds_the_kernels_once(built: Built) -> None:
    assert sorted(members(built.wheel_of_sdist)) == sorted(members(built.wheel))
    with tarfile.open(built.sdist) as archive:
        names = [m.name.partition("/")[2] for m in archive.getmembers()]
        assert not [m.name for m in archive.getmembers() if m.issym() or m.islnk()]
    assert "kernels/__init__.py" in names
    assert not [n for n in names if n.startswith(("ktonum/kernels", "ktonum/tolerance_tables"))]
    assert len(names) == len(set(names))


def test_the_wheel_declares_the_plugin_the_command_and_triton(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        entry_points = archive.read(names["entry_points.txt"]).decode()
        metadata = archive.read(names["METADATA"]).decode()
    assert "[pytest11]\nktonum = ktonum.pytest_plugin" in entry_points
    assert "[console_scripts]\nktonum = ktonum.cli:main" in entry_points
    assert re.search(r'^Requires-Dist: triton>=.*sys_platform == "linux"', metadata, re.MULTILINE)


def test_the_kernels_import_from_the_wheel_alone(built: Built, tmp_path: Path) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(tmp_path)
    imports = "import ktonum.kernels.contract.formula, ktonum.tolerance_tables as t"
    code = f"{imports}; print(ktonum.kernels.__file__, t.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    package = tmp_path / "ktonum"
    assert done.stdout.split() == [str(package / n / "__init__.py") for n in ("kernels", "tolerance_tables")], (
        done.stderr
    )


def test_the_installed_kernels_have_one_name() -> None:
    """A top-level `kernels` would be taken for another package, by transformers among others."""
    spec = find_spec("kernels")
    assert spec is None or Path(str(spec.origin)).resolve().parent != ROOT / "kernels"


def test_the_symlinks_point_at_the_mapped_folders() -> None:
    for package, folder in MAPPED.items():
        link = ROOT / package.replace(".", "/")
        assert link.is_symlink()
        assert os.readlink(link) == f"../{folder}"


def test_constraints_pin_every_requirement_but_triton() -> None:
    pinned = pins(CONSTRAINTS)
    assert "triton" not in pinned, "a GPU build of torch brings its own triton"
    project = PROJECT["project"]
    listed = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    requirements = [r for r in map(Requirement, listed) if r.name not in ("ktonum", "triton")]
    assert requirements
    for requirement in requirements:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"constraints.txt pins {version} against {requirement}"


@pytest.mark.parametrize("line", ["torch>=2.13", "torch==2.13.0+cpu", "torch", "--find-links wheels", "torch==2.*"])
def test_a_line_that_pins_no_public_version_is_refused(line: str) -> None:
    with pytest.raises(AssertionError, match="exact public version"):
        pins(f"numpy==2.0  # why\n{line}\n")


def second_versions(hooks: str, pinned: dict[str, str]) -> list[str]:
    """Versions in a pre-commit configuration that differ from the pins, and hooks that do not use ./run."""
    found = []
    for name, version in re.findall(r"([\w-]+)==([\w.]+)", hooks):
        if pinned.get(canonicalize_name(name)) != version:
            found.append(f"{name}=={version}")
    for name, version in re.findall(r"repo:\s*\S*/(?:mirrors-)?(\w+?)(?:-pre-commit)?\s+rev:\s*v?(\S+)", hooks):
        if pinned.get(canonicalize_name(name)) != version:
            found.append(f"{name} {version}")
    return found + [e for e in re.findall(r"^\s*entry:\s*(.+)$", hooks, re.MULTILINE) if not e.startswith("./run ")]


def test_hooks_run_at_the_versions_of_continuous_integration() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert second_versions(hooks, pins(CONSTRAINTS)) == []


@pytest.mark.parametrize(
    "hooks",
    [
        "repo: host/ruff-pre-commit\n    rev: v0.0.1",
        "repo: host/mirrors-mypy\n    rev: v0.1",
        'additional_dependencies: ["mypy==1.0"]',
        "  entry: ruff check",
    ],
)
def test_another_version_in_a_hook_is_found(hooks: str) -> None:
    assert second_versions(hooks, {"ruff": "0.17.6", "mypy": "2.4.1"})


def test_only_device_code_is_exempt_from_strict_types() -> None:
    """mypy's pattern has a star for one or more names: it matches all device code and nothing else."""
    (relaxed,) = (o for o in PROJECT["tool"]["mypy"]["overrides"] if "disallow_untyped_defs" in o)
    assert relaxed["module"] == ["ktonum.kernels.device.*.kernels"]
    jitted = {p for p in (ROOT / "kernels").rglob("*.py") if "\n@triton.jit" in p.read_text(encoding="utf-8")}
    assert jitted == set((ROOT / "kernels" / "device").glob("*/kernels.py"))


def run(*arguments: str, venv: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "KTONUM_VENV": str(venv), **environment}
    return subprocess.run([ROOT / "run", *arguments], env=env, capture_output=True, text=True, timeout=30)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def test_run_names_what_is_wrong(tmp_path: Path) -> None:
    old = executable(tmp_path / "python3.9", '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    for arguments, python, message in (
        (("test",), str(old), "Python 3.9.1 is too old, 3.11 or newer is needed"),
        (("test",), str(tmp_path / "absent"), "was not found: install Python 3.11 or newer"),
        (("tset",), sys.executable, "unknown job 'tset': use audit, test,"),
        ((), sys.executable, "say what to run"),
    ):
        done = run(*arguments, venv=tmp_path / "venv", PYTHON=python)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert not (tmp_path / "venv").exists()


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that is up to date. Its programs print how they were called; `ktonum` then fails."""
    executable(tmp_path / "bin" / "python", "#!/bin/sh\n")
    for program in ("pytest", "ruff", "mypy", "pre-commit"):
        executable(tmp_path / "bin" / program, f'#!/bin/sh\necho "{program} $*"\n')
    executable(tmp_path / "bin" / "ktonum", '#!/bin/sh\necho "ktonum $*"\nexit 1\n')
    stamp = "\n".join([str(ROOT), (ROOT / "pyproject.toml").read_text().strip(), CONSTRAINTS])
    (tmp_path / "installed-from.txt").write_text(stamp)
    return tmp_path


def test_run_reuses_an_environment_until_the_requirements_change(environment: Path) -> None:
    done = run("audit", "kto", "--json", "a b", venv=environment, PYTHON="absent")
    assert (done.returncode, done.stdout) == (1, "ktonum audit kto --json a b\n"), done.stderr
    stamp = environment / "installed-from.txt"
    stamp.write_text(stamp.read_text() + "another==1.0\n")
    assert "was not found" in run("audit", venv=environment, PYTHON="absent").stderr


@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_documented_command_starts_its_program(command: str, environment: Path) -> None:
    """The programs themselves take minutes; continuous integration runs them."""
    _, job, *options = shlex.split(command)
    done = run(job, *options, venv=environment, PYTHON="absent")
    assert done.stdout and " ".join(options) in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("tests", "lint", "status", "last"),
    [
        ("echo '== 3 passed, 1 skipped in 0.52s =='", "true", 0, "== 3 passed, 1 skipped in 0.52s =="),
        ("echo '3 passed in 61.02s (0:01:01)'; echo after", "true", 0, "3 passed in 61.02s (0:01:01)"),
        ("echo '== 1 failed, 3 passed in 0.52s =='; exit 1", "true", 1, "== 1 failed, 3 passed in 0.52s =="),
        ("echo '== no tests ran in 0.01s =='; exit 5", "true", 1, "== no tests ran in 0.01s =="),
        ("echo '== 3 passed in 0.52s =='", "exit 1", 1, "== 3 passed in 0.52s =="),
        ("echo 'installation failed'; exit 1", "true", 1, "the tests did not run to their end"),
    ],
)
def test_continuous_integration_runs_every_stage_and_closes_with_the_test_runner(
    tmp_path: Path, tests: str, lint: str, status: int, last: str
) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")  # as it is: it must be executable
    executable(tmp_path / "run", f"#!/bin/sh\necho stage $1\ncase $1 in\ntest) {tests} ;;\nlint) {lint} ;;\nesac\n")
    done = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True, timeout=30)
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[-1]) == (status, last)
    assert [line for line in lines if line.startswith("stage")] == [
        "stage test",
        "stage audit",
        "stage lint",
        "stage types",
    ]
