"""Errors that the command line says in one line; this module imports nothing of the package."""

from typing import Any


class UserError(ValueError):
    """Mistake of the user: one line that names what was given and what was expected.

    The command line prints it and exits with `code`.
    """

    code = 2


class BusyError(UserError):
    """A run folder in which another process trains; later the same command may do (75)."""

    code = 75


class ExportError(UserError):
    """A replay that could not be left as a dataset, of a run that is trained and saved.

    params: of the run, leaves [seeds, ...]. code: 74 where the disk was the reason.
    """

    def __init__(self, cause: Exception, params: Any):
        super().__init__(f'the run is saved, but its replay was not exported: {cause}')
        self.params = params
        self.code = 74 if isinstance(cause, OSError) else 2


class OutOfMemoryError(UserError):
    """Memory that does not suffice; the line says what would (71 in sysexits: system error)."""

    code = 71
