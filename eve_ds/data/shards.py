"""Shards of a source: find them, count their samples, and open one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from eve_ds.data.shard_bytes import FileBytes, stored_size
from eve_ds.data.shard_file import ShardFile, warn_of_other_layout
from eve_ds.data.shard_index import ShardLayout, Varints, decode
from eve_ds.data.shard_paths import INDEX_NAME, IndexEntry, expand, folder_of, name_of, read_index, refuse_other_content
from eve_ds.distributed import get_logger


class Shard(NamedTuple):
    """One tar and its number of samples."""

    address: str
    """Path or address of the tar."""
    num_samples: int
    bytes: int
    sha256: str | None
    """Hash in the index, which is believed if the size in the index is that of the tar; None: unknown."""
    groups: Varints | None = None
    """Varints of its layout in the index, believed under the same condition; None: unknown, the tar is scanned."""


def find_shards(spec: str | Sequence[str]) -> list[Shard]:
    """Find the shards of a path, a brace list, a folder, or a list of these, with their numbers of samples.

    The numbers come from `index.json` in the folder of the shards: `{"version": 2, "shards": [{"name", "samples",
    "bytes", "sha256", "groups"}, ...]}`; version 1 has no `groups`. A shard without an entry is scanned once, which
    reads its headers.

    Raises:
        ConfigError: a shard that is missing, empty or named twice, a folder without shards, an unreadable index, or
            paths of another kind; see :func:`eve_ds.data.shard_paths.expand`.
    """
    addresses = expand(spec)
    indices = {folder: read_index(folder) for folder in {folder_of(address) for address in addresses}}
    entries = [indices[folder_of(address)].get(name_of(address)) for address in addresses]
    unlisted = [address for address, entry in zip(addresses, entries, strict=True) if entry is None]
    if unlisted:
        get_logger().warning(
            "%d of %d shards have no entry in an %s, for example %s: counting their samples now, as at every start "
            "(launcher/prepare.py index FOLDER writes one)",
            len(unlisted),
            len(addresses),
            INDEX_NAME,
            unlisted[0],
        )
    sizes = [stored_size(address) for address in addresses]
    _warn_of_other_sizes(addresses, entries, sizes)
    return [_measure(*shard) for shard in zip(addresses, entries, sizes, strict=True)]


def _warn_of_other_sizes(addresses: list[str], entries: list[IndexEntry | None], sizes: list[int]) -> None:
    shards = zip(addresses, entries, sizes, strict=True)
    other = [(address, size, entry) for address, entry, size in shards if entry and entry.bytes not in (None, size)]
    if other:
        address, size, entry = other[0]
        get_logger().warning(
            "%d of %d shards do not have the size in their %s, for example %s (%d bytes, not %d; incomplete copy?): "
            "scanning their headers instead",
            len(other),
            len(addresses),
            INDEX_NAME,
            address,
            size,
            entry.bytes,
        )


def _measure(address: str, entry: IndexEntry | None, size: int) -> Shard:
    is_indexed = entry is not None and entry.bytes in (None, size)
    # A shard that was cut lacks samples of its index, each of which is counted as a bad one.
    listed = 0 if entry is None else entry.samples
    samples = listed if is_indexed else max(listed, _count(address))
    if size == 0 or samples == 0:
        refuse_other_content(address)
    if entry is None or entry.bytes != size:
        return Shard(address, samples, size, None)
    return Shard(address, samples, size, entry.sha256, entry.groups)


def _count(address: str) -> int:
    shard = open_shard(Shard(address, 0, 0, None))
    shard.close()
    return len(shard)


def open_shard(shard: Shard) -> ShardFile:
    """Open a shard with the layout of its index; the caller closes it.

    Raises:
        OSError: the storage failed.
    """
    stored = FileBytes(shard.address)
    return ShardFile(shard.address, stored, _stored_layout(shard, stored.size))


def _stored_layout(shard: Shard, size: int) -> ShardLayout | None:
    """Layout in the index; None without one, or if it is not that of such a shard."""
    if shard.groups is None or size != shard.bytes:
        return None
    try:
        return decode(shard.groups, shard.num_samples, size)
    except ValueError as error:
        warn_of_other_layout(shard.address, str(error))
        return None
