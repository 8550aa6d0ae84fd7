"""Checks of options that several commands have, before anything is run."""

from __future__ import annotations

import os
from pathlib import Path

from ktonum.errors import UsageError

__all__ = ["check_file", "check_folder", "check_workers"]


def check_workers(workers: str) -> None:
    """Check ``-n``.

    Raises:
        UsageError: Neither ``auto`` nor a number.
    """
    if workers != "auto" and not workers.isdecimal():
        raise UsageError(f"invalid -n {workers!r}: use auto, 0, 1, 2, …")


def check_file(option: str, path: Path) -> None:
    """Check a file that is to be written.

    Raises:
        UsageError: It cannot be written.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder: name a file")
    if not folder.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {folder}; create it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"{option} {path}: permission denied; name a file that you may write")


def check_folder(option: str, path: Path) -> None:
    """Check a folder that is to be made if it is not there, and written to.

    Raises:
        UsageError: It cannot be made or written to.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{option} {path} is a file: name a folder")
    parent = path if path.exists() else path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {parent}; create it first")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{option} {path}: permission denied; name a folder that you may write to")
