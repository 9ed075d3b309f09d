"""Order of the training stream: the sample of each slot, and the slots that a rank and its workers serve.

The stream is endless and the same for every world size. Slot g is a pure function of (seed, g), so a position is a
number. A global batch is divided into lanes; each lane reads its own part of every epoch. If the number of lanes is a
multiple of the number of ranks, each rank opens only the shards of its lanes; otherwise the order is still the same.

    slot -> lane and turn -> source (mixture) -> epoch and position -> shard and index in the shard
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eve_ds.config import ConfigError
from eve_ds.data.masking import sample_rng

MAX_LANES = 64
"""Up to this number of readers open disjoint shards; more readers share the shards of a lane."""
MIXTURE_BLOCK = 1024
"""Slots of a lane in which every source gets exactly its share; shares are therefore accurate to 1/1024."""
CACHED_PATTERNS = 256
"""Number of cached window permutations and of cached mixture patterns: a few per lane."""


class Lanes(NamedTuple):
    """Division of a global batch into `number` lanes of `width` consecutive slots."""

    number: int
    width: int


def lanes_for(train_batch_size: int) -> Lanes:
    """Return the largest number of lanes, at most MAX_LANES, that divides the global batch."""
    most = max(number for number in range(1, MAX_LANES + 1) if train_batch_size % number == 0)
    return Lanes(most, train_batch_size // most)


class Place(NamedTuple):
    """Location of the sample of one slot."""

    source: int
    """Index of the source in the mixture."""
    epoch: int
    """Number of complete passes over that source before this sample."""
    shard: int
    """Index of the shard in the source."""
    number: int
    """Index of the sample in the shard."""
    slot: int
    """Index in the stream: number of earlier samples of all sources on all ranks since the start of the run."""


class _Cache:
    """Cache of a function's results for the last `size` different arguments."""

    def __init__(self, function: Callable[..., Any], size: int) -> None:
        self._function, self._size = function, size
        self._results: OrderedDict[Hashable, Any] = OrderedDict()

    def __call__(self, *args: Hashable) -> Any:
        if args in self._results:
            return self._results[args]
        result = self._results[args] = self._function(*args)
        if len(self._results) > self._size:
            self._results.popitem(last=False)
        return result


class _Epoch(NamedTuple):
    shards: NDArray[np.int64]
    """Shard indices in shuffled order."""
    ends: NDArray[np.int64]
    """Position after the last sample of each shuffled shard."""
    lane_starts: list[int]
    """First position of each lane."""
    lane_sizes: list[int]


class SourceOrder:
    """Order of one source.

    In each epoch the shards are shuffled, concatenated and divided into lanes; each lane is shuffled in windows.

    Args:
        name: label of the source, part of the random keys.
        shard_sizes: number of samples of each shard.
        lanes: the width is the number of consecutive samples of this source that belong to one lane.
        window: number of consecutive samples of a lane that are shuffled together.
        seed: seed of the run.
    """

    def __init__(self, name: str, shard_sizes: Sequence[int], lanes: Lanes, window: int, seed: int) -> None:
        self.num_samples = sum(shard_sizes)
        self._name, self._lanes, self._window, self._seed = name, lanes, window, seed
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._epochs = _Cache(self._make_epoch, 4)
        self._windows = _Cache(self._make_window, CACHED_PATTERNS)

    def locate(self, number: int) -> tuple[int, int, int]:
        """Return epoch, shard, and index in the shard of sample `number` of the source, counted over all epochs."""
        epoch = number // self.num_samples
        lane = number // self._lanes.width % self._lanes.number
        turn = self._before(number, lane) - self._before(epoch * self.num_samples, lane)
        window, offset = divmod(turn, self._window)
        plan = self._epochs(epoch)
        position = plan.lane_starts[lane] + window * self._window + self._windows(epoch, lane, window)[offset]
        place = int(plan.ends.searchsorted(position, side="right"))
        start = int(plan.ends[place - 1]) if place else 0
        return epoch, int(plan.shards[place]), position - start

    def _before(self, number: int, lane: int) -> int:
        """Return how many sample numbers below `number` belong to the lane."""
        lanes, width = self._lanes
        rounds, rest = divmod(number, lanes * width)
        return rounds * width + min(max(rest - lane * width, 0), width)

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = sample_rng(self._seed, epoch, f"shards of {self._name}").permutation(len(self._sizes))
        first, last = epoch * self.num_samples, (epoch + 1) * self.num_samples
        sizes = [self._before(last, lane) - self._before(first, lane) for lane in range(self._lanes.number)]
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        return _Epoch(shards, self._sizes[shards].cumsum(), starts, sizes)

    def _make_window(self, epoch: int, lane: int, window: int) -> list[int]:
        size = min(self._window, self._epochs(epoch).lane_sizes[lane] - window * self._window)
        rng = sample_rng(self._seed, epoch, f"lane {lane} window {window} of {self._name}")
        order: list[int] = rng.permutation(size).tolist()
        return order


