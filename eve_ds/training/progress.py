"""Output of a run in progress: `metrics.jsonl` with every number, and one progress line.

The records of `metrics.jsonl` are a contract with the report and with users' scripts.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from eve_ds.distributed import get_logger, rank_zero
from eve_ds.report.records import loss_terms


class MetricsWriter:
    """Appends JSON objects, one a line, to `metrics.jsonl`; only rank 0 writes."""

    def __init__(self, folder: Path) -> None:
        self._file = _open_after_last_line(folder / "metrics.jsonl") if rank_zero() else None

    def write(self, kind: str, *, step: int, seconds: float, samples: int, **numbers: Any) -> None:
        """Append one record; JSON has no NaN, so a non-finite number becomes null.

        Args:
            kind: `train`, `eval`, `save` or `event`.
            step: optimizer steps of the run.
            seconds: training time of the run.
            samples: samples of the run.
            numbers: further entries.
        """
        if self._file is not None:
            record = {"kind": kind, "step": step, "seconds": round(seconds, 3), "samples": samples, **numbers}
            self._file.write(json.dumps(_finite_or_none(record), allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _open_after_last_line(path: Path) -> TextIO:
    """Open for appending, without the unfinished last line of a killed writer, which the next line would join."""
    if path.is_file():
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            os.truncate(path, len(whole[0]) + len(whole[1]))
    return path.open("a", encoding="utf-8")


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressLine:
    """Live progress line on a terminal, otherwise one plain log line every `log_every` steps; rank 0 only.

    Args:
        log_every: steps between plain lines.
        done: share of the run that was finished before it resumed; the remaining time follows from progress since then.
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
        """Show the newest numbers; `fraction` is the finished share of the run."""
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
"""Shorter forms in the live line, which must fit 80 columns."""


def _plain_line(step: int, numbers: dict[str, float]) -> str:
    return f"step {step}  " + "  ".join(f"{name} {numbers[name]:.4g}" for name in _shown(numbers))


def _live_line(step: int, numbers: dict[str, float]) -> str:
    names = sorted(_shown(numbers), key="load_balancing".__eq__)
    return f"step {step} " + " ".join(LIVE.get(name, f"{name} {{:.3g}}").format(numbers[name]) for name in names)


def _shown(numbers: dict[str, float]) -> list[str]:
    """Names in the order of a progress line: `loss`, its terms, then :data:`LAST`."""
    terms = [name for name in loss_terms(numbers) if name not in ("router_z", *LAST)]
    return [*terms, *(name for name in LAST if name in numbers)]


def training_clock(device: torch.device) -> Callable[[], float]:
    """Clock for training time, in seconds: wall time on an accelerator, CPU time of the training thread on CPUs.

    On shared cores wall time would measure other processes. CPU time stands still while the thread waits for other
    ranks or for samples.
    """
    return time.thread_time if device.type == "cpu" else time.perf_counter


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the accelerator, or resident on the host without one."""
    if torch.cuda.is_initialized():  # false where DS_ACCELERATOR asks for the CPU beside a CUDA device
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
