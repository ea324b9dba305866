"""The errors that reach a user: one line that says what is wrong and what to do (exit code 1)."""

import click


class UserError(click.ClickException):
    """Printed as one line, without a traceback."""


class DataError(UserError):
    """Bad input or a damaged data set."""


class ModelError(UserError):
    """A checkpoint, a run or an option that cannot be used."""
