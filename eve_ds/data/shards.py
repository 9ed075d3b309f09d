"""Shards: count their samples, and read any sample of a tar directly.

`webdataset` reads a tar from front to back. This module reads the headers of a shard once; after that, any sample is
one read at a known offset, so a resumed run, a rank or a worker reads only the bytes of its own samples. Members are
grouped into samples by the rules of `webdataset`.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eve_ds import limits
from eve_ds.data.errors import BadSample
from eve_ds.data.sample_names import split_name
from eve_ds.data.shard_paths import INDEX_NAME, IndexEntry, expand, read_index, refuse_other_content
from eve_ds.data.tar_headers import BLOCK, block_reader, members, round_up
from eve_ds.distributed import get_logger


class Shard(NamedTuple):
    """One tar and its number of samples."""

    path: Path
    num_samples: int
    bytes: int
    sha256: str | None
    """Hash in the index, which is believed if the size in the index is that of the file; None: unknown."""


def find_shards(spec: str | Sequence[str]) -> list[Shard]:
    """Find the shards of a path, a brace list, a folder, or a list of these, with their numbers of samples.

    The numbers come from `index.json` in the folder of the shards: `{"version": 1, "shards": [{"name", "samples",
    "bytes", "sha256"}, ...]}`. A shard without an entry is scanned once, which reads its headers.

    Raises:
        ConfigError: a shard that is missing, empty or named twice, a folder without shards, an unreadable index, or
            paths of another kind; see :func:`eve_ds.data.shard_paths.expand`.
    """
    paths = expand(spec)
    indices = {folder: read_index(folder) for folder in {path.parent for path in paths}}
    unlisted = [path for path in paths if path.name not in indices[path.parent]]
    if unlisted:
        get_logger().warning(
            "%d of %d shards have no entry in an %s, for example %s: counting their samples now, as at every start",
            len(unlisted),
            len(paths),
            INDEX_NAME,
            unlisted[0],
        )
    return [_measure(path, indices[path.parent].get(path.name)) for path in paths]


def _measure(path: Path, entry: IndexEntry | None) -> Shard:
    size = path.stat().st_size
    samples = _count(path) if entry is None else entry.samples
    if entry is not None and entry.bytes not in (None, size):
        get_logger().warning(
            "shard %s has %d bytes, its %s says %d: incomplete copy?", path, size, INDEX_NAME, entry.bytes
        )
    if size == 0 or samples == 0:
        refuse_other_content(path)
    return Shard(path, samples, size, entry.sha256 if entry is not None and entry.bytes == size else None)


def _count(path: Path) -> int:
    shard = ShardFile(path)
    shard.close()
    return len(shard)


class ShardFile:
    """Random access to the samples of one tar.

    Args:
        path: path of the tar; the constructor reads its headers, not its members.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115, closed in close()
        self._starts, self._ends = array("q"), array("q")
        self._gaps: set[int] = set()
        """Indices of samples with data between their members that is not a member, such as a damaged header."""
        self._scan()

    def _scan(self) -> None:
        key, last_end = None, 0
        for member in members(block_reader(self._file.fileno()), os.fstat(self._file.fileno()).st_size):
            prefix = split_name(member.name)[0]
            if prefix is None:
                continue
            if prefix != key:
                key = prefix
                self._starts.append(member.header)
                self._ends.append(0)
            elif member.header != round_up(last_end):
                self._gaps.add(len(self) - 1)
            self._ends[-1] = last_end = member.end

    def __len__(self) -> int:
        """Number of readable samples; a damaged tar has fewer than were written."""
        return len(self._starts)

    def key(self, number: int) -> str:
        """Read the key of one sample from the header of its first member.

        Raises:
            BadSample: a damaged tar lacks the sample.
        """
        if number >= len(self):
            raise BadSample("broken tar entry", f"only {len(self)} samples can be found in the shard")
        start, size = self._starts[number], self._ends[number] - self._starts[number]
        found = members(lambda offset: os.pread(self._file.fileno(), BLOCK, start + offset), size, verify=False)
        return next(prefix for member in found if (prefix := split_name(member.name)[0]) is not None)

    def read(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Read the key and the members (lower-case extension -> bytes) of one sample.

        Raises:
            BadSample: a damaged tar lacks the sample, the sample has two members with the same extension, or it exceeds
                a cap of :mod:`eve_ds.limits`.
        """
        if number >= len(self):
            raise BadSample("broken tar entry", f"only {len(self)} samples can be found in the shard")
        data = self._span(self._starts[number], self._ends[number])
        fields: dict[str, bytes] = {}
        key = ""
        # Checksums were verified when the shard was opened; adjacent members need no second check.
        for member in members(lambda offset: data[offset : offset + BLOCK], len(data), verify=number in self._gaps):
            prefix, extension = split_name(member.name)
            if prefix is None or extension is None:
                continue
            key, extension = prefix, extension.lower()
            if extension in fields:
                raise BadSample("duplicate member", f"{member.name} occurs twice")
            if len(fields) == limits.SAMPLE_MEMBERS:
                raise BadSample("too large a sample", f"more than {limits.SAMPLE_MEMBERS} members")
            fields[extension] = data[member.end - member.size : member.end]
        return key, fields

    def _span(self, start: int, end: int) -> bytes:
        if end - start > limits.SAMPLE_BYTES:
            raise BadSample("too large a sample", f"{end - start:,} bytes, more than {limits.SAMPLE_BYTES:,}")
        data = os.pread(self._file.fileno(), end - start, start)
        if len(data) < end - start:
            raise BadSample("broken tar entry", "the shard is shorter than when it was opened")
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()
