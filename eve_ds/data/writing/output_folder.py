"""Folder of shards: claim it, keep the progress in it, and finish it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eve_ds.data.index_file import INDEX_NAME, INDEX_VERSION
from eve_ds.data.sample_names import shard_files
from eve_ds.data.writing.one_shard import ShardRecord, Skipped
from eve_ds.data.writing.progress_files import (
    PROGRESS_FOLDER,
    OutputError,
    dump,
    not_written,
    read_progress,
    record_path,
    write_atomically,
)
from eve_ds.file_lock import lock_file
from eve_ds.reading import read_json
from eve_ds.storage import is_disk_error

VERSION = 3
"""Version of an unfinished folder and of report.json. Version 1 wrote an image once per caption; version 2
grouped paths as they were written, and had ids alone in ids.txt."""
DIGESTS = ("contents", "sha256", "bytes", "image_data", "exclude_ids")
"""Keys of a plan whose values change with the contents of files, and say nothing to a reader."""


def completed_report(folder: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Return the report of a complete folder of this plan, of any version; None if the folder is not complete.

    Raises:
        OutputError: the folder is complete for another plan, or a shard does not have the size in the index.
    """
    index_path, report_path = folder / INDEX_NAME, folder / "report.json"
    if not index_path.exists():
        return None
    try:
        index, report = (read_json(path) for path in (index_path, report_path))
        _require_same_plan(folder, {**{key: report[key] for key in plan}, "version": plan["version"]}, plan)
        entries = [(folder / entry["name"], entry["bytes"]) for entry in index["shards"]]
    except OutputError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(
            f"{folder} holds an index.json that this command did not write; choose another --out"
        ) from None
    for path, size in entries:
        if not path.is_file() or path.stat().st_size != size:
            raise OutputError(
                f"{path} is missing or does not have the {size} bytes in index.json; remove {folder} and repeat"
            )
    return report


@contextlib.contextmanager
def claimed(folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Claim the folder for this plan, remove leftovers of a killed run, and lock the folder while the body runs.

    Raises:
        OutputError: the folder has other contents, is unfinished for another plan or version, or is in use.
    """
    progress = folder / PROGRESS_FOLDER
    plan_path = progress / "plan.json"
    try:
        if plan_path.exists():
            _require_same_version(folder, read_progress(plan_path), plan)
            _require_same_plan(folder, read_progress(plan_path), plan)
        elif shard_files(folder):
            raise OutputError(f"{folder} holds .tar files that this command did not write; choose another --out")
        progress.mkdir(parents=True, exist_ok=True)
        write_atomically(plan_path, dump(plan, indent=2))
        lock = (progress / "lock").open("wb")
    except OSError as error:
        if is_disk_error(error):
            raise
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None
    with lock:
        try:
            lock_file(lock, wait=False, owner="file")
        except BlockingIOError:
            raise OutputError(f"another process is writing to {folder}") from None
        for leftover in (*progress.glob("*.tmp"), *folder.glob("*.tmp")):
            leftover.unlink(missing_ok=True)
        yield


def discard(folder: Path) -> None:
    """Remove the shards and the progress of an unfinished run."""
    for shard in folder.glob("shard-*.tar"):
        shard.unlink()
    shutil.rmtree(folder / PROGRESS_FOLDER)


def read_record(folder: Path, shard: str) -> ShardRecord | None:
    """Record of a shard that an earlier run finished, without its ids; None for one to write."""
    record = _read_whole_record(folder, shard)
    if record is None:
        return None
    path = folder / shard
    intact = not record.samples or (path.is_file() and path.stat().st_size == record.bytes)
    return replace(record, ids=[]) if intact else None


def finish(folder: Path, plan: dict[str, Any], records: Sequence[ShardRecord], num_listed: int) -> dict[str, Any]:
    """Write ids.txt, report.json and index.json, and remove the progress; returns the content of report.json."""
    written = [record for record in records if record.samples]
    matched = {name for record in records for name in record.excluded}
    report = plan | {
        "shards": len(written),
        "samples": sum(record.samples for record in written),
        "images": _write_ids(folder, written),  # images in the shards: a box is one, though its line is that of others
        "bytes": sum(record.bytes for record in written),
        "skipped": merge_skipped(records).reasons,
        "excluded_ids": {"listed": num_listed, "matched": len(matched)},
    }
    keys = ("name", "samples", "bytes", "sha256", "groups")
    shards = [{key: getattr(record, key) for key in keys} for record in written]
    write_atomically(folder / "report.json", dump(report, indent=2))
    write_atomically(folder / INDEX_NAME, dump({"version": INDEX_VERSION, "shards": shards}, indent=1))
    shutil.rmtree(folder / PROGRESS_FOLDER)
    return report


def merge_skipped(records: Iterable[ShardRecord]) -> Skipped:
    """Counts of all shards."""
    merged = Skipped()
    for record in records:
        for reason, entry in record.skipped.items():
            merged.add(reason, entry["examples"], entry["count"])
    return merged


def _write_ids(folder: Path, written: Sequence[ShardRecord]) -> int:
    """Write each line once, in the order of its first image, and return the number of stored images.

    The ids of all shards can be larger than the memory: the files of the records are read twice, and only a hash of
    eight bytes is kept of each id in between.
    """
    hashes = [_hashes(_ids(folder, record.name)) for record in written]
    _, first = np.unique(np.concatenate(hashes), return_index=True)
    is_first = np.zeros(sum(map(len, hashes)), bool)
    is_first[first] = True
    temporary = folder / "ids.txt.tmp"
    start = 0
    with temporary.open("wb") as file:
        for record in written:
            names = _ids(folder, record.name)
            new = [name for name, fresh in zip(names, is_first[start:], strict=False) if fresh]
            file.write("".join(f"{name}\n" for name in new).encode(errors="surrogateescape"))
            start += len(names)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "ids.txt")
    return len(is_first)


def _hashes(names: Sequence[str]) -> NDArray[np.uint64]:
    digests = [hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), np.uint64)


def _ids(folder: Path, shard: str) -> list[str]:
    record = _read_whole_record(folder, shard)
    return [] if record is None else record.ids


def _read_whole_record(folder: Path, shard: str) -> ShardRecord | None:
    path = record_path(folder, shard)
    try:
        return ShardRecord(**read_progress(path))
    except FileNotFoundError:
        return None
    except TypeError:
        raise OutputError(not_written(path, "has other keys")) from None


def _require_same_version(folder: Path, theirs: Any, ours: dict[str, Any]) -> None:
    version = theirs.get("version") if isinstance(theirs, dict) else None
    if version != ours["version"]:
        raise OutputError(
            f"{folder} is the unfinished folder of another version of this command (version {version} there, "
            f"{ours['version']} here), whose shards hold other groups of captions; remove it, or choose another --out"
        )


def _require_same_plan(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    difference = _first_difference(theirs, ours)
    if difference:
        raise OutputError(
            f"{folder} holds the shards of another source or other options ({difference}); "
            "choose another --out or remove it"
        )


def _first_difference(theirs: Any, ours: Any, where: str = "") -> str | None:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            difference = _first_difference(theirs.get(key), ours.get(key), f"{where}.{key}".lstrip("."))
            if difference:
                return difference
        return None
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        return _first_difference(dict(enumerate(theirs)), dict(enumerate(ours)), where)
    if theirs == ours:
        return None
    if where.rpartition(".")[2] in DIGESTS and theirs is not None and ours is not None:
        return f"{where}: files came, went or changed since then"
    return f"{where}: {json.dumps(theirs)} there, {json.dumps(ours)} here"
