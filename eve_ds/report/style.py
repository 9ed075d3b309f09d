"""Style of figures. Figures are created without pyplot, so they share no state and need no display."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eve_ds.printable import printable

IMAGE_COLOR, TEXT_COLOR = "#2f6db3", "#e0862b"
"""Colors of the two modalities; color-blind readers can distinguish them."""
RIGHT_COLOR, WRONG_COLOR = "#1b7f4d", "#b3261e"
"""Colors of correct and wrong predictions, or of the right and a wrong other modality."""
INK, FAINT = "#222222", "#8a8a8a"
"""Colors of text and of secondary lines."""
DOTS_PER_INCH = 130


def tidy(axes: Axes, title: str) -> None:
    """Set a title on the left, remove the box, and draw a light grid."""
    axes.set_title(printable(title), loc="left", fontsize=10, color=INK, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")
    return path
