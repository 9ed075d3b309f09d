"""Measure time and memory of several implementations of the same work, interleaved in one process.

On a CPU, time is CPU time of the process on one thread, so that other users of the machine have little effect. On a
GPU, time is that of CUDA events. All sides share the settings of the allocator: on a CPU, freed memory is kept while
time is measured (new pages cost more than most of these ops), and returned to the system while memory is measured.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eve_ds.benchmark.commit import commit
from eve_ds.checkpoint.manifest import installed_version

Run = Callable[[], object]
COLUMNS = (
    *("measure", "dtype", "shape", "peer", "ours_ms", "peer_ms", "ratio", "ours_spread", "peer_spread"),
    *("ours_mb", "peer_mb", "repeats", "device", "torch", "deepspeed", "commit", "date", "ours_gflop", "peer_gflop"),
    *("ours_calls", "peer_calls"),
)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""


class Measure(NamedTuple):
    """One row of results: our side compared with one peer."""

    measure: str
    dtype: str
    shape: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float
    """Median time of the peer divided by ours; above 1, ours is faster."""
    ours_spread: float
    """Interquartile range divided by the median."""
    peer_spread: float
    ours_mb: float | None
    """Peak memory above the level before the call, in MB (10^6 bytes)."""
    peer_mb: float | None
    repeats: int
    ours_gflop: float | None = None
    """Floating-point operations of matrix products and attention, in units of 10^9; None: not counted."""
    peer_gflop: float | None = None
    ours_calls: int | None = None
    """Operators that the host called; None: not counted."""
    peer_calls: int | None = None


class Figures(NamedTuple):
    """Figures without a peer; they are printed, and not added to the file of results."""

    measure: str
    what: str
    figures: dict[str, float]

    def text_line(self) -> str:
        """Return the figures as one line of text."""
        figures = ", ".join(f"{name} {value:,.4g}" for name, value in self.figures.items())
        return f"{self.measure:<32} {self.what:<30} {figures}"

    def json_line(self) -> str:
        """Return the figures as one line of JSON."""
        return json.dumps({"measure": self.measure, "what": self.what, **rounded(self.figures)})


class Absent(NamedTuple):
    """Peer that is not installed or does not run on this machine."""

    measure: str
    peer: str
    reason: str


def is_quick(seconds: float) -> bool:
    """Whether the time budget is too short for large shapes."""
    return seconds < 1


def compare(
    measure: str, dtype: torch.dtype, shape: str, ours: Run, peers: dict[str, Run], seconds: float, memory: bool = False
) -> list[Measure]:
    """Time `ours` and all peers alternately for about `seconds`, at least three rounds after a warm-up round.

    Args:
        measure: name of the measure.
        dtype: data type of the work.
        shape: text of the shapes.
        ours: our side.
        peers: name of each peer -> its side.
        seconds: approximate duration.
        memory: whether to measure peak memory, too.

    Returns:
        One row for each peer.
    """
    sides = {"ours": ours, **peers}
    peak = {name: peak_megabytes(run) if memory else None for name, run in sides.items()}
    times = interleave(sides, seconds)
    return [
        measured(measure, dtype, shape, name, times["ours"], times[name])._replace(
            ours_mb=peak["ours"], peer_mb=peak[name]
        )
        for name in peers
    ]


def interleave(sides: dict[str, Run], seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of every run of each side, alternating for about `seconds` after a warm-up round."""
    _keep_freed_memory(True)
    times: dict[str, list[float]] = {name: [] for name in sides}
    deadline = None
    while deadline is None or time.monotonic() < deadline or min(map(len, times.values())) < 3:
        for name, run in sides.items():
            spent = _milliseconds(run)
            if deadline is not None:
                times[name].append(spent)
        deadline = time.monotonic() + seconds if deadline is None else deadline
    _keep_freed_memory(False)
    return times


def measured(
    measure: str, dtype: torch.dtype, shape: str, peer: str, ours_ms: list[float], peer_ms: list[float]
) -> Measure:
    """Return the row of two sides from their times in milliseconds."""
    ours, theirs = statistics.median(ours_ms), statistics.median(peer_ms)
    return Measure(
        measure,
        str(dtype).removeprefix("torch."),
        shape,
        peer,
        ours,
        theirs,
        theirs / ours,
        _spread(ours_ms),
        _spread(peer_ms),
        None,
        None,
        len(ours_ms),
    )


def count_gflop(run: Run) -> float:
    """Count 10^9 floating-point operations of one run of plain torch ops; attention counts as two matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops() / 1e9


def _milliseconds(run: Run) -> float:
    if torch.cuda.is_available():
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    started = time.process_time()
    run()
    return (time.process_time() - started) * 1e3


def _spread(values: list[float]) -> float:
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def peak_megabytes(run: Run) -> float | None:
    """Return the peak memory of a call above the level before it, in MB; None if the system does not report it.

    An unmeasured first call allocates the memory that the side keeps.
    """
    run()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    _keep_freed_memory(False)
    try:
        reset.write_text("5")  # resets the peak to the current resident size
    except OSError:
        return None
    before = kilobytes(status, "VmRSS")
    run()
    return (kilobytes(status, "VmHWM") - before) * 1024 / 1e6


def kilobytes(status: Path, name: str) -> int:
    """Return the figure of the first line that begins with `name` in a file such as /proc/self/status."""
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(name))
    return int(line.split()[1])


def _keep_freed_memory(keep: bool) -> None:
    """Make glibc keep freed memory, or return it at once; other C libraries are not changed."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(M_MMAP_THRESHOLD, 2**30 if keep else 2**17)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 2**17)
    libc.mallopt(M_TOP_PAD, 2**28 if keep else 2**17)
    if not keep:
        libc.malloc_trim(0)


def append_results(rows: list[Measure], file: Path) -> None:
    """Append rows with device, versions, commit and date; a new file gets a header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if new:
            writer.writeheader()
        about = provenance()
        writer.writerows({**rounded(row._asdict()), **about} for row in rows)


def json_line(row: Measure) -> str:
    """Return a row as one line of JSON."""
    keys = ("measure", "dtype", "shape", "peer", "ours_ms", "peer_ms", "ratio", "ours_mb", "peer_mb")
    counted = ("ours_gflop", "peer_gflop", "ours_calls", "peer_calls")
    values = rounded(row._asdict())
    return json.dumps({key: values[key] for key in (*keys, *counted) if key in keys or values[key] is not None})


def provenance() -> dict[str, str]:
    """Return device, versions of torch and DeepSpeed, commit and date."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "torch": torch.__version__,
        "deepspeed": installed_version("deepspeed"),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def rounded(row: Mapping[str, object]) -> dict[str, object]:
    """Return a row of figures with four digits of each float."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread"
