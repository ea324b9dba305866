"""Names that tools/ablate.py still imports from here."""

from tools.lib.cli import CONTEXT, option, write_text

__all__ = ["CONTEXT", "option", "write_text"]
