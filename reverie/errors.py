"""Errors that the command line says in one line; this module imports nothing."""


class UserError(ValueError):
    """Mistake of the user: one line that names what was given and what was expected.

    The command line prints it and exits with `code`.
    """

    code = 2


class BusyError(UserError):
    """A run folder in which another process trains; later the same command may do (75)."""

    code = 75


class OutOfMemoryError(UserError):
    """Memory that does not suffice; the line says what would (71 in sysexits: system error)."""

    code = 71
