"""Progress line of a run on the terminal or in the log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from eve_ds.distributed import rank_zero
from eve_ds.log import get_logger
from eve_ds.report.records import loss_terms


class ProgressLine:
    """Live progress line on a terminal, otherwise one plain log line every `log_every` steps; rank 0 only.

    Args:
        log_every: steps between plain lines.
        done: share of the run that was finished before it resumed; progress since then gives the remaining time.
    """

    def __init__(self, log_every: int, done: float = 0.0) -> None:
        self._log_every, self._done = log_every, done
        self._live = rank_zero() and sys.stderr.isatty()
        # A narrow terminal cuts the line at its end, so the numbers come last.
        columns = (
            TaskProgressColumn(table_column=Column(min_width=4)),
            TextColumn("eta"),
            TimeRemainingColumn(table_column=Column(min_width=7)),
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        )
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True, expand=True) if self._live else None
        self._task = self._progress.add_task("starting", total=1.0) if self._progress else None
        if self._progress and self._task is not None:
            self._progress.reset(self._task, start=True, completed=done)  # type: ignore[arg-type]  # a share, not a count
        self._started = time.monotonic()

    def __enter__(self) -> ProgressLine:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, step: int, fraction: float, numbers: dict[str, float]) -> None:
        """Show the latest numbers; `fraction` is the finished share of the run."""
        if not rank_zero():
            return
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=fraction, description=_live_line(step, numbers))
        elif step % self._log_every == 0:
            elapsed = time.monotonic() - self._started
            left = elapsed * (1 - fraction) / max(fraction - self._done, 1e-6)
            get_logger().info("%s  eta %.0f s", _plain_line(step, numbers), left)


LAST = ("load_balancing", "lr", "samples_per_second")
"""Numbers at the end of a progress line."""

LIVE = {"lr": "lr {:.2g}", "samples_per_second": "{:.4g}/s", "load_balancing": "balance {:.3g}"}
"""Short formats of numbers for the live line, which must fit 80 columns."""


def _plain_line(step: int, numbers: dict[str, float]) -> str:
    return f"step {step}  " + "  ".join(f"{name} {numbers[name]:.4g}" for name in _shown(numbers))


def _live_line(step: int, numbers: dict[str, float]) -> str:
    names = sorted(_shown(numbers), key=lambda name: name == "load_balancing")  # the least important one last
    return f"step {step} " + " ".join(LIVE.get(name, f"{name} {{:.3g}}").format(numbers[name]) for name in names)


def _shown(numbers: dict[str, float]) -> list[str]:
    """Return names in the order of a progress line: `loss`, its terms, then :data:`LAST`."""
    terms = [name for name in loss_terms(numbers) if name not in ("router_z", *LAST)]
    return [*terms, *(name for name in LAST if name in numbers)]
