"""End of a script: one line for a mistake, and its exit code."""

import sys
from collections.abc import Callable

from reverie.errors import UserError


def run(name: str, work: Callable[[], None]) -> int:
    """Do the work; return the exit code."""
    try:
        work()
    except UserError as error:
        print(f'{name}: {error}', file=sys.stderr)
        return error.code
    return 0