class StreamOrder:
    """Order of a mixture of sources.

    With one source of N samples, slots e * N to (e + 1) * N - 1 are exactly epoch e. With several sources, each has its
    own epochs.

    Args:
        shard_sizes: for each source, the number of samples of each shard.
        weights: weight of each source in the mixture, relative to the others.
        lanes: division of the global batch.
        window: see :class:`SourceOrder`.
        seed: seed of the run.
    """

    def __init__(
        self, shard_sizes: Sequence[Sequence[int]], weights: Sequence[float], lanes: Lanes, window: int, seed: int
    ) -> None:
        blocks = 1 if len(weights) == 1 else -(-MIXTURE_BLOCK // lanes.width)
        self.lanes = lanes
        self.quotas = mixture_quotas(weights, blocks * lanes.width)
        self.sources = [
            SourceOrder(f"source {number}", sizes, Lanes(lanes.number, quota), window, seed)
            for number, (sizes, quota) in enumerate(zip(shard_sizes, self.quotas, strict=True))
        ]
        self._block = sum(self.quotas)
        self._patterns = _Cache(partial(_mixture_pattern, self.quotas, seed), CACHED_PATTERNS)

    def locate(self, slot: int) -> Place:
        """Return the location of the sample of slot `slot`."""
        lanes, width = self.lanes
        rounds, rest = divmod(slot, lanes * width)
        lane, offset = divmod(rest, width)
        block, turn = divmod(rounds * width + offset, self._block)
        source, count = (0, turn) if len(self.sources) == 1 else self._patterns(lane, block)[turn]
        number = (block * lanes + lane) * self.quotas[source] + count
        return Place(source, *self.sources[source].locate(number), slot)


def mixture_quotas(weights: Sequence[float], block: int) -> list[int]:
    """Return the number of slots of each source in a block: at least 1, rounded so that the sum is the block size."""
    if len(weights) > block:
        raise ConfigError(f"data.sources ({len(weights)}) must not be more than {block}")
    exact = np.asarray(weights) / sum(weights) * block
    quotas = np.maximum(np.floor(exact).astype(int), 1)
    while quotas.sum() != block:
        step = 1 if quotas.sum() < block else -1
        error = np.where((quotas > 1) | (step > 0), step * (exact - quotas), -np.inf)
        quotas[int(np.argmax(error))] += step
    return [int(quota) for quota in quotas]


def _mixture_pattern(quotas: Sequence[int], seed: int, lane: int, block: int) -> list[tuple[int, int]]:
    """For each turn of a lane in a block: the source, and the number of earlier turns of that source in the block."""
    order = sample_rng(seed, block, f"mixture of lane {lane}").permutation(np.repeat(np.arange(len(quotas)), quotas))
    counts = np.zeros(len(order), dtype=np.int64)
    for source, quota in enumerate(quotas):
        counts[order == source] = np.arange(quota)
    return list(zip(order.tolist(), counts.tolist(), strict=True))


@dataclass(frozen=True)
class Position:
    """Position of one rank in the stream.

    The slots of the rank are those in `pending`, then from slot `origin` every `world_size`-th run of `batch` slots.
    Runs of `batch` slots are assigned to the workers in turn, and a worker fills one batch from each run. If a sample
    is unusable, its worker continues into its own next run: batches stay full, and other workers are not affected.
    """

    rank: int
    """Rank of this position."""
    world_size: int
    """Number of ranks."""
    batch: int
    """Samples per batch of one rank."""
    num_workers: int
    """Number of streams of the rank; 1 for a loader without worker processes."""
    origin: int = 0
    """First slot of the stream after those in `pending`."""
    pending: tuple[int, ...] = ()
    """Slots before `origin` that are still to be served."""
    consumed: tuple[int, ...] = field(default=())
    """Number of slots that each worker has consumed, unusable samples included."""
    next_worker: int = 0
    """Worker that serves the next batch."""

    def __post_init__(self) -> None:
        if not self.consumed:
            object.__setattr__(self, "consumed", (0,) * self.num_workers)

    def slot(self, local: int) -> int:
        """Return the stream slot of the rank's slot number `local`."""
        local -= len(self.pending)
        if local < 0:
            return self.pending[local]
        run, offset = divmod(local, self.batch)
        return self.origin + (run * self.world_size + self.rank) * self.batch + offset

    def _local(self, worker: int, count: int) -> int:
        run, offset = divmod(count, self.batch)
        return (run * self.num_workers + worker) * self.batch + offset

    def slots(self, worker: int) -> Iterator[int]:
        """Yield the slots of one worker without end, starting at its position."""
        count = self.consumed[worker]
        while True:
            yield self.slot(self._local(worker, count))
            count += 1

    def advance(self, worker: int, consumed: int) -> Position:
        """Return the position after `worker` has delivered a batch and has consumed `consumed` slots in total."""
        counts = list(self.consumed)
        counts[worker] = consumed
        return replace(self, consumed=tuple(counts), next_worker=(worker + 1) % self.num_workers)

    def split(self, num_workers: int) -> Position:
        """Return a position with the same unserved slots for another number of workers."""
        if num_workers == self.num_workers:
            return self
        return replace(self._compact(), num_workers=num_workers, consumed=(0,) * num_workers, next_worker=0)

    def _compact(self) -> Position:
        """Return a position for one worker, with unserved slots up to the last served run in `pending`."""
        served = min(self.consumed) // self.batch * self.batch
        start = served * self.num_workers
        used = {self._local(worker, m) for worker, count in enumerate(self.consumed) for m in range(served, count)}
        runs = max(-(-(max(used, default=start - 1) + 1 - len(self.pending)) // self.batch), 0)
        end = len(self.pending) + runs * self.batch
        pending = tuple(self.slot(local) for local in range(start, end) if local not in used)
        origin = self.origin + runs * self.world_size * self.batch
        return Position(self.rank, self.world_size, self.batch, 1, origin, pending)


def merge_positions(positions: Sequence[Position], world_size: int, batch: int, num_workers: int) -> list[Position]:
    """Distribute the unserved slots of all ranks of a run to another number of ranks: none repeated, none lost.

    Args:
        positions: positions of all ranks of the old run.
        world_size: number of ranks of the new run.
        batch: samples per batch of one rank of the new run.
        num_workers: workers per rank of the new run.

    Returns:
        One position for each rank of the new run.
    """
    compact = [position.split(1)._compact() for position in positions]
    origin = max(position.origin for position in compact)
    left = sorted(slot for position in compact for slot in _slots_below(position, origin))
    return [
        Position(rank, world_size, batch, num_workers, origin, tuple(left[rank::world_size]))
        for rank in range(world_size)
    ]


def _slots_below(position: Position, origin: int) -> Iterator[int]:
    yield from position.pending
    for slot in range(position.origin, origin):
        if (slot - position.origin) // position.batch % position.world_size == position.rank:
            yield slot
