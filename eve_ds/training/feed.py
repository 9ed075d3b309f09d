"""Data of a step, fetched while the device computes the previous step."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from eve_ds.data.device_queue import DeviceQueue
from eve_ds.data.sources import UnusableData
from eve_ds.distributed import get_logger
from eve_ds.training.data_wait import DataWait
from eve_ds.training.job import Batches, Job, Loading, TrainingBatch


class StepData(NamedTuple):
    """Data of one step; its copies for the device are in the device queue."""

    micro_batches: list[TrainingBatch]
    """Micro-batches of this rank, on the host; empty if `problem` is not None."""
    problem: Exception | None
    """Error due to which this rank has no data; None with data."""
    position: dict[str, Any]
    """Position of this rank's batches just after these micro-batches."""
    num_failed: float
    """Number of ranks without data, the same on all ranks."""
    totals: dict[str, float]
    """Counts of the job over all micro-batches and ranks, the same on all ranks."""


class Feed:
    """Fetches the micro-batches of this rank one step ahead; a context manager, which ends worker processes.

    Args:
        job: loads and counts micro-batches.
        loading: how to load them, and where to begin.
        accumulation: number of micro-batches in a step.
        device: device that receives the copies.
    """

    def __init__(self, job: Job, loading: Loading, accumulation: int, device: torch.device) -> None:
        self.job, self.accumulation = job, accumulation
        self.topology, self.group = loading.topology, loading.group
        self.queue: DeviceQueue[Any] = DeviceQueue(device)
        self.data_wait = DataWait(device, job.config.data.num_workers, self.group)
        self._next: StepData | None = None
        self.batches: Batches = job.open(loading)
        self.position = self.batches.state_dict()
        """Position after the last step that was taken; the batches themselves are one step ahead."""

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.batches.close()

    def take(self, samples: int) -> StepData:
        """Return the data of the step that begins, after `samples` samples of the run; fetch it unless prepared.

        Raises:
            UnusableData: on every rank, if data of a rank cannot be used or the job finds too many unusable samples.
            Exception: any other error of a rank while it loads, on that rank.
            RuntimeError: names that error, on the other ranks.
        """
        data, self._next = self._next or self._fetch_first(), None
        if data.num_failed:
            self._raise(data.problem)
        self.job.check_step(data.totals, samples)
        self.position = data.position
        return data

    def _raise(self, problem: Exception | None) -> NoReturn:
        """Raise the problems of all ranks on every rank; collective."""
        unusable = problem is None or isinstance(problem, UnusableData)
        text = str(problem) if unusable else f"{type(problem).__name__}: {problem}"
        own = None if problem is None else (f"rank {self.topology.rank}: {text}", unusable)
        gathered: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(gathered, own, group=self.group)
        found = [item for item in gathered if item is not None]
        message = "; ".join(text for text, _ in found)
        if all(unusable for _, unusable in found):
            raise UnusableData(message)
        # Either all ranks raise UnusableData, after which they finish the pending checkpoint together, or none does.
        raise RuntimeError(message) if problem is None or unusable else problem

    def prepare(self) -> None:
        """Fetch the data of the next step; an error is raised at that step, so the current step still finishes."""
        self._next = self._fetch()

    def _fetch_first(self) -> StepData:
        """Fetch the data of the first step, which wait for the start of the worker processes."""
        started = time.perf_counter()
        data = self._fetch()
        get_logger().info("the first batches came after %.2g s", time.perf_counter() - started)
        self.data_wait.waits.take()  # counted here, not in the metrics of steps
        return data

    def _load(self) -> tuple[list[TrainingBatch], Exception | None]:
        """Load the micro-batches of one step, or return the error due to which this rank has none."""
        try:
            return [next(self.batches) for _ in range(self.accumulation)], None
        except Exception as error:
            return [], error

    def _fetch(self) -> StepData:
        """Fetch micro-batches, start copying them to the device, and sum their counts over ranks; collective."""
        with self.data_wait.waits.measured():
            micro_batches, problem = self._load()
        for batch in micro_batches:
            self.queue.put(batch)
        own = self.job.counts(micro_batches)
        numbers = torch.tensor([*own.values(), problem is not None], dtype=torch.float64)
        dist.all_reduce(numbers, group=self.group)
        *totals, num_failed = numbers.tolist()
        position = self.batches.state_dict()
        return StepData(micro_batches, problem, position, num_failed, dict(zip(own, totals, strict=True)))
