"""``python -m ktonum``: the command line where the package is not installed, only on the path."""

from __future__ import annotations

from ktonum.cli.command_line import main

if __name__ == "__main__":
    main()
