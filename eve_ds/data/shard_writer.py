"""Write WebDataset shards: parallel, restartable, with the same bytes in every run, also after a kill.

A shard is one unit of work: `samples_per_shard` captions in the order of the source, skipped ones included. The
assignment of samples to shards therefore depends neither on the number of workers nor on the progress of an earlier
run. An image with its captions is one group of members of the tar:

- KEY.jpg (or png, webp)
- KEY.txt (the caption, UTF-8), or KEY.0.txt, KEY.1.txt, ... for several captions, each of which is a sample
- KEY.json (`image_id`, `name`)

The folder also contains:

- index.json: `{"version": 2, "shards": [{"name", "samples", "bytes", "sha256", "groups"}]}`; written last, it marks a
  complete set; `groups` is a :class:`eve_ds.data.shard_index.ShardLayout`
- report.json: source, options, counts, and skipped samples with a few names per reason
- ids.txt: ids of the written images, and paths where these are not in the ids, for `--exclude_ids` of another set
- .prepare/, only while the writer runs: one record per finished shard; a shard is finished once the shard and its
  record are renamed into place
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eve_ds.data.errors import SourceError
from eve_ds.data.importers.candidate import Source
from eve_ds.data.writing.excluded_ids import read_ids
from eve_ds.data.writing.one_shard import ShardRecord, ShardTask, Skipped, split_into_tasks, write_shard
from eve_ds.data.writing.options import WriterOptions
from eve_ds.data.writing.output_folder import (
    VERSION,
    claimed,
    completed_report,
    discard,
    finish,
    merge_skipped,
    read_record,
)
from eve_ds.data.writing.progress_files import PROGRESS_FOLDER, OutputError
from eve_ds.signals import children_without_signals, held_signals

POLL_SECONDS = 0.1
"""Longest wait for a shard before signals are looked at."""
TASKS_PER_WORKER = 2
"""Shards that are assigned in advance, per worker; images of compressed archives stay in memory meanwhile."""


@dataclass(frozen=True)
class Progress:
    """Report of one finished shard to the caller of :func:`write_shards`."""

    record: ShardRecord
    """Record of the shard."""
    kept: bool
    """Whether an earlier run finished the shard."""
    total: int | None
    """Expected number of candidates of the source; None: unknown."""


def write_shards(
    source: Source,
    out: str | Path,
    options: WriterOptions,
    workers: int = 1,
    on_shard: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Write the shards of a source, or complete the shards of an interrupted call.

    A folder that is already complete is not changed.

    Args:
        source: candidates and their description.
        out: folder to write.
        options: options that determine the shards.
        workers: number of worker processes; 1: this process writes.
        on_shard: called after every finished shard, including shards of an earlier run.

    Returns:
        Content of report.json.

    Raises:
        OutputError: the folder belongs to another source or other options, is complete but damaged, or cannot be
            written.
        SourceError: the source is damaged, or none of its samples can be used.
        OSError: writing failed, for example on a full disk; the same call resumes.
    """
    folder = Path(out)
    plan = json.loads(json.dumps({"version": VERSION, "source": source.description, "options": options.describe()}))
    complete = completed_report(folder, plan)
    if complete is not None:
        shutil.rmtree(folder / PROGRESS_FOLDER, ignore_errors=True)  # left by a run killed after it wrote the index
        return complete
    with claimed(folder, plan):
        try:
            records = sorted(_records(source, folder, options, workers, on_shard), key=lambda record: record.name)
            if not any(record.samples for record in records):
                raise SourceError(f"no sample could be used: {_summary(merge_skipped(records))}")
        except SourceError:
            discard(folder)  # another source has another plan, which could not continue these shards
            raise
        report = finish(folder, plan, records, len(read_ids(options.exclude_ids).lines))
    return report


def _records(
    source: Source, folder: Path, options: WriterOptions, workers: int, on_shard: Callable[[Progress], None]
) -> Iterator[ShardRecord]:
    """Yield the records of all shards, including those of an earlier run, as they become available."""
    kept: list[ShardRecord] = []

    def unfinished() -> Iterator[ShardTask]:
        for task in split_into_tasks(source, options):
            record = read_record(folder, task.name)
            if record is None:
                yield task
            else:
                kept.append(record)
                on_shard(Progress(record, True, source.total))

    for record in _run(unfinished(), folder, options, workers):
        on_shard(Progress(record, False, source.total))
        yield record
    yield from kept


def _run(tasks: Iterator[ShardTask], folder: Path, options: WriterOptions, workers: int) -> Iterator[ShardRecord]:
    if workers == 1:
        yield from (write_shard(task, folder, options) for task in tasks)
        return
    # Spawn instead of fork, so that nothing of the caller (progress bar threads, open files) is inherited.
    with children_without_signals(), held_signals():  # this process handles them
        executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pending: set[Future[ShardRecord]] = set()
    try:
        for task in tasks:
            with children_without_signals(), held_signals():
                pending.add(executor.submit(write_shard, task, folder, options))
            if len(pending) >= TASKS_PER_WORKER * workers:
                done, pending = _wait(pending)
                yield from (future.result() for future in done)
        while pending:
            done, pending = _wait(pending)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise OutputError(
            "a worker was killed, perhaps for lack of memory; rerun the same command to resume (fewer --workers?)"
        ) from None
    finally:
        with held_signals():
            executor.shutdown(cancel_futures=True)


def _wait(pending: set[Future[ShardRecord]]) -> tuple[set[Future[ShardRecord]], set[Future[ShardRecord]]]:
    """Wait for the first of the shards; a signal is handled between two looks."""
    done: set[Future[ShardRecord]] = set()
    while not done:
        with held_signals():
            done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
    return done, pending


def _start_worker() -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent exits: a killed parent cannot stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _summary(skipped: Skipped) -> str:
    parts = [f"{reason}: {entry['count']} (as {entry['examples'][0]})" for reason, entry in skipped.reasons.items()]
    return "; ".join(parts) or "the source is empty"
