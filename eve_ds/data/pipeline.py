"""Training pipeline: an endless, resumable stream of batches for one rank.

    slots of a worker -> announce -> read, decode, crop -> fill batches, mask -> Loader (counts, position, bad samples)

The first four are stages of a `webdataset.DataPipeline`, which runs in this process or in worker processes. The order
of samples is fixed in advance (:mod:`eve_ds.data.order`), so a position is a few numbers, and a resumed run does not
read or decode samples that were served before.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import get_worker_info
from webdataset import DataPipeline

from eve_ds.config import Config, ConfigError
from eve_ds.data.batch import Batch, Sample
from eve_ds.data.collate import Collator, PretrainingObjective
from eve_ds.data.errors import BadSample, UnusableData
from eve_ds.data.held_out import held_out_share, is_held_out
from eve_ds.data.image_decoding import choose_decoding
from eve_ds.data.order import Lanes, Place, Position, StreamOrder, lanes_for, merge_positions
from eve_ds.data.sources import SampleSource, open_sources
from eve_ds.data.workers import start_loader
from eve_ds.log import get_logger

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import PreTrainedTokenizerFast

STATE_VERSION = 1
"""Version of the saved data position."""
HELD_OUT = "data.validation.share"
"""Key of the held-out share in a saved data position."""
CONTENTS = "data.sources.contents"
"""Key of the digests of each source's stored bytes in a saved data position; earlier versions had none."""
MIN_COUNTED = 1000
"""Smallest number of samples for `data.max_bad_share`, so that a few early bad samples do not stop a run."""
MAX_BAD_RUN = 1000
"""Number of unusable samples before one batch is full that stops the run, unless `data.max_bad_share` is 1."""


class Skipped(NamedTuple):
    """Record of a skipped sample."""

    reason: str
    """One of few fixed texts, under which the sample is counted."""
    where: str
    """Shard, key and detail."""


class Delivery(NamedTuple):
    """Message from a worker to the loader."""

    batch: Batch | None
    """Full batch; None: the worker stopped."""
    consumed: int
    """Total number of slots that the worker has consumed, this batch included."""
    skipped: list[Skipped]
    """Samples skipped since the previous batch."""
    seconds: float = 0.0
    """Time that the worker took for this message, by the clock."""
    error: str | None = None
    """Reason why the worker stopped. The loader raises it; an exception from a worker process would add a traceback."""

    def pin_memory(self) -> Delivery:
        """Return the same message with the batch in page-locked memory; torch's loader calls this method by name."""
        return self if self.batch is None else self._replace(batch=self.batch.pin_memory())


def worker_places(order: StreamOrder, position: Position) -> Iterator[tuple[int, Place]]:
    """First stage: yield the places that this worker serves, each with the number of slots consumed so far."""
    info = get_worker_info()
    # Worker processes deliver in turn, starting with number 0, so number 0 takes the next stream.
    worker = (position.next_worker + (info.id if info else 0)) % position.num_workers
    for consumed, slot in enumerate(position.slots(worker), start=position.consumed[worker] + 1):
        yield consumed, order.locate(slot)


def announced(
    places: Iterable[tuple[int, Place]], sources: Sequence[SampleSource], ahead: int
) -> Iterator[tuple[int, Place]]:
    """Second stage: yield the same places; the sources learn of each one `ahead` places earlier."""
    waiting: deque[tuple[int, Place]] = deque()
    for item in places:
        if ahead:
            sources[item[1].source].want(item[1])
        waiting.append(item)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def read_samples(
    places: Iterable[tuple[int, Place]], sources: Sequence[SampleSource], held_out_share: float = 0.0
) -> Iterator[tuple[int, Sample | Skipped | None]]:
    """Third stage: read, decode and crop; yield an unusable sample as :class:`Skipped`, a held-out one as None."""
    held_out = partial(is_held_out, share=held_out_share)
    for consumed, place in places:
        source = sources[place.source]
        try:
            yield consumed, source.read(place, held_out)
        except BadSample as error:
            key = "" if error.key is None else f", key {error.key}"
            yield consumed, Skipped(error.reason, f"{source.describe(place.shard, place.number)}{key}: {error}")


