"""Errors for users: one line that says what is wrong and what to do (exit code 1)."""

import sys
import unicodedata

import click


def printable(text: str) -> str:
    """Make untrusted text safe to print: escape control characters and bytes that are not UTF-8, like \\x1b."""
    return "".join(c if _harmless(c) else _escaped(c) for c in text)


def _harmless(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, as os.fsdecode encodes it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode()


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, for use in another message; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class UserError(click.ClickException):
    """An error that is printed as one line without a traceback.

    Control characters, and characters that the terminal's encoding lacks, are printed as escapes.
    """

    def format_message(self) -> str:
        encoding = sys.stderr.encoding or "utf-8"
        return printable(self.message).encode(encoding, "backslashreplace").decode(encoding)


class DataError(UserError):
    """Invalid input, or a damaged data set."""


class ModelError(UserError):
    """A checkpoint, a run or an option that cannot be used."""
