"""Names that tools/ablate.py still imports from here."""

from tools.lib.figures import COLORS, new_figure, save

__all__ = ["COLORS", "new_figure", "save"]
