"""The errors that reach a user: one line that says what is wrong and what to do (exit code 1)."""

import sys
import unicodedata

import click


def printable(text: str) -> str:
    """Names from outside for people: control characters and bytes that are not UTF-8 become escapes like \\x1b."""
    return "".join(c if _harmless(c) else _escaped(c) for c in text)


def _harmless(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, as os.fsdecode keeps it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode()


class UserError(click.ClickException):
    """Printed as one line, without a traceback, on any terminal.

    What its encoding lacks becomes an escape, as do control characters in names from outside.
    """

    def format_message(self) -> str:
        encoding = sys.stderr.encoding or "utf-8"
        return printable(self.message).encode(encoding, "backslashreplace").decode(encoding)


class DataError(UserError):
    """Bad input or a damaged data set."""


class ModelError(UserError):
    """A checkpoint, a run or an option that cannot be used."""
