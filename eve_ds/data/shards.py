"""Shards: count their samples, and read any sample of a tar directly.

`webdataset` reads a tar from front to back. Here any sample is one read at a known offset, so a resumed run, a rank or
a worker reads only the bytes of its own samples. The offsets come from the index of the folder, or from a scan of the
headers (:mod:`eve_ds.data.shard_index`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from eve_ds import limits
from eve_ds.config import DataConfig
from eve_ds.data.errors import BadSample
from eve_ds.data.remote.errors import RemoteError
from eve_ds.data.remote.storage import RemoteStorage
from eve_ds.data.sample_names import caption_label, split_name
from eve_ds.data.shard_bytes import FileBytes, ShardBytes, stored_size
from eve_ds.data.shard_index import ShardLayout, Varints, decode, scan_layout
from eve_ds.data.shard_paths import (
    INDEX_NAME,
    IndexEntry,
    Indices,
    expand,
    folder_of,
    is_remote,
    name_of,
    refuse_other_content,
)
from eve_ds.data.tar_headers import BLOCK, Member, members, read_ahead, round_up
from eve_ds.distributed import get_logger
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
    """Varints of its layout in the index, believed under the same condition; None: unknown, the tar is scanned."""


class StoredSample(NamedTuple):
    """One sample as it is stored."""

    key: str
    fields: dict[str, bytes]
    """Lower-case extension -> bytes of the member; the caption is `txt`."""
    image: str
    """Key of the members: that of the sample, without the number of its caption."""


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
    entries = [indices.of(folder_of(address)).get(name_of(address)) for address in addresses]
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
    sizes = [_size(address, entry, remote) for address, entry in zip(addresses, entries, strict=True)]
    _warn_of_other_sizes(addresses, entries, sizes)
    return [_measure(*shard, remote) for shard in zip(addresses, entries, sizes, strict=True)]


def _size(address: str, entry: IndexEntry | None, remote: RemoteStorage) -> int:
    """Bytes of a shard; those of the index for an address, which are compared when it is opened."""
    if not is_remote(address):
        return stored_size(address)
    return remote.open(address).size if entry is None or entry.bytes is None else entry.bytes


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


def _measure(address: str, entry: IndexEntry | None, size: int, remote: RemoteStorage) -> Shard:
    is_indexed = entry is not None and entry.bytes in (None, size)
    # A shard that was cut lacks samples of its index, each of which is counted as a bad one.
    listed = 0 if entry is None else entry.samples
    samples = listed if is_indexed else max(listed, _count(address, remote))
    if size == 0 or samples == 0:
        refuse_other_content(address, size, _open_bytes(address, remote).read_at(0, 64))
    if entry is None or entry.bytes != size:
        return Shard(address, samples, size, None)
    return Shard(address, samples, size, entry.sha256, entry.groups)


def _count(address: str, remote: RemoteStorage) -> int:
    shard = ShardFile(address, _open_bytes(address, remote))
    shard.close()
    return len(shard)


def _open_bytes(address: str, remote: RemoteStorage) -> ShardBytes:
    return remote.open(address) if is_remote(address) else FileBytes(address)


def open_shard(shard: Shard, remote: RemoteStorage) -> ShardFile:
    """Open a shard with the layout of its index; the caller closes it.

    Raises:
        OSError: the disk failed.
        RemoteError: the server cannot be read, or has another object than the index or than before.
    """
    stored = _open_bytes(shard.address, remote)
    if is_remote(shard.address) and stored.size != shard.bytes:
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
        _warn_of_other_layout(shard.address, str(error))
        return None


def _warn_of_other_layout(address: str, problem: str) -> None:
    get_logger().warning(
        "shard %s has another layout than its %s says (%s): scanning its headers instead; write the index again with "
        "launcher/prepare.py index",
        address,
        INDEX_NAME,
        problem,
    )


class ShardFile:
    """Random access to the samples of one tar.

    Args:
        address: path or address, for messages.
        stored: the tar; :meth:`close` closes it.
        layout: layout of the tar; None: the constructor reads all headers.
    """

    def __init__(self, address: str, stored: ShardBytes, layout: ShardLayout | None = None) -> None:
        self.address, self._stored = address, stored
        self._is_scanned = layout is None
        self.layout = scan_layout(stored) if layout is None else layout

    def __len__(self) -> int:
        """Number of samples; a damaged tar without an index has fewer than were written."""
        return len(self.layout)

    def image(self, number: int) -> str:
        """Read the key of the image of a sample from the header of its first member.

        Raises:
            BadSample: a damaged tar lacks the sample.
        """
        start, end = self._place(self._group(number)[0])
        block = read_ahead(lambda offset, size: self._stored.read_at(start + offset, size))
        first = next(_parts(block, end - start), None)
        if (first is None or first.member.header != 0) and self._has_other_layout():
            return self.image(number)
        if first is None:
            raise BadSample("broken tar entry", "no member stands where the index says")
        return first.key

    def read(self, number: int) -> StoredSample:
        """Read one sample.

        A sample of a group with numbered captions has its own as `txt`, whose number is in the key: KEY-N.

        Raises:
            BadSample: a damaged tar lacks the sample, the sample has two members with the same extension, or it exceeds
                a cap of :mod:`eve_ds.limits`.
        """
        group, sample = self._group(number)
        data = self._span(*self._place(group))
        parts = list(_parts(lambda offset: data[offset : offset + BLOCK], len(data)))
        if not self._agrees(parts, group) and self._has_other_layout():
            return self.read(number)
        if not parts:
            raise BadSample("broken tar entry", "no member stands where the index says")
        fields = _fields(parts, data)
        labels = [name for name in fields if caption_label(name) is not None]
        if sample and sample >= len(labels):
            raise BadSample("broken tar entry", f"only {len(labels)} captions can be found in the group")
        return _own_caption(parts[0].key, fields, labels[sample : sample + 1])

    def _group(self, number: int) -> tuple[int, int]:
        if number >= len(self):
            raise BadSample("broken tar entry", f"only {len(self)} samples can be found in the shard")
        return self.layout.locate(number)

    def _place(self, group: int) -> tuple[int, int]:
        return int(self.layout.starts[group]), min(int(self.layout.ends[group]), self._stored.size)

    def _span(self, start: int, end: int) -> bytes:
        if end - start > limits.SAMPLE_BYTES:
            raise BadSample("too large a sample", f"{end - start:,} bytes, more than {limits.SAMPLE_BYTES:,}")
        data = self._stored.read_at(start, end - start)
        if len(data) < end - start:
            raise BadSample("broken tar entry", "the shard is shorter than when it was opened")
        return data

    def _agrees(self, parts: list[_Part], group: int) -> bool:
        """Whether members are all those of a group of the layout, and of one image."""
        if not parts or len({part.key for part in parts}) > 1:
            return False
        labels = {caption_label(part.extension) for part in parts} - {None}
        blocks = int(self.layout.ends[group] - self.layout.starts[group])
        last = round_up(parts[-1].member.end)
        return parts[0].member.header == 0 and last == blocks and len(labels) == self.layout.captions[group]

    def _has_other_layout(self) -> bool:
        """Whether the tar is not the one that was indexed; then its own layout takes effect.

        In a tar that was damaged later, the other samples keep their numbers, since other workers use them.
        """
        if self._is_scanned:
            return False
        self._is_scanned = True
        found = scan_layout(self._stored)
        if self.layout.contains(found):
            return False
        _warn_of_other_layout(self.address, f"{len(found)} samples found")
        self.layout = found
        return True

    def close(self) -> None:
        """Close the tar."""
        self._stored.close()


class _Part(NamedTuple):
    """Member of a group."""

    key: str
    extension: str
    member: Member


def _parts(block: Callable[[int], bytes], size: int) -> Iterator[_Part]:
    for member in members(block, size):
        key, extension = split_name(member.name)
        if key is not None and extension is not None:
            yield _Part(key, extension.lower(), member)


def _fields(parts: list[_Part], data: bytes) -> dict[str, bytes]:
    if len(parts) > limits.SAMPLE_MEMBERS:
        raise BadSample("too large a sample", f"more than {limits.SAMPLE_MEMBERS} members")
    fields: dict[str, bytes] = {}
    for _, extension, member in parts:
        if extension in fields:
            raise BadSample("duplicate member", f"{member.name} occurs twice")
        fields[extension] = data[member.end - member.size : member.end]
    return fields


def _own_caption(image: str, fields: dict[str, bytes], own: list[str]) -> StoredSample:
    """Sample whose caption is the member with the extension in `own`."""
    left = {name: data for name, data in fields.items() if caption_label(name) is None}
    key = image
    for name in own:
        left["txt"], number = fields[name], caption_label(name)
        key = f"{image}-{number}" if number else image
    return StoredSample(key, left, image)
