"""The one exception that reaches the user: one line saying what is wrong, where, and what to do."""


class UserError(Exception):
    """Something the user can mend. `str(error)` is one line; the command prints it on stderr and exits with status 1."""
