"""The errors that reach a user: one line that says what is wrong and what to do (exit code 1)."""

import sys

import click


class UserError(click.ClickException):
    """Printed as one line, without a traceback, on any terminal: what its encoding lacks becomes an escape."""

    def format_message(self) -> str:
        encoding = sys.stderr.encoding or "utf-8"
        return self.message.encode(encoding, "backslashreplace").decode(encoding)


class DataError(UserError):
    """Bad input or a damaged data set."""


class ModelError(UserError):
    """A checkpoint, a run or an option that cannot be used."""
