"""The command line ``ktonum``: `command_line` parses, and each command has a file of its own."""

from __future__ import annotations

from ktonum.cli.command_line import app, main

__all__ = ["app", "main"]
