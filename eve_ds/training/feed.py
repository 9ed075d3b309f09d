"""Data of a step, fetched while the device computes the step before."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from eve_ds.data.device_queue import DeviceQueue
from eve_ds.data.sources import UnusableData
from eve_ds.topology import Topology
from eve_ds.training.job import Batches, Job, Loading, TrainingBatch


class StepData(NamedTuple):
    """Data of one step; its copies are in the device's queue."""

    micro_batches: list[TrainingBatch]
    """Micro-batches of this rank, on the host; none where `problem` is not None."""
    problem: Exception | None
    """Reason why this rank has no data."""
    position: dict[str, Any]
    """Position of this rank's batches just after them."""
    num_failed: float
    """Ranks without data, known to all ranks alike."""
    totals: dict[str, float]
    """Counts of the job over all micro-batches and ranks, known to all ranks alike."""


class Feed:
    """Micro-batches of this rank, one step ahead.

    Args:
        job: loads and counts.
        topology: this rank's share of the data.
        loading: how, from the start of the run.
        accumulation: micro-batches of a step.
        device: receives the copies.
        group: process group of all ranks on the host.
    """

    def __init__(
        self,
        job: Job,
        topology: Topology,
        loading: Loading,
        accumulation: int,
        device: torch.device,
        group: dist.ProcessGroup,
    ) -> None:
        self.job, self.topology, self.accumulation, self.group = job, topology, accumulation, group
        self.queue: DeviceQueue[Any] = DeviceQueue(device)
        self._next: StepData | None = None
        self.open(loading)

    def open(self, loading: Loading) -> None:
        """Open the batches at a position."""
        self.batches: Batches = self.job.open(loading)
        self.position = self.batches.state_dict()
        """Position after the last step that was taken: the batches themselves are a step ahead."""

    def close(self) -> None:
        """End worker processes and close files."""
        self.batches.close()

    def take(self, samples: int) -> StepData:
        """Data of the step that begins, after `samples` samples of the run; fetched now unless :meth:`prepare` did.

        Raises:
            UnusableData: on every rank, if any of them has no data, or the job finds too much of it bad.
        """
        data, self._next = self._next or self._fetch(), None
        problem = data.problem
        if problem is not None and not isinstance(problem, UnusableData):
            raise problem
        if data.num_failed:
            found: list[Any] = [None] * self.topology.world_size
            own = None if problem is None else f"rank {self.topology.rank}: {problem}"
            dist.all_gather_object(found, own, group=self.group)
            raise UnusableData("; ".join(text for text in found if text is not None))
        self.job.check_step(data.totals, samples)
        self.position = data.position
        return data

    def prepare(self) -> None:
        """Fetch the data of the next step; a problem is raised at that step, so the one under way is still finished."""
        self._next = self._fetch()

    def _load(self) -> tuple[list[TrainingBatch], Exception | None]:
        """Micro-batches of one step, or the reason why this rank has none."""
        try:
            return [next(self.batches) for _ in range(self.accumulation)], None
        except Exception as error:
            return [], error

    def _fetch(self) -> StepData:
        """Fetch micro-batches, begin their copies, and sum their counts over ranks; collective."""
        micro_batches, problem = self._load()
        for batch in micro_batches:
            self.queue.put(batch)
        own = self.job.counts(micro_batches)
        numbers = torch.tensor([*own.values(), problem is not None], dtype=torch.float64)
        dist.all_reduce(numbers, group=self.group)
        *totals, num_failed = numbers.tolist()
        position = self.batches.state_dict()
        return StepData(micro_batches, problem, position, num_failed, dict(zip(own, totals, strict=True)))
