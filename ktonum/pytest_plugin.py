"""The pytest plugin: ``pytest --ktonum`` audits the ops that ``pyproject.toml`` names, beside a project's own tests.

It loads with every pytest session, so it imports neither torch nor Triton, nor anything that does, until ``--ktonum``
is given. Items are ordinary pytest items: ``-n``, ``-k``, ``-x`` and ``--junitxml`` work on them.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from ktonum.auditing.audit_process import AuditProcess
from ktonum.auditing.audit_settings import AuditSettings
from ktonum.auditing.devices import DEVICES
from ktonum.auditing.op_loading import declared_ops
from ktonum.auditing.pytest_items import PREFIX
from ktonum.auditing.session_hooks import SessionHooks, sent_settings
from ktonum.errors import UsageError
from ktonum.results import Report

__all__: list[str] = []

# xdist reruns the crasher until it gives up (loadfile, loadscope) or hangs (loadgroup) when a worker dies.
_CRASH_PROOF = ("no", "load", "worksteal")
# A candidate that crashes its process costs one worker an item; giving up would leave the other items without verdict.
_RESTARTS = 10_000
_HOOKS = pytest.StashKey[SessionHooks]()
_PROCESS = pytest.StashKey[AuditProcess]()
_SETTINGS = pytest.StashKey[AuditSettings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options ``--ktonum...``."""
    group = parser.getgroup("ktonum", "numerics audits")
    group.addoption("--ktonum", action="store_true", help="collect audit items: one for each case and check")
    group.addoption("--ktonum-only", action="store_true", help="collect audit items and no other tests")
    group.addoption(
        "--ktonum-op",
        action="append",
        default=[],
        metavar="TARGET",
        help="module, module:attr, path/file.py or path/file.py:attr; instead of [tool.ktonum] ops; repeatable",
    )
    group.addoption("--ktonum-candidate", metavar="TARGET", help="audit this instead of the ops' own candidate")
    group.addoption("--ktonum-dtype", metavar="NAMES", help="bf16, fp16, fp32, fp64, comma-separated (default: all)")
    group.addoption("--ktonum-device", default="auto", metavar="NAME", help=f"{', '.join(DEVICES)} (default: auto)")
    group.addoption("--ktonum-profile", default="quick", metavar="NAME", help="quick or full (default: quick)")
    group.addoption("--ktonum-standard", default="precise", metavar="NAME", help="precise or eager (default: precise)")
    group.addoption("--ktonum-strict", action="store_true", help="INCONCLUSIVE fails instead of being skipped")
    group.addoption(
        "--ktonum-select",
        action="append",
        default=[],
        metavar="TEXT",
        help="only items whose CASE::CHECK contains TEXT",
    )
    group.addoption(
        "--ktonum-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="time limit of one item in a worker; beyond it the verdict is ERROR (default: 600; 0: no limit)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Choose device and GPU before a conftest imports the kernels."""
    _begin(early_config, early_config.known_args_namespace)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Before xdist counts how many crashed workers it will replace."""
    if _asked(config.option) and getattr(config.option, "maxworkerrestart", 0) is None:
        config.option.maxworkerrestart = str(_RESTARTS)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the hooks of a session with planned items.

    Raises:
        pytest.UsageError: An option is not among those accepted.
    """
    _begin(config, config.option)
    # A worker does not read options again. A command's own session has none, and registers its hooks itself.
    settings = sent_settings(config) or config.stash.get(_SETTINGS, None)
    if settings is None:
        given = [n for n in ("op", "candidate", "dtype", "select") if getattr(config.option, f"ktonum_{n}")]
        if given:
            raise pytest.UsageError(f"--ktonum-{given[0]} does nothing by itself: add --ktonum")
        return
    config.stash[_HOOKS] = SessionHooks(settings, config.stash[_PROCESS])
    config.pluginmanager.register(config.stash[_HOOKS], "ktonum-session")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The audit's closing summary, below pytest's own."""
    hooks = config.stash.get(_HOOKS, None)
    if hooks is None or not hooks.results:
        return
    from rich.console import Console

    from ktonum.report.terminal import print_summary

    terminalreporter.section("ktonum")
    writer = terminalreporter._tw
    console = Console(file=writer._file, width=max(60, writer.fullwidth), no_color=not writer.hasmarkup)
    print_summary(console, Report(tuple(hooks.results.values())), standard=config.stash[_SETTINGS].standard)


def _asked(option: argparse.Namespace) -> bool:
    return bool(option.ktonum or option.ktonum_only)


def _begin(config: pytest.Config, option: argparse.Namespace) -> None:
    """Begin a run if the command line asks for one, or join that of the controller; only once.

    Raises:
        pytest.UsageError: An option is not among those accepted, or the device cannot be used.
    """
    if _PROCESS in config.stash:
        return
    process = AuditProcess.join()
    if process is None:
        if not _asked(option):
            return
        try:
            settings = config.stash[_SETTINGS] = _settings(config, option)
            process = AuditProcess.begin(settings.device)
        except UsageError as error:
            raise pytest.UsageError(f"ktonum: {error}") from error
    config.stash[_PROCESS] = process
    config.add_cleanup(process.end)


def _settings(config: pytest.Config, option: argparse.Namespace) -> AuditSettings:
    """The settings that pytest's command line asks for.

    Raises:
        UsageError: An option is not among those accepted.
    """
    named = [a.removeprefix(f"{PREFIX}::") for a in option.file_or_dir if a.startswith(f"{PREFIX}::")]
    settings = AuditSettings(
        targets=tuple(option.ktonum_op) or declared_ops(config.rootpath),
        candidate=option.ktonum_candidate,
        dtypes=option.ktonum_dtype,
        device=option.ktonum_device,
        profile=option.ktonum_profile,
        standard=option.ktonum_standard,
        strict=option.ktonum_strict,
        only=(*option.ktonum_select, *named),
        folders=(str(config.rootpath), str(config.invocation_params.dir)),
        timeout=option.ktonum_timeout,
        alone=option.ktonum_only,
    )
    settings.check()
    if not settings.targets:
        raise UsageError(
            f"nothing to audit: name ops with --ktonum-op module:attr, or under [tool.ktonum] in "
            f'{config.rootpath / "pyproject.toml"} as ops = ["mykernels.audits"]'
        )
    dist = getattr(option, "dist", "no")
    if dist not in _CRASH_PROOF:
        raise UsageError(f"--dist {dist} does not survive a candidate that crashes its worker: use load or worksteal")
    return settings
