"""The file with the samples of a calibration. It has a line of JSON for each block, added when the block is measured.

A run that was killed continues where it stopped. A block is not measured again if its line was made with the same code,
versions and device. A line that was cut off is ignored.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ktonum.calibrate import block_errors
from ktonum.calibrate.block_errors import Series
from ktonum.calibrate.seed_blocks import Block
from ktonum.calibrate.source_closure import source_closure
from ktonum.declare.op import FILE_MODULE, Op, load_object
from ktonum.errors import UsageError
from ktonum.report.environment import describe_environment

__all__ = ["append_samples", "made_with", "read_samples"]


def made_with(block: Block) -> dict[str, str]:
    """The code, versions and device that the errors of a block depend on, in addition to its name."""
    environment = _environment(block.case.device)
    return {"code": _digest(block.op), **environment}


@functools.cache
def _environment(device: str) -> dict[str, str]:
    described = describe_environment(device)
    return {"device": described["device"]["name"], "python": described["python"], **described["packages"]}


def _digest(op: Op) -> str:
    """A digest of all sources that an error may depend on: those that measure, and those of the op's own functions."""
    candidate = load_object(op.candidate) if isinstance(op.candidate, str) else op.candidate
    functions = (candidate, op.reference, op.sample)
    modules = {module.__name__ for module in map(inspect.getmodule, functions) if module is not None}
    # A file that was loaded by its path is not in a package, and its module's name depends on the folder. Its contents
    # are added below. The ``apply`` of a `torch.autograd.Function` belongs to torch, whose version is recorded.
    followed = {name for name in modules if not name.startswith((FILE_MODULE, "torch."))}
    digest = hashlib.sha256(_digest_of_modules((block_errors.__name__, *sorted(followed))))
    for function in functions:
        try:
            digest.update(Path(inspect.getfile(function)).read_bytes())
        except (OSError, TypeError):  # not defined in a file, for example a functools.partial
            digest.update(repr(type(function)).encode())
    return digest.hexdigest()[:16]


@functools.cache
def _digest_of_modules(modules: tuple[str, ...]) -> bytes:
    digest = hashlib.sha256()
    for name, file in source_closure(modules).items():
        digest.update(name.encode() + file.read_bytes())
    return digest.digest()


def append_samples(file: Path, block: Block, series: tuple[Series, ...]) -> None:
    """Add a line for a block. Several processes may do this at the same time."""
    record = {"block": block.name, "made_with": made_with(block), "series": [asdict(s) for s in series]}
    line = json.dumps(record, separators=(",", ":")).encode()
    with file.open("ab+") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX)
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":  # a process was killed while it wrote
                line = b"\n" + line
        stream.write(line + b"\n")
        stream.flush()


def read_samples(file: Path) -> dict[str, tuple[Mapping[str, str], tuple[Series, ...]]]:
    """What each block was made with (see `made_with`) and its series, by the block's name; empty without a file.

    Raises:
        UsageError: The file cannot be read, or it is not a file of samples.
    """
    if not file.exists():
        return {}
    found: dict[str, tuple[Mapping[str, str], tuple[Series, ...]]] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}; pass another file with --samples") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        try:
            found[record["block"]] = record["made_with"], tuple(_series(s) for s in record["series"])
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"{file}, line {number} holds no samples of ktonum calibrate ({type(error).__name__}: {error}): remove "
                f"the file, or pass another with --samples"
            ) from error
    return found


def _series(record: Mapping[str, Any]) -> Series:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Series(**values)
