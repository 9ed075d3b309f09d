"""Curves of a run over its steps: loss terms, learning rate, and results of periodic evaluations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eve_ds.data.synthetic.scenes import WORD_CLASSES
from eve_ds.report.records import Record, column, loss_terms, of_kind
from eve_ds.report.style import FAINT, IMAGE_COLOR, INK, RIGHT_COLOR, TEXT_COLOR, WRONG_COLOR, save, tidy

PANELS = {  # name in the record: title, color; another loss term has its name as title
    "mim": ("masked pixels: squared error", IMAGE_COLOR),
    "mlm": ("masked words: cross entropy (nats)", TEXT_COLOR),
    "itc": ("image-text contrast: cross entropy (nats)", "#b0691d"),
    "itm": ("image-text matching: cross entropy (nats)", "#3f7d58"),
    "load_balancing": ("load balancing (1 = balanced)", "#6b4fa0"),
    "lr": ("learning rate", FAINT),
}


def plot_curves(records: list[Record], path: Path) -> Path:
    """Draw one panel for each recorded loss term, and one for each word class if the run was evaluated at least twice.

    Args:
        records: records from :func:`eve_ds.report.records.read_records`, with at least one training record.
        path: PNG to write.

    Returns:
        The path.
    """
    train, evals = of_kind(records, "train"), of_kind(records, "eval")
    named = dict.fromkeys([*PANELS, *loss_terms(train[-1])])
    hidden = ("loss", "router_z")
    terms = [name for name in named if name not in hidden and np.isfinite(column(train, name)).any()]
    words = [name for name in WORD_CLASSES if len(evals) > 1 and name in evals[-1]]
    rows = (len(terms) + 1) // 2 + (len(words) + 1) // 2
    figure = Figure(figsize=(9.2, 0.5 + 2.3 * rows), layout="constrained")
    last = train[-1]
    figure.suptitle(
        f"{last['step']:,} steps, {last['samples']:,} samples, {last['seconds']:,.0f} s of training",
        fontsize=11,
        color=INK,
        x=0.01,
        ha="left",
    )
    grid = figure.subplots(rows, 2, squeeze=False)
    free = iter(grid.flat)
    for name in terms:
        _draw_term(next(free), train, name)
    if len(terms) % 2:
        next(free).set_axis_off()
    for name in words:
        _draw_evaluations(next(free), evals, name)
    for axes in free:
        axes.set_axis_off()
    return save(figure, path)


def _draw_term(axes: Axes, train: list[Record], name: str) -> None:
    title, color = PANELS.get(name, (name, INK))
    tidy(axes, title)
    steps, values = column(train, "step"), column(train, name)
    smooth = running_mean(values, len(values) // 40)
    if name == "lr":
        axes.plot(steps, values, color=color, linewidth=1.6)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    else:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8, marker="." if len(values) < 40 else None)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.plot(steps, smooth, color=color, linewidth=1.6)
        axes.annotate(f"{smooth[-1]:.3g}", (1, smooth[-1]), xycoords=("axes fraction", "data"), fontsize=8, color=color)
    axes.set_xlabel("step", fontsize=8, color=INK)


def _draw_evaluations(axes: Axes, evals: list[Record], name: str) -> None:
    tidy(axes, f"{name}: masked words predicted correctly")
    steps = column(evals, "step")
    for side, color, label in (("right", RIGHT_COLOR, "with its image"), ("wrong", WRONG_COLOR, "with another image")):
        values = [record[name][side] if name in record else np.nan for record in evals]
        axes.plot(steps, values, color=color, linewidth=1.6, marker=".", label=label)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=7, frameon=False, loc="upper left")
    axes.set_xlabel("step", fontsize=8, color=INK)


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the mean (n,) of the values at most `window` places away on either side, without NaNs."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    low, high = np.maximum(places - window, 0), np.minimum(places + window + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])
