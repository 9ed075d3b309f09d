"""Data of a step, fetched while the device computes the previous step.

A thread loads, so that a rank whose data do not come can go on talking to the others: until all ranks have data, they
tell each other every second who waits, who has failed and who is to stop. Thus a signal ends the wait of all ranks.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from concurrent.futures import Future
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from eve_ds.data.device_queue import DeviceQueue
from eve_ds.data.errors import UnusableData
from eve_ds.data.remote.readers import Readers
from eve_ds.log import get_logger
from eve_ds.signals import StopSignals
from eve_ds.training.data_wait import DataWait
from eve_ds.training.group_tokens import GroupTokens
from eve_ds.training.job import Batches, Job, Loading, TrainingBatch

WAIT_SECONDS = 1.0
"""Seconds for which a rank waits for its data before it tells the other ranks that it does."""


class Loaded(NamedTuple):
    """What a thread has loaded for one step."""

    micro_batches: list[TrainingBatch]
    problem: Exception | None
    """Error due to which there are no micro-batches."""
    cpu_seconds: float
    """CPU time of the thread."""


class StepData(NamedTuple):
    """Data of one step; its copies for the device are in the device queue."""

    micro_batches: list[TrainingBatch]
    """Micro-batches of this rank, on the host; empty if there are none."""
    problem: Exception | None
    """Error due to which this rank has no data; None with data, or if they were given up."""
    position: dict[str, Any]
    """Position of this rank's batches just after these micro-batches; empty without data."""
    num_failed: float
    """Number of ranks without data due to an error, the same on all ranks."""
    is_given_up: bool
    """Whether some rank was still waiting for data when a signal came to some rank, the same on all ranks."""
    totals: dict[str, float]
    """Counts of the job over all micro-batches and data ranks, the same on all ranks."""
    are_shared: bool
    """Whether tensor-parallel ranks have the same samples, the same on all ranks."""


class Feed:
    """Fetches the micro-batches of this rank one step ahead; a context manager, which ends worker processes.

    Args:
        job: loads and counts micro-batches.
        loading: how to load them, and where to begin.
        accumulation: number of micro-batches in a step.
        device: device that receives the copies.
        stop: signals, which end a wait for data.

    Attributes:
        cpu_seconds: CPU time that the thread has spent on loading, in seconds.
    """

    def __init__(self, job: Job, loading: Loading, accumulation: int, device: torch.device, stop: StopSignals) -> None:
        self.job, self.accumulation, self.stop = job, accumulation, stop
        self.topology, self.group = loading.topology, loading.group
        self.queue: DeviceQueue[Any] = DeviceQueue(device)
        self.data_wait = DataWait(device, job.config.data.num_workers, self.group)
        self.cpu_seconds = 0.0
        self._device, self._thread = device, Readers(1)
        self._next: StepData | None = None
        self._tokens = GroupTokens(job.exchanged_views, self.topology, accumulation)
        self._group_tokens: deque[dict[str, tuple[int, ...]]] = deque()
        """Tokens by view of each micro-batch in the device queue."""
        self.batches: Batches = job.open(loading)
        self.position = self.batches.state_dict()
        """Position after the last step that was taken; the batches themselves are one step ahead."""

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.batches.close()

    def take(self, samples: int) -> StepData | None:
        """Return the data of the step that begins, after `samples` samples of the run; fetch it unless prepared.

        Returns:
            The data; None, on every rank, if a signal came to a rank while some rank was still waiting for them.

        Raises:
            UnusableData: on every rank, if data of a rank cannot be used or the job finds too many unusable samples.
            Exception: any other error of a rank while it loads, on that rank.
            RuntimeError: names that error, on the other ranks.
        """
        data, self._next = self._next or self._fetch_first(), None
        if data.num_failed:
            self._raise(data.problem)
        if data.is_given_up:
            return None
        if not data.are_shared:
            raise UnusableData(
                "tensor-parallel ranks have read different samples: some could not be read on one of them, or shards "
                "differ between hosts; rerun the same command to resume from the newest checkpoint"
            )
        self.job.check_step(data.totals, samples)
        self.position = data.position
        return data

    def next_batch(self) -> Any:
        """Return the next micro-batch of the step that was taken, on the device."""
        batch, tokens = self.queue.get(), self._group_tokens.popleft()
        return batch.with_group_tokens(tokens) if tokens else batch

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

    def _load(self) -> Loaded:
        """Load the micro-batches of one step, in the thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has its own, in whose context memory is page-locked
        started, micro_batches, problem = time.thread_time(), [], None
        try:
            micro_batches = [next(self.batches) for _ in range(self.accumulation)]
        except Exception as error:
            problem = error
        return Loaded(micro_batches, problem, time.thread_time() - started)

    def _await(self, loading: Future[Loaded]) -> Loaded | None:
        """Wait a while for what the thread loads, and start copying it to the device; None: it is not there yet."""
        try:
            with self.data_wait.waits.measured():
                loaded = loading.result(WAIT_SECONDS)
        except TimeoutError:  # not one of the thread, which returns its errors
            return None
        except RuntimeError as error:  # torch raises it in this thread if a worker process has died
            loaded = Loaded([], error, 0.0)
        self.cpu_seconds += loaded.cpu_seconds
        for batch in loaded.micro_batches:
            self.queue.put(batch)
        return loaded

    def _fetch(self) -> StepData:
        """Fetch micro-batches until all ranks have theirs, one has failed or is to stop; sum their counts; collective.

        The sum also tells the ranks each other's numbers of tokens, if experts have a capacity. The ranks sum once, and
        once more for each second that some rank waits.
        """
        loading, loaded = self._thread.submit(self._load), None
        while True:
            loaded = self._await(loading) if loaded is None else loaded
            micro_batches, problem = ([], None) if loaded is None else loaded[:2]
            own = self.job.counts(micro_batches)
            counted = own.values() if self.topology.tensor_rank == 0 else [0.0] * len(own)  # their samples are the same
            state = [problem is not None, loaded is None, self.stop.requested, self._checksum(micro_batches)]
            tokens = self._tokens.own(micro_batches)
            numbers = torch.tensor([*counted, *tokens, *state], dtype=torch.float64)
            dist.all_reduce(numbers, group=self.group)
            *totals, num_failed, num_waiting, num_stopped, checksum = numbers.tolist()
            if not num_waiting or num_failed or num_stopped:
                break
        position = self.batches.state_dict() if micro_batches else {}
        sums = dict(zip(own, totals, strict=False))
        self._group_tokens.extend(self._tokens.of_group(totals[len(own) :]))
        return StepData(micro_batches, problem, position, num_failed, num_waiting > 0, sums, checksum == 0)

    def _checksum(self, micro_batches: list[TrainingBatch]) -> int:
        """Return a number of the samples' keys whose sum over ranks is 0 if tensor-parallel ranks have the same."""
        if self.topology.tp_size == 1:
            return 0
        keys = "\n".join(key for batch in micro_batches for key in batch.keys)
        checksum = zlib.crc32(keys.encode("utf-8", "surrogateescape"))
        return checksum * (self.topology.tp_size - 1) if self.topology.tensor_rank == 0 else -checksum
