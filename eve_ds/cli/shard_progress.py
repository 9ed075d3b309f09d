"""Progress and summary of `prepare`, as lines or as a bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eve_ds.printable import printable

if TYPE_CHECKING:
    from eve_ds.data.shard_writer import Progress

PLAIN_SECONDS = 10.0
"""Seconds between progress lines where standard output is no terminal."""


class Tally:
    """Counts of the shards so far, and of those that an earlier run wrote."""

    def __init__(self) -> None:
        self.images = self.kept_images = self.samples = self.skipped = self.shards = self.kept_shards = 0
        self.started = time.monotonic()

    def add(self, progress: Progress) -> None:
        """Count one more shard."""
        record = progress.record
        self.images += record.candidates
        self.samples += record.samples
        self.skipped += sum(entry["count"] for entry in record.skipped.values())
        self.shards += 1
        if progress.kept:
            self.kept_images += record.candidates
            self.kept_shards += 1

    @property
    def rate(self) -> float:
        """Images per second, without the shards of earlier runs."""
        return (self.images - self.kept_images) / max(time.monotonic() - self.started, 1e-9)

    def __str__(self) -> str:
        return f"{self.images:,} images, {self.shards} shards, {self.skipped:,} skipped, {self.rate:,.0f} images/s"


@contextmanager
def shown_progress(tally: Tally) -> Iterator[Callable[[Progress], None]]:
    """Show a progress bar on a terminal, otherwise a plain line every :data:`PLAIN_SECONDS`; the function to call
    after each shard."""
    if sys.stdout.isatty():
        with _bar(tally) as on_shard:
            yield on_shard
        return
    last = time.monotonic()

    def on_shard_plain(progress: Progress) -> None:
        nonlocal last
        tally.add(progress)
        if time.monotonic() - last >= PLAIN_SECONDS:
            last = time.monotonic()
            of_total = f" of {progress.total:,}" if progress.total else ""
            print(f"{tally.images:,}{of_total}: {tally}", flush=True)

    yield on_shard_plain


def counter(what: str) -> Callable[[int, int], None]:
    """Function to call after each item with the number done and of all; prints a line every :data:`PLAIN_SECONDS`.

    Args:
        what: plural noun of the items.
    """
    last = time.monotonic()

    def on_item(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_SECONDS and done < total:
            last = time.monotonic()
            print(f"{done:,} of {total:,} {what}", flush=True)

    return on_item


@contextmanager
def _bar(tally: Tally) -> Iterator[Callable[[Progress], None]]:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
    with RichProgress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("starting", total=None)

        def on_shard(progress: Progress) -> None:
            tally.add(progress)
            bar.update(task, total=progress.total, completed=tally.images, description=str(tally))

        yield on_shard


def print_report(report: dict[str, Any], tally: Tally, out: Path) -> None:
    """Print the counts of samples written and left out."""
    reused = "" if tally.shards else f" (already there, nothing to do; to read the source again, remove {out})"
    print(
        f"{out}: {report['samples']:,} samples of {report['images']:,} images in {report['shards']} shards, "
        f"{report['bytes'] / 1e6:,.1f} MB{reused}"
    )
    if tally.shards:
        seconds = time.monotonic() - tally.started
        kept = f", {tally.kept_shards} shards kept from an earlier run" if tally.kept_shards else ""
        print(f"{seconds:,.1f} s, {tally.rate:,.0f} images/s{kept}")
    for reason, entry in report["skipped"].items():
        print(printable(f"skipped {entry['count']:,}: {reason} (as {', '.join(entry['examples'])})"))
    excluded = report["excluded_ids"]
    if excluded["listed"]:
        print(f"excluded ids: {excluded['matched']:,} of {excluded['listed']:,} listed ids occur in this source")
