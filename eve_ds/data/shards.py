"""Shards of a source: find them, count their samples, and open one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from eve_ds.config import DataConfig
from eve_ds.data.failed_download import failed_download
from eve_ds.data.index_file import INDEX_NAME, IndexEntry, Indices
from eve_ds.data.remote.addresses import is_remote
from eve_ds.data.remote.errors import RemoteError, wrong_content
from eve_ds.data.remote.storage import RemoteStorage
from eve_ds.data.shard_bytes import FileBytes, ShardBytes, stored_size
from eve_ds.data.shard_file import ShardFile, warn_of_other_layout
from eve_ds.data.shard_index import ShardLayout, Varints, decode, decode_text, encode
from eve_ds.data.shard_paths import expand, folder_of, name_of, refuse_other_content
from eve_ds.log import get_logger
from eve_ds.printable import without_credentials


class Shard(NamedTuple):
    """One tar and its number of samples."""

    address: str
    """Path or address of the tar."""
    num_samples: int
    bytes: int
    sha256: str | None
    """Hash in the index, which is believed if the size in the index is that of the tar; None: unknown."""
    groups: Varints | None = None
    """Varints of its layout in the index, believed under the same condition, or by a scan when it was found; None:
    unknown, whoever opens the tar scans it."""


def find_shards(spec: str | Sequence[str], remote: RemoteStorage | None = None) -> list[Shard]:
    """Find the shards of a path or address, a brace list, a folder, or a list of these, with their numbers of samples.

    The numbers come from `index.json` in the folder of the shards: `{"version": 2, "shards": [{"name", "samples",
    "bytes", "sha256", "groups"}, ...]}`; version 1 has no `groups`. A shard without an entry is scanned once, which
    reads its headers. An address with an entry is believed to exist until it is opened.

    Args:
        spec: see :func:`eve_ds.data.shard_paths.expand`.
        remote: storage of shards at addresses; None: one with the default settings.

    Raises:
        ConfigError: a shard that is missing, empty or named twice, a folder without shards, an unreadable index, or
            paths of another kind; see :func:`eve_ds.data.shard_paths.expand`.
        RemoteError: a server cannot be read.
    """
    remote = RemoteStorage(DataConfig()) if remote is None else remote
    indices = Indices(remote)
    addresses = expand(spec, indices)
    entries = [indices.beside(folder_of(address)).get(name_of(address)) for address in addresses]
    unlisted = [address for address, entry in zip(addresses, entries, strict=True) if entry is None]
    if unlisted:
        get_logger().warning(
            "%d of %d shards have no entry in an %s, for example %s: counting their samples now, as at every start "
            "(launcher/prepare.py index FOLDER writes one)",
            len(unlisted),
            len(addresses),
            INDEX_NAME,
            without_credentials(unlisted[0]),
        )
    opened = _open_unlisted(addresses, entries, remote)
    sizes = [
        _size(address, entry) if seen is None else seen.size
        for address, entry, seen in zip(addresses, entries, opened, strict=True)
    ]
    _warn_of_other_sizes(addresses, entries, sizes)
    return [_measure(*shard, remote) for shard in zip(addresses, entries, sizes, opened, strict=True)]


class _Scan(NamedTuple):
    """What is found in a shard itself."""

    size: int
    samples: int
    groups: Varints
    """Its layout; short, as all shards of a source are scanned before the first is used."""


def _open_unlisted(addresses: list[str], entries: list[IndexEntry | None], remote: RemoteStorage) -> list[_Scan | None]:
    """Open the shards at addresses whose size no index has, many at the same time; None for others."""
    futures = [
        remote.submit(address, partial(_scanned, address, remote))
        if is_remote(address) and (entry is None or entry.bytes is None)
        else None
        for address, entry in zip(addresses, entries, strict=True)
    ]
    try:
        return [None if future is None else future.result() for future in futures]
    finally:
        for future in futures:
            if future is not None:
                future.cancel()  # after an error of one of them


def _size(address: str, entry: IndexEntry | None) -> int:
    """Bytes of a shard; those of the index for an address, which are compared when it is opened."""
    return entry.bytes if is_remote(address) and entry and entry.bytes is not None else stored_size(address)


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


def _measure(address: str, entry: IndexEntry | None, size: int, scan: _Scan | None, remote: RemoteStorage) -> Shard:
    is_indexed = scan is None and entry is not None and entry.bytes in (None, size)
    # A shard that was cut lacks samples of its index, each of which is counted as a bad one.
    listed = 0 if entry is None else entry.samples
    scan = None if is_indexed else scan or _scanned(address, remote)
    samples = listed if scan is None else max(listed, scan.samples)
    if size == 0 or samples == 0:
        refuse_other_content(address, _open_bytes(address, remote))
    if entry is not None and entry.bytes == size:
        return Shard(address, samples, size, entry.sha256, entry.groups)
    # Other ranks and workers need not repeat the scan.
    groups = scan.groups if scan is not None and scan.samples == samples else None
    return Shard(address, samples, size, None, groups)


def _scanned(address: str, remote: RemoteStorage) -> _Scan:
    stored = _open_bytes(address, remote)
    shard = ShardFile(address, stored)
    shard.close()
    return _Scan(stored.size, len(shard), decode_text(encode(shard.layout)))


def _open_bytes(address: str, remote: RemoteStorage, digest: str | None = None) -> ShardBytes:
    return remote.open(address, digest or "") if is_remote(address) else FileBytes(address)


def open_shard(shard: Shard, remote: RemoteStorage | None = None) -> ShardFile:
    """Open a shard with the layout of its index; the caller closes it.

    Raises:
        OSError: the disk failed.
        RemoteError: the server cannot be read, or has another object than the index or than before.
    """
    stored = _open_bytes(shard.address, RemoteStorage(DataConfig()) if remote is None else remote, shard.sha256)
    if is_remote(shard.address) and stored.size != shard.bytes:
        if (found := failed_download(stored.read_at(0, 512))) is not None:
            raise RemoteError(wrong_content(shard.address, f"{found}, not a tar"))
        raise RemoteError(
            f"shard {without_credentials(shard.address)} has {stored.size:,} bytes, not {shard.bytes:,} as its "
            f"{INDEX_NAME} says or as when the run started: upload the shard again, or write the index again with "
            "launcher/prepare.py index"
        )
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
