"""How much of a slow exchange of rows overlaps with the experts: 4 ranks, and a link whose delay is added here.

Every all-to-all takes a fixed time per message and per byte, and messages of a rank follow one another. The ranks share
the cores of this machine, so the experts are slow, and the delay is chosen to be of their order.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from eve_ds.benchmark.harness import Figures, is_quick
from eve_ds.model.experts import Experts
from eve_ds.parallel.exchange.sharded_experts import ShardedExperts, Slots

RANKS, EXPERTS = 4, 8
WIDTH, INTERMEDIATE, SLOTS = 128, 512, 64
PARTS = (1, 2)
MESSAGE_SECONDS = 2e-3
"""Delay of a message to the ranks."""
DELAYS = (0.5, 1.0, 2.0)
"""Delay of a whole exchange, in units of the time of the experts' forward."""


class Link:
    """Link of a rank to the others, on which one message follows the other.

    Args:
        byte_seconds: delay of a byte.
    """

    def __init__(self, byte_seconds: float) -> None:
        self.byte_seconds, self._free_at = byte_seconds, 0.0
        self._exchange = dist.all_to_all_single

    def all_to_all_single(self, out: Tensor, rows: Tensor, *sizes: list[int], **options: Any) -> DelayedWork:
        """Stand-in for the function of this name in `torch.distributed`."""
        seconds = MESSAGE_SECONDS + rows.nbytes * self.byte_seconds
        self._free_at = max(self._free_at, time.perf_counter()) + seconds
        return DelayedWork(self._exchange(out, rows, *sizes, **options), self._free_at)


class DelayedWork:
    """Exchange that is not complete before a point of time."""

    def __init__(self, work: dist.Work, ready_at: float) -> None:
        self._work, self._ready_at = work, ready_at

    def wait(self) -> None:
        """Wait for the exchange, and for its delay."""
        self._work.wait()
        time.sleep(max(0.0, self._ready_at - time.perf_counter()))


class Times(NamedTuple):
    """Seconds of the parts of a pass; all are medians over rounds of the slowest rank."""

    forward: float
    """Experts alone."""
    backward: float
    plain: float
    """Forward and backward with an exchange in one part and without delay."""


def predicted(times: Times, exchange: float, parts: int) -> float:
    """Seconds of forward and backward with a delay of `exchange` seconds for all rows, in so many parts.

    What is not experts or delay stays as it was measured without delay.
    """
    message = MESSAGE_SECONDS + (exchange - MESSAGE_SECONDS) / parts
    rest = times.plain - times.forward - times.backward
    return rest + sum(_pipeline(computed / parts, message, parts) for computed in (times.forward, times.backward))


def _pipeline(computed: float, message: float, parts: int) -> float:
    """Seconds until all parts have come, been computed and gone back over one link."""
    link, done, ready = parts * message, 0.0, [message * (part + 1) for part in range(parts)]
    for part in range(parts):
        done = max(done, ready[part]) + computed
        link = max(link, done) + message
    return link


def overlap(seconds: float) -> Iterator[Figures]:
    """Yield measured and predicted times of an exchange in one part and in two, for several delays."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(rank, folder, is_quick(seconds))) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError("a rank of the measure overlap has failed: see its traceback above")
        of_ranks = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]
    slowest = [[max(own) for own in zip(*rounds, strict=True)] for rounds in zip(*of_ranks, strict=True)]
    medians = [statistics.median(rounds) for rounds in slowest]
    times = Times(*medians[:3])
    for number, share in enumerate(DELAYS):
        exchange, figures = MESSAGE_SECONDS + share * times.forward, {}
        for place, parts in enumerate(PARTS):
            figures[f"parts_{parts}_ms"] = 1e3 * medians[3 + number * len(PARTS) + place]
            figures[f"predicted_{parts}_ms"] = 1e3 * predicted(times, exchange, parts)
        shape = f"{RANKS} ranks, {share:g} x the experts"
        yield Figures("overlap", shape, {"exchange_ms": 1e3 * exchange, "experts_ms": 1e3 * times.forward, **figures})


def _rank(rank: int, folder: str, quick: bool) -> None:
    """Measure on one rank; write the seconds of every round of every case."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    measured = _measure(5 if quick else 25)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measured), encoding="utf-8")
    dist.destroy_process_group()


def _measure(rounds: int) -> list[list[float]]:
    torch.manual_seed(0)
    local = Experts(EXPERTS // RANKS, WIDTH, INTERMEDIATE)
    for parameter in local.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer = ShardedExperts(local, RANKS)
    layer._set_ep_group(dist.group.WORLD)
    rows = torch.randn(EXPERTS * SLOTS, WIDTH, requires_grad=True)
    sizes = torch.full((EXPERTS,), SLOTS)

    def run(parts: int) -> None:
        layer.num_parts = parts
        layer(rows, layer.announce(sizes, Slots(SLOTS, [SLOTS] * RANKS))).sum().backward()

    alone = _timed_experts(local, rows, rounds)
    results = [*alone, _timed(lambda: run(1), rounds)]
    forward = _agreed(statistics.median(alone[0]))
    for share in DELAYS:
        link = Link(share * forward / rows.nbytes)
        with mock.patch.object(dist, "all_to_all_single", link.all_to_all_single):
            results += [_timed(lambda parts=parts: run(parts), rounds) for parts in PARTS]
    return results


def _timed_experts(experts: Experts, rows: Tensor, rounds: int) -> list[list[float]]:
    """Seconds of the experts' forward and of their backward."""
    own = torch.full((EXPERTS // RANKS,), len(rows) * RANKS // EXPERTS)
    forward = _timed(lambda: experts(rows, own), rounds)
    both = _timed(lambda: experts(rows, own).sum().backward(), rounds)
    return [forward, [max(0.0, two - one) for one, two in zip(forward, both, strict=True)]]


def _timed(run: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each round, which all ranks start together."""
    seconds = []
    for number in range(rounds + 1):
        dist.barrier()
        started = time.perf_counter()
        run()
        if number:
            seconds.append(time.perf_counter() - started)
    return seconds


def _agreed(seconds: float) -> float:
    """Largest number of all ranks."""
    largest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)
