"""Metrics of a run: `metrics.jsonl` with every number, and DeepSpeed's monitors.

The format of `metrics.jsonl` is stable: the report and users' scripts read it; docs/training.md lists the keys.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from eve_ds.distributed import broadcast_object, rank_zero
from eve_ds.log import get_logger
from eve_ds.objectives.objective import TOKENS
from eve_ds.storage import reason
from eve_ds.training.feed import Feed
from eve_ds.training.flops import peak_flops
from eve_ds.training.job import Job
from eve_ds.training.window import Window


class MetricsWriter:
    """Appends JSON objects, one per line, to `metrics.jsonl`; only rank 0 writes.

    While the disk takes no bytes, records wait in memory and training goes on: checkpoints, not metrics, decide whether
    a run with a full disk ends.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._waiting = b""
        self._has_warned = False
        self._file = _open_after_last_line(self._path) if rank_zero() else None

    def write(self, kind: str, *, step: int, seconds: float, samples: int, **numbers: Any) -> None:
        """Append one record; JSON has no NaN, so a non-finite number becomes null.

        Args:
            kind: `train`, `eval`, `save` or `event`.
            step: optimizer steps of the run so far.
            seconds: training time of the run so far, in seconds.
            samples: samples of the run so far.
            numbers: further entries.
        """
        if self._file is not None:
            record = {"kind": kind, "step": step, "seconds": round(seconds, 3), "samples": samples, **numbers}
            self._waiting += json.dumps(_finite_or_none(record), allow_nan=False).encode() + b"\n"
            self._write_waiting(self._file)

    def has(self, kind: str, step: int) -> bool:
        """Whether the file has a record that begins as :meth:`write` begins one of this kind and step."""
        return f'{{"kind": "{kind}", "step": {step},'.encode() in self._path.read_bytes()

    def _write_waiting(self, file: io.RawIOBase) -> None:
        """Append what waits; a disk that becomes full can take a part of it, and then takes the rest later."""
        try:
            while self._waiting:
                self._waiting = self._waiting[file.write(self._waiting) or 0 :]
        except OSError as error:
            if not self._has_warned:
                get_logger().warning(
                    "%s: %s; its records wait in memory until there is room", self._path, error.strerror or error
                )
            self._has_warned = True
        else:
            self._has_warned = False

    def close(self) -> None:
        """Close the file, with a warning if records could not be written."""
        if self._file is None:
            return
        if self._waiting:
            self._write_waiting(self._file)
        if lost := self._waiting.count(b"\n"):
            get_logger().warning("%s lacks its last %d records, which could not be written", self._path, lost)
        self._file.close()


def _open_after_last_line(path: Path) -> io.RawIOBase:
    """Open for appending; first remove the unfinished last line of a killed writer, which would join the next line."""
    if path.is_file():
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            os.truncate(path, len(whole[0]) + len(whole[1]))
    return path.open("ab", buffering=0)


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def training_clock(device: torch.device, feed: Feed) -> Callable[[], float]:
    """Return the clock for training time, in seconds: wall time on an accelerator, CPU time on CPUs.

    CPU time is that of the calling thread and of the one in which the feed loads. On shared cores wall time would
    include other processes. CPU time does not advance while the training waits for other ranks or for samples.
    """
    return (lambda: time.thread_time() + feed.cpu_seconds) if device.type == "cpu" else time.perf_counter


def peak_memory_bytes() -> int:
    """Return the peak memory of this process: allocated on the accelerator, or resident on the host without one."""
    if torch.cuda.is_initialized():  # false if DS_ACCELERATOR selects the CPU on a machine with a GPU
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Metrics:
    """Writes the records of a run to `metrics.jsonl` and to DeepSpeed's monitors.

    Args:
        folder: output folder of the run.
        engine: engine with the monitors of the DeepSpeed JSON (TensorBoard, W&B, Comet, CSV).
    """

    def __init__(self, folder: Path, engine: DeepSpeedEngine) -> None:
        self._writer, self._monitor = MetricsWriter(folder), engine.monitor

    def write(self, kind: str, *, step: int, seconds: float, samples: int, **numbers: Any) -> None:
        """Write one record; monitors also get the numbers of `train` and `eval`, by the samples of the run.

        See :meth:`MetricsWriter.write` for the arguments.
        """
        self._writer.write(kind, step=step, seconds=seconds, samples=samples, **numbers)
        if self._monitor.enabled and rank_zero() and kind in ("train", "eval"):
            try:
                self._monitor.write_events([(f"{kind}/{name}", value, samples) for name, value in _flat(numbers)])
            except OSError as error:
                get_logger().warning("a monitor of the DeepSpeed JSON lacks step %d: %s", step, reason(error))

    def has(self, kind: str, step: int) -> bool:
        """Whether `metrics.jsonl` has a record of this kind and step; collective."""
        return broadcast_object(rank_zero() and self._writer.has(kind, step))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _flat(numbers: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield names and numbers, of nested mappings as `OUTER/INNER`; other values are left out."""
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def training_numbers(window: Window, feed: Feed, engine: DeepSpeedEngine, job: Job, seconds: float) -> dict[str, float]:
    """Return metrics of the steps in a window: losses, routers, rates, waits, gradient norm, memory; collective.

    Args:
        window: window of the steps since the last record.
        feed: data of the steps.
        engine: engine with the batch size and the norm of the last gradient.
        job: job, which counts the FLOPs of a sample.
        seconds: training time at the end of the window.
    """
    topology = feed.topology
    numbers = window.reduce(topology)
    elapsed = max(seconds - window.started, 1e-9)
    samples = window.steps * engine.train_batch_size()
    numbers |= {"samples_per_second": samples / elapsed, "peak_memory_bytes": peak_memory_bytes()}
    if TOKENS in window.totals:
        numbers["tokens_per_second"] = window.totals[TOKENS] / elapsed
    own_samples = engine.train_batch_size() // topology.data_size
    numbers |= feed.data_wait.numbers(window.steps, window.clock_seconds, own_samples, feed.batches.read_seconds)
    norm = engine.get_global_grad_norm()  # None at ZeRO 0 without clipping
    if norm is not None and math.isfinite(norm):
        numbers["grad_norm"] = float(norm)
    peak, flops = peak_flops(job.config.train.precision), job.forward_flops(window.totals, samples)
    if peak is not None and flops is not None:
        numbers["model_flops_utilization"] = 3 * samples * flops / elapsed / (peak * topology.world_size)
    return numbers
