"""The look of all pictures, and how they reach a file or a page. Draws without a display."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from base.errors import ModelError
from tools.common import cannot_write

# told apart by colour-blind readers too (Okabe and Ito, 2008), the yellow left out: it fades on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
RIGHT, WRONG = "#D55E00", "#0072B2"  # bars of the correct class and of the others
matplotlib.rcParams |= {
    "figure.dpi": 130,
    "savefig.bbox": "tight",  # nothing is cut off, whatever the names are
    "savefig.facecolor": "white",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid.axis": "both",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar in a file's name is a dollar
}


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """A figure of width x height inches that lays itself out."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def show_image(axes: Axes, image: np.ndarray, title: str = "", size: float = 8) -> None:
    """An image, (H, W, 3) RGB uint8 or floats of 0..1, without axes."""
    axes.imshow(image, interpolation="antialiased")
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=size, fontweight="normal")


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write a picture in the format that its suffix names, making its folder; raises ModelError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    except ValueError:
        raise ModelError(
            f"no picture format is called {path.suffix!r}: name the file {path.stem}.png"
        ) from None
