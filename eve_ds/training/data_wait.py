"""Time for which steps wait for data, and the number of worker processes with which they would not."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from eve_ds.distributed import gather_objects, rank_zero
from eve_ds.log import get_logger

WARNED_SHARE = 0.1
"""Share of a step's time, above which its wait for data is worth a warning."""
BLOCK_STEPS = 20
"""Least number of steps over which waits are judged together: workers deliver in turn, so not every step waits."""
BLOCKS = 3
"""Blocks in a row that wait before a warning: neither the start of a run nor an outage of a server shall cause it."""


class Waits:
    """Sum of the times for which a device has nothing to do because its data are not there.

    On a GPU such a time begins when the last kernel of the backward pass ends, by the device's own clock: what the host
    waits before that costs nothing. On a CPU it is the time of loading.

    Args:
        device: device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add the wait within this context, in which the next data are loaded."""
        if self._is_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((begin, end))
        else:
            started = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """Return the seconds since the last call; on a GPU, waits until the device has come that far."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Load(NamedTuple):
    """Work of the data loader in one step, or the sum over several; equal on all ranks."""

    step: float
    """Seconds by the clock."""
    waited: float
    """Seconds for which the step waits for data, on the rank that waits longest."""
    reading: float
    """Seconds that one worker process needs for a rank's samples, on the slowest rank."""
    samples: float
    """Samples of a rank."""

    @property
    def wait_share(self) -> float:
        """Share of the time for which steps wait for data."""
        return self.waited / self.step if self.step else 0.0


class DataWait:
    """Waits of the steps of a run, for its metrics, and one warning if they are long.

    Args:
        device: device of the model.
        num_workers: worker processes of each rank; 0: the training process reads.
        group: host process group of all ranks.
    """

    def __init__(self, device: torch.device, num_workers: int, group: dist.ProcessGroup) -> None:
        self.waits = Waits(device)
        self._is_cpu, self._num_workers, self._group = device.type == "cpu", num_workers, group
        self._read_before = 0.0
        self._block, self._steps = Load(0.0, 0.0, 0.0, 0.0), 0
        self._waiting: list[tuple[Load, int]] = []
        """The last blocks, all of which waited too long, with their numbers of steps."""
        self._has_warned = False

    def numbers(self, steps: int, seconds: float, samples: int, read_seconds: float) -> dict[str, float]:
        """Return the metrics of some steps, and warn once if steps go on waiting for data; collective.

        Args:
            steps: number of steps since the last call.
            seconds: their time by the clock.
            samples: samples of this rank in one step.
            read_seconds: seconds that the worker processes of this rank have worked since its loader was opened.
        """
        reading = max(read_seconds - self._read_before, 0.0)
        self._read_before = read_seconds
        slowest = torch.tensor([seconds, self.waits.take(), reading], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=self._group)
        step, waited, worked = slowest.tolist()
        load = Load(step, waited, worked, samples * steps)
        self._block = Load(*(earlier + new for earlier, new in zip(self._block, load, strict=True)))
        self._steps += steps
        if self._steps >= BLOCK_STEPS:
            self._end_block()
        rate = {"samples_per_second_per_worker": load.samples / load.reading} if load.reading else {}
        return {"step_seconds": load.step / steps, "data_wait_seconds": load.waited / steps, **rate}

    def _end_block(self) -> None:
        block, steps = self._block, self._steps
        self._block, self._steps = Load(0.0, 0.0, 0.0, 0.0), 0
        self._waiting = [*self._waiting, (block, steps)] if block.wait_share > WARNED_SHARE else []
        if len(self._waiting) == BLOCKS and not self._has_warned:
            self._has_warned = True
            self._warn(*min(self._waiting, key=lambda waiting: waiting[0].wait_share))

    def _warn(self, load: Load, steps: int) -> None:
        """Log the advice for some steps, if there is any that this machine can follow; collective."""
        cores = spare_cores(self._group)
        # On a CPU without a spare core, more worker processes would take time from the model.
        if rank_zero() and (cores > 0 or not self._is_cpu):
            get_logger().warning("%s", advice(load, steps, self._num_workers, cores))


def advice(load: Load, steps: int, num_workers: int, spare_cores: int) -> str:
    """Return a line that names the number of workers with which steps would not wait.

    Args:
        load: sum over `steps` steps.
        steps: number of steps.
        num_workers: worker processes of a rank now.
        spare_cores: cores of a rank beside that of the training process.
    """
    busy = max(load.step - load.waited, 1e-9)
    needed = max(math.ceil(load.reading / busy), num_workers + 1)
    line = (
        f"steps wait for data {load.wait_share:.0%} of their time ({load.waited / steps:.2g} of "
        f"{load.step / steps:.2g} s): data.num_workers={needed} would do instead of {num_workers}, as a worker reads "
        f"{load.samples / max(load.reading, 1e-9):.3g} samples/s and a rank could take {load.samples / busy:.3g}"
    )
    if needed > spare_cores:
        line += (
            f"; but a rank has {max(spare_cores, 0)} spare cores here: give it more, or shrink images by "
            "launcher/prepare.py --max_size"
        )
    return line


def spare_cores(group: dist.ProcessGroup) -> int:
    """Return the cores of each rank of this machine, less one for its training process; collective."""
    here = platform.node()
    ranks = [cores for node, cores in gather_objects((here, os.sched_getaffinity(0)), group) if node == here]
    return len(set().union(*ranks)) // len(ranks) - 1
