"""Write one shard: check its candidates, write an image once with all its captions, and count what is left out."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from eve_ds.data.caption_text import decode_caption
from eve_ds.data.errors import BadSample
from eve_ds.data.image_check import encode_for_shard
from eve_ds.data.importers.candidate import Candidate, LazyCandidate, Skip
from eve_ds.data.sample_names import written_key
from eve_ds.data.shard_index import ShardLayout, encode
from eve_ds.data.writing.excluded_ids import read_ids
from eve_ds.data.writing.options import WriterOptions
from eve_ds.data.writing.progress_files import PROGRESS_FOLDER, dump, record_path, write_atomically
from eve_ds.printable import excerpt

EXAMPLES_PER_REASON = 5
"""Names of skipped samples to keep for each reason."""


@dataclass
class Skipped:
    """Counts of skipped samples, with a few names per reason."""

    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, reason: str, names: Iterable[str], count: int = 1) -> None:
        """Count skipped samples for a reason."""
        entry = self.reasons.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += count
        entry["examples"] = (entry["examples"] + [excerpt(name) for name in names])[:EXAMPLES_PER_REASON]

    @property
    def count(self) -> int:
        """Number of skipped samples over all reasons."""
        return sum(entry["count"] for entry in self.reasons.values())


@dataclass(frozen=True)
class ShardTask:
    """Candidates of one shard; `first_index` is the index of the first candidate in the source."""

    number: int
    first_index: int
    candidates: tuple[LazyCandidate, ...]
    skipped: Skipped
    """Samples that the importer left out on the way; counted, as millions may follow one another."""

    @property
    def name(self) -> str:
        """File name of the shard."""
        return f"shard-{self.number:06d}.tar"


@dataclass
class ShardRecord:
    """Result of a task; if `samples` is 0, no file was written."""

    name: str
    candidates: int
    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    groups: str = ""
    """Layout of the shard, see :func:`eve_ds.data.shard_index.encode`."""
    ids: list[str] = field(default_factory=list)
    """Lines of ids.txt, one for each stored image; in the file of the record only, as those of all shards would fill
    the memory."""
    excluded: list[str] = field(default_factory=list)
    """Lines of the exclusion files that matched a candidate."""
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Reason -> count and examples; see :class:`Skipped`."""


def split_into_tasks(source: Iterable[LazyCandidate | Skip], options: WriterOptions) -> Iterator[ShardTask]:
    """Divide a source into shards; candidates that the importer itself skips do not count toward the shard size."""
    candidates: list[LazyCandidate] = []
    skipped = Skipped()
    number = first_index = captions = 0
    for item in source:
        if isinstance(item, Skip):
            skipped.add(item.reason, [item.name])
            continue
        candidates.append(item)
        captions += item.num_captions
        at_limit = first_index + len(candidates) == options.limit
        if captions >= options.samples_per_shard or at_limit:
            yield ShardTask(number, first_index, tuple(candidates), skipped)
            number, first_index = number + 1, first_index + len(candidates)
            candidates, skipped, captions = [], Skipped(), 0
        if at_limit:
            return
    if candidates or skipped.count:
        yield ShardTask(number, first_index, tuple(candidates), skipped)


def write_shard(task: ShardTask, folder: Path, options: WriterOptions) -> ShardRecord:
    """Check and write the samples of one shard, then its record, each by an atomic rename.

    Returns:
        The record without its ids.
    """
    skipped = copy.deepcopy(task.skipped)
    record = ShardRecord(task.name, len(task.candidates), skipped=skipped.reasons)
    temporary = folder / PROGRESS_FOLDER / f"{task.name}.{os.getpid()}.tmp"
    with temporary.open("w+b") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            groups: list[tuple[int, int, int]] = []
            for index, candidate in enumerate(task.candidates, start=task.first_index):
                groups += _write_candidate(tar, index, candidate, options, record, skipped)
        file.flush()
        os.fsync(file.fileno())
        record.bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        record.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    record.groups = encode(ShardLayout(*np.array(groups, dtype=np.int64).reshape(-1, 3).T))
    if record.samples:
        temporary.replace(folder / task.name)
    else:
        temporary.unlink()
    write_atomically(record_path(folder, task.name), dump(asdict(record)))
    return replace(record, ids=[])


def _write_candidate(
    tar: tarfile.TarFile,
    index: int,
    lazy: LazyCandidate,
    options: WriterOptions,
    record: ShardRecord,
    skipped: Skipped,
) -> list[tuple[int, int, int]]:
    """Write the group of a candidate; returns its first and last byte and its number of captions, nothing if unused."""
    try:
        candidate = lazy.resolve()
        _require_not_excluded(candidate, options, record)
        captions = _usable_captions(candidate, options.unescape_html, skipped)
        if not captions:
            return []
        image, suffix = encode_for_shard(candidate.image.read(), options.max_size, options.quality)
    except BadSample as bad:
        skipped.add(bad.reason, [lazy.name])
        return []
    start, key = tar.offset, written_key(index, None)
    _add_member(tar, f"{key}.{suffix}", image)
    for number, caption in captions:
        _add_member(tar, f"{key}.txt" if candidate.num_captions == 1 else f"{key}.{number}.txt", caption)
    _add_member(tar, f"{key}.json", dump({"image_id": candidate.image_id, "name": candidate.name}))
    record.samples += len(captions)
    record.ids.append(candidate.id_line())
    return [(start, tar.offset, len(captions))]


def _require_not_excluded(candidate: Candidate, options: WriterOptions, record: ShardRecord) -> None:
    if not options.exclude_ids:
        return
    matches = read_ids(options.exclude_ids).matching(candidate.names())
    if matches:
        record.excluded += sorted(matches)
        raise BadSample("excluded id")


def _usable_captions(candidate: Candidate, unescape_html: bool, skipped: Skipped) -> list[tuple[int, bytes]]:
    """Return usable captions as UTF-8 with their index; each unusable caption is counted as skipped."""
    usable = []
    for number, caption in enumerate(candidate.captions):
        try:
            usable.append((number, decode_caption(caption, unescape_html).encode("utf-8")))
        except BadSample as bad:
            skipped.add(bad.reason, [candidate.name])
    return usable


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # A new TarInfo has mtime, uid and gid 0, no owner names and mode 0644: independent of machine and time.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
