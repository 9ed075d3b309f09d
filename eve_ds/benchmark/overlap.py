"""How much of a slow exchange of rows overlaps with the experts: 4 ranks, and a link whose delay is added here.

Every all-to-all takes a fixed time per message and per byte, and messages of a rank follow one another. The experts
take a fixed time per row, in which the processor is free, as if an accelerator computed: so four ranks can share a few
cores. Layer, exchange and autograd are those of the package.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eve_ds.benchmark.harness import Figures, is_quick
from eve_ds.parallel.exchange.sharded_experts import ShardedExperts, Slots
from eve_ds.reading import read_json

RANKS, EXPERTS = 4, 8
WIDTH, SLOTS = 128, 64
ROWS = EXPERTS * SLOTS
PARTS = (1, 2)
FORWARD, BACKWARD = 0.04, 0.08
"""Seconds of the experts for all rows of a rank."""
MESSAGE = 0.001
"""Seconds of a message, beside those of its bytes."""
DELAYS = (0.01, 0.02, 0.04, 0.08)
"""Seconds of an exchange of all rows of a rank, beside those of its messages."""


class Link:
    """Link of a rank to the others, on which one message follows the other.

    Args:
        byte_seconds: delay of a byte.
    """

    def __init__(self, byte_seconds: float) -> None:
        self.byte_seconds, self._free_at = byte_seconds, 0.0
        self._exchange = dist.all_to_all_single

    def all_to_all_single(self, out: Tensor, rows: Tensor, *sizes: Any, **options: Any) -> DelayedWork:
        """Stand-in for the function of this name in `torch.distributed`."""
        seconds = MESSAGE + rows.nbytes * self.byte_seconds
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


class SlowExperts(nn.Module):
    """Experts that return their rows after a time."""

    def forward(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """(R, D), (E,) int64 -> (R, D)."""
        return SlowRows.apply(rows)


class SlowRows(torch.autograd.Function):
    """Identity that takes a time per row in both directions."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """(R, D) -> (R, D)."""
        time.sleep(FORWARD * len(rows) / ROWS)
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """(R, D) -> (R, D)."""
        time.sleep(BACKWARD * len(gradient) / ROWS)
        return gradient


def predicted(rest: float, delay: float, parts: int) -> float:
    """Seconds of forward and backward in so many parts.

    Args:
        rest: seconds of everything but experts and delays, as measured in one part without delay.
        delay: seconds of the bytes of one exchange.
        parts: number of parts.
    """
    message = MESSAGE + delay / parts
    return rest + sum(_pipeline(computed / parts, message, parts) for computed in (FORWARD, BACKWARD))


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
        of_ranks = [read_json(Path(folder) / f"{rank}.json") for rank in range(RANKS)]
    slowest = [[max(own) for own in zip(*rounds, strict=True)] for rounds in zip(*of_ranks, strict=True)]
    plain, *measured = (statistics.median(rounds) for rounds in slowest)
    rest = plain - FORWARD - BACKWARD
    for number, delay in enumerate(DELAYS):
        figures = {"rest_ms": 1e3 * rest}
        for place, parts in enumerate(PARTS):
            figures[f"parts_{parts}_ms"] = 1e3 * measured[number * len(PARTS) + place]
            figures[f"predicted_{parts}_ms"] = 1e3 * predicted(rest, delay, parts)
        yield Figures("overlap", f"exchange of {1e3 * delay:.0f} ms", figures)


def _rank(rank: int, folder: str, quick: bool) -> None:
    """Measure on one rank; write the seconds of every round of every case."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    measured = _measure(5 if quick else 25)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measured), encoding="utf-8")
    dist.destroy_process_group()


def _measure(rounds: int) -> list[list[float]]:
    """Seconds of each round: without delay in one part, then for each delay in each number of parts."""
    group = dist.group.WORLD
    assert group is not None
    layer = ShardedExperts(SlowExperts(), RANKS)
    layer._set_ep_group(group)
    rows, sizes = torch.randn(ROWS, WIDTH, requires_grad=True), torch.full((EXPERTS,), SLOTS)

    def run() -> None:
        layer(rows, layer.announce(sizes, Slots(SLOTS, [SLOTS] * RANKS))).sum().backward()

    results = [_timed(run, rounds)]
    for delay in DELAYS:
        link = Link(delay / rows.nbytes)
        with mock.patch.object(dist, "all_to_all_single", link.all_to_all_single):
            for parts in PARTS:
                layer.num_parts = parts
                results.append(_timed(run, rounds))
        layer.num_parts = 1
    return results


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
