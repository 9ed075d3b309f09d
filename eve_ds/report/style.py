"""How figures look; figures are made without pyplot, so no state is shared and no display is needed."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

IMAGE_COLOR, TEXT_COLOR = "#2f6db3", "#e0862b"
"""Of the two modalities; told apart by color-blind readers too."""
RIGHT_COLOR, WRONG_COLOR = "#1b7f4d", "#b3261e"
INK, FAINT = "#222222", "#8a8a8a"
DOTS_PER_INCH = 130


def tidy(axes: Axes, title: str) -> None:
    """Title on the left, no box, a light grid."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")
    return path
