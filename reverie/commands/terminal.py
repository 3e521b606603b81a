"""Lines and tables on the terminal."""

import pathlib
import shlex
import sys
from typing import Any


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def show(renderable: Any) -> None:
    """Print a table, or any other value, by rich."""
    from rich.console import Console

    Console(markup=False, emoji=False).print(renderable)


def command_line() -> str:
    """The command as the user typed it."""
    return shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])