def fill_batches(
    samples: Iterable[tuple[int, Sample | Skipped | None]],
    batch_size: int,
    collate: Callable[[Sequence[Sample]], Batch],
    max_bad_run: int,
    max_held_out_run: int,
) -> Iterator[Delivery]:
    """Fourth stage: yield full batches of usable samples.

    The stream ends after `max_bad_run` skips in one batch, and after more than `max_held_out_run` held-out samples
    without another one.
    """
    held_out = 0
    good: list[Sample] = []
    skipped: list[Skipped] = []
    consumed = 0
    started = time.perf_counter()
    try:
        for consumed, sample in samples:
            if isinstance(sample, Skipped):
                skipped.append(sample)
            elif sample is not None:
                good.append(sample)
            held_out = held_out + 1 if sample is None else 0
            if held_out > max_held_out_run:
                raise UnusableData(
                    f"{HELD_OUT} leaves no sample to train on ({held_out:,} in a row are held out): lower it"
                )
            if len(good) == batch_size:
                batch = collate(good)
                yield Delivery(batch, consumed, skipped, time.perf_counter() - started)
                good, skipped, started = [], [], time.perf_counter()  # the loader may have been slow to ask again
            elif len(skipped) >= max_bad_run:
                raise UnusableData(f"{len(skipped)} samples cannot be used between two batches")
    except UnusableData as error:
        yield Delivery(None, consumed, skipped, error=str(error))


def _deliveries(
    pipeline: DataPipeline, num_workers: int, start_method: str | None, pin_memory: bool
) -> Iterator[Delivery]:
    if num_workers == 0:
        return map(Delivery.pin_memory, pipeline) if pin_memory else iter(pipeline)
    return start_loader(
        pipeline,
        batch_size=None,
        num_workers=num_workers,
        imports=__name__,
        start_method=start_method,
        pin_memory=pin_memory,  # in a thread of this process
        generator=torch.Generator(),  # the default generator belongs to the noise of the model
    )


class Loader:
    """Endless iterator of :class:`Batch` for one rank; created by :func:`build_loader`.

    Attributes:
        skipped: number of unusable samples by reason since the start of the run.
        num_samples: number of samples that this rank has served since the start of the run.
        read_seconds: time that the workers, or this process, have worked on the batches of this loader, by the clock.
    """

    def __init__(
        self,
        pipeline: DataPipeline,
        sources: Sequence[SampleSource],
        position: Position,
        identity: dict[str, Any],
        *,
        num_workers: int,
        start_method: str | None,
        pin_memory: bool,
        max_bad_share: float,
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self.num_samples = 0
        self.read_seconds = 0.0
        self._sources = sources
        self._position, self._identity, self._max_bad_share = position, identity, max_bad_share
        self._stream: Iterator[Delivery] | None = _deliveries(pipeline, num_workers, start_method, pin_memory)
        self._last_skipped = Skipped("", "before this start")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            UnusableData: too many samples cannot be used.
        """
        if self._stream is None:
            raise StopIteration
        delivery = next(self._stream)
        self._position = self._position.advance(self._position.next_worker, delivery.consumed)
        self.num_samples += 0 if delivery.batch is None else len(delivery.batch)
        self.read_seconds += delivery.seconds
        self._count(delivery.skipped)
        if delivery.batch is None:
            raise UnusableData("; ".join(filter(None, [delivery.error, self._report()])))
        return delivery.batch

    def _count(self, skipped: list[Skipped]) -> None:
        for item in skipped:
            self._last_skipped = item
            self.skipped[item.reason] += 1
            count = self.skipped[item.reason]
            if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th, ... sample with this reason
                get_logger().warning("skipped %d samples so far for '%s'; %s", count, item.reason, item.where)
        bad = self.skipped.total()
        if skipped and bad > self._max_bad_share * max(bad + self.num_samples, MIN_COUNTED):
            raise UnusableData(
                f"{bad} of {bad + self.num_samples} samples cannot be used, more than data.max_bad_share "
                f"({self._max_bad_share:g}) allows; {self._report()}"
            )

    def _report(self) -> str:
        if not self.skipped:
            return ""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.skipped.most_common())
        return f"{reasons}; the last one: {self._last_skipped.where}"

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that this rank served, as values that JSON can represent.

        To resume on another number of ranks, pass the list of the states of all ranks to :func:`build_loader`.
        """
        return {
            "version": STATE_VERSION,
            **self._identity,
            "position": dict(vars(self._position)),
            "num_samples": self.num_samples,
            "skipped": dict(self.skipped),
        }

    def close(self) -> None:
        """Stop the worker processes and close the shards; the iterator then ends."""
        self._stream = None  # torch's iterator stops its workers when it is deleted
        for source in self._sources:
            source.close()


def build_loader(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    objectives: Sequence[PretrainingObjective],
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    state: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
    group: dist.ProcessGroup | None = None,
    start_method: str | None = None,
    pin_memory: bool = False,
) -> Loader:
    """Build the loader of one rank, at the start of the stream or at a saved position; collective.

    `data.num_workers` worker processes start to read the samples; with 0, this process reads them when they are due.

    Args:
        config: data, masking, model and seed.
        tokenizer: tokenizer of the captions.
        objectives: objectives that determine the views of a batch, from
            :func:`eve_ds.objectives.registry.objectives_of`.
        rank: rank of this process.
        world_size: number of ranks.
        micro_batch_size: samples per batch.
        state: state from :meth:`Loader.state_dict` of this rank, or the states of all ranks in rank order. A list may
            come from another number of ranks or samples per batch: unserved samples are redistributed, none repeated
            and none lost. The number of workers may always change.
        group: ranks that build their loaders together, of which rank 0 looks for the shards; None: all.
        start_method: "fork", "spawn" or "forkserver" for worker processes; None: "forkserver". For the last
            two, what a script does must stand below `if __name__ == "__main__"`, since workers import the script.
        pin_memory: put batches into page-locked memory, so that copies to a GPU can overlap with computation.

    Raises:
        ConfigError: shards that are missing or empty, a tokenizer larger than the vocabulary of the model, a decoder
            that is not installed, or a position from other data, another seed, another mixture or another number of
            ranks.
    """
    states = [] if state is None else [state] if isinstance(state, dict) else list(state)
    decoding = choose_decoding(config.data.image_decoder, states)
    sources = open_sources(config, group, decoding)
    collate = Collator(
        config,
        tokenizer,
        objectives,
        has_images=any(source.has_images for source in sources),
        has_captions=any(source.has_captions for source in sources),
    )
    identity = _identity(config, sources, states) | decoding.position()
    num_streams = max(config.data.num_workers, 1)
    position = _position(states, rank, world_size, micro_batch_size, num_streams)
    order = _order(config, sources, Lanes(*identity["layout"]))
    share = config.data.max_bad_share
    num_samples = sum(sum(source.shard_sizes) for source in sources)
    pipeline = DataPipeline(
        partial(worker_places, order, position),
        partial(announced, sources=sources, ahead=config.data.remote.reads_ahead),
        partial(read_samples, sources=sources, held_out_share=held_out_share(config)),
        partial(
            fill_batches,
            batch_size=micro_batch_size,
            collate=collate,
            max_bad_run=MAX_BAD_RUN if share < 1 else max(num_samples, MAX_BAD_RUN),
            max_held_out_run=2 * num_samples,
        ),
    )
    loader = Loader(
        pipeline,
        sources,
        position,
        identity,
        num_workers=config.data.num_workers,
        start_method=start_method,
        pin_memory=pin_memory,
        max_bad_share=share,
    )
    _restore_counts(loader, states, rank, world_size)
    return loader


def _order(config: Config, sources: Sequence[SampleSource], lanes: Lanes) -> StreamOrder:
    return StreamOrder(
        [source.shard_sizes for source in sources],
        [source.weight for source in config.data.sources],
        lanes,
        config.data.shuffle_buffer,
        config.train.seed,
    )


def _identity(config: Config, sources: Sequence[SampleSource], states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that determine the samples and their order.

    The fingerprint of a source contains the order of its captions unless that is random, so a position saved before
    the setting existed is read as one with random order.

    Raises:
        ConfigError: a saved position was made with other settings.
    """
    identity: dict[str, Any] = {
        "train.seed": config.train.seed,
        "data.shuffle_buffer": config.data.shuffle_buffer,
        "data.sources.weight": [source.weight for source in config.data.sources],
        "data.sources": [source.fingerprint() for source in sources],
        HELD_OUT: held_out_share(config),
    }
    contents = [source.contents() for source in sources]
    for state in states:
        if state.get("version") != STATE_VERSION:
            raise ConfigError(f"data position has version {state.get('version')}, only {STATE_VERSION} can be read")
        for name, value in identity.items():
            saved = state.get(name, 0.0) if name == HELD_OUT else state[name]  # earlier versions had no such key
            if saved != value:
                raise ConfigError(
                    f"{name} ({value}) differs from the saved data position's ({saved}), so other samples "
                    "would come, or in another order; keep it, or start without the position"
                )
        _require_same_contents(state.get(CONTENTS, []), contents)
    identity[CONTENTS] = contents
    # Derived from the batch size, but a run resumed with another batch size keeps its original order.
    identity["layout"] = states[0]["layout"] if states else list(lanes_for(config.train.train_batch_size))
    return identity


def _require_same_contents(saved: Sequence[dict[str, str]], now: Sequence[dict[str, str]]) -> None:
    """Raise ConfigError if shards have other bytes than those of a saved position; names and numbers may be equal."""
    for number, (before, after) in enumerate(zip(saved, now, strict=False)):
        for name in before.keys() & after.keys():
            if before[name] != after[name]:
                raise ConfigError(
                    f"data.sources.{number}: the {name} of its shards differ from those of the saved data position, so "
                    "they hold other samples; restore the shards, or start without the position"
                )


def _position(
    states: Sequence[dict[str, Any]], rank: int, world_size: int, batch_size: int, num_workers: int
) -> Position:
    if not states:
        return Position(rank, world_size, batch_size, num_workers)
    saved = {position.rank: position for position in (_read_position(state) for state in states)}
    own = saved.get(rank)
    if own is not None and (own.world_size, own.batch) == (world_size, batch_size):
        return own.split(num_workers)
    old = next(iter(saved.values()))
    if sorted(saved) != list(range(old.world_size)):
        raise ConfigError(
            f"data position was saved on {old.world_size} ranks with {old.batch} samples per batch, this run has "
            f"{world_size} with {batch_size}: give the states of all {old.world_size} ranks, not of {sorted(saved)}"
        )
    ordered = [saved[index] for index in range(old.world_size)]
    return merge_positions(ordered, world_size, batch_size, num_workers)[rank]


def _read_position(state: dict[str, Any]) -> Position:
    fields = dict(state["position"])
    return Position(**fields | {"pending": tuple(fields["pending"]), "consumed": tuple(fields["consumed"])})


def _restore_counts(loader: Loader, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> None:
    own = [state for state in states if state["position"]["rank"] == rank]
    if states and states[0]["position"]["world_size"] != world_size:
        own = list(states) if rank == 0 else []  # rank 0 takes over the counts of all old ranks
    for state in own:
        loader.num_samples += state["num_samples"]
        loader.skipped.update(state["skipped"])
