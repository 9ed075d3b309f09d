"""Random access to the samples of one tar.

`webdataset` reads a tar from front to back. Here any sample is one read at a known offset, so a resumed run, a rank or
a worker reads only the bytes of its own samples. The offsets come from the index of the folder, or from a scan of the
headers (:mod:`eve_ds.data.shard_index`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import NamedTuple

from eve_ds import limits
from eve_ds.data.errors import BadSample
from eve_ds.data.sample_names import caption_label, split_name
from eve_ds.data.shard_bytes import ShardBytes
from eve_ds.data.shard_index import ShardLayout, scan_layout
from eve_ds.data.tar_headers import BLOCK, HEADER_BYTES, Member, members, read_ahead, round_up
from eve_ds.log import get_logger
from eve_ds.printable import without_credentials


class StoredSample(NamedTuple):
    """One sample as it is stored."""

    key: str
    fields: dict[str, bytes]
    """Lower-case extension -> bytes of the member; the caption is `txt`."""
    image: str
    """Key of the members: that of the sample, without the number of its caption."""


class ShardFile:
    """Random access to the samples of one tar.

    Args:
        address: path or address, for messages.
        stored: the tar; :meth:`close` closes it.
        layout: layout of the tar; None: the constructor reads all headers.
    """

    def __init__(self, address: str, stored: ShardBytes, layout: ShardLayout | None = None) -> None:
        self.address, self._stored = without_credentials(address), stored
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
        place = self._place(self._group(number)[0])
        first = _first_part(self._stored.read_at, *place)
        if first is None or first.member.header != 0:
            first = _first_part(self._stored.reread, *place)
        if (first is None or first.member.header != 0) and self._has_other_layout():
            return self.image(number)
        if first is None:
            raise BadSample("broken tar entry", "no member stands where the index says")
        return first.key

    def images(self, span: int, ahead: int) -> Iterator[str | None]:
        """Yield the key of the image of each sample, in order; None where a damaged tar lacks the sample.

        Args:
            span: bytes of a read, which has the headers of as many groups as stand in them; of a group that is longer
                only its header is read.
            ahead: number of reads that are announced before they are needed.
        """
        number = 0
        for key in self._images_of_spans(span, ahead):
            yield key
            number += 1
        while number < len(self):  # some header is not where the index says: the tar may have another layout
            yield self._image_or_none(number)
            number += 1

    def _images_of_spans(self, span: int, ahead: int) -> Iterator[str]:
        """Yield the keys of images up to the first header that is not where the index says."""
        for groups, data in self._headers(span, ahead):
            for group in groups:
                key = self._first_key(group, int(self.layout.starts[group] - self.layout.starts[groups[0]]), data)
                if key is None:
                    return
                yield from repeat(key, max(int(self.layout.captions[group]), 1))

    def _headers(self, span: int, ahead: int) -> Iterator[tuple[range, bytes]]:
        """Yield groups that stand in one span, with the bytes from the first one to the header of the last one."""
        spans = list(self._spans(span))
        wanted = 0
        for index, (groups, start, size) in enumerate(spans):
            for _, *later in spans[wanted : index + 1 + ahead]:
                self._stored.want(*later)
            wanted = index + 1 + ahead
            yield groups, self._stored.read_at(start, size)

    def _spans(self, span: int) -> Iterator[tuple[range, int, int]]:
        """Yield (groups, first byte, bytes) for each read."""
        starts, first = self.layout.starts, 0
        while first < len(starts):
            end = max(int(starts.searchsorted(starts[first] + span - HEADER_BYTES, side="right")), first + 1)
            start = int(starts[first])
            yield range(first, end), start, min(int(starts[end - 1]) + HEADER_BYTES, self._stored.size) - start
            first = end

    def _first_key(self, group: int, place: int, data: bytes) -> str | None:
        """Key of a group whose first header stands at a place in `data`; None if there is none."""
        start, end = self._place(group)

        def block(offset: int) -> bytes:
            found = data[place + offset : place + offset + BLOCK]
            return found if len(found) == BLOCK else self._stored.read_at(start + offset, BLOCK)

        first = next(_parts(block, end - start), None)
        return None if first is None or first.member.header != 0 else first.key

    def _image_or_none(self, number: int) -> str | None:
        try:
            return self.image(number)
        except BadSample:
            return None

    def describe_caption(self, number: int) -> str:
        """Name the caption of a sample behind the sample, for messages; "" if the image has only one."""
        if number >= len(self):
            return ""
        group, sample = self.layout.locate(number)
        captions = int(self.layout.captions[group])
        return f" (caption {sample} of the {captions} of image {group})" if captions > 1 else ""

    def read(self, number: int, again: bool = False) -> StoredSample:
        """Read one sample.

        A sample of a group with numbered captions has its own as `txt`, whose number is in the key: KEY-N. If the
        members are not those of the layout, a server is asked once more before the tar counts as damaged.

        Args:
            number: number of the sample in the shard.
            again: whether to read past all caches, since what was read before seems to be damaged.

        Raises:
            BadSample: a damaged tar lacks the sample, the sample has two members with the same extension, or it exceeds
                a cap of :mod:`eve_ds.limits`.
        """
        group, sample = self._group(number)
        data = self._span(*self._place(group), again)
        parts = list(_parts(lambda offset: data[offset : offset + BLOCK], len(data)))
        if not self._agrees(parts, group):
            if not again:
                return self.read(number, again=True)
            if self._has_other_layout():
                return self.read(number)
        if not parts:
            raise BadSample("broken tar entry", "no member stands where the index says")
        fields = _fields(parts, data)
        labels = [name for name in fields if caption_label(name) is not None]
        if sample and sample >= len(labels):
            raise BadSample("broken tar entry", f"only {len(labels)} captions can be found in the group")
        return _own_caption(parts[0].key, fields, labels[sample : sample + 1])

    def want(self, number: int) -> None:
        """Announce a :meth:`read`, which then waits less."""
        if number < len(self):
            start, end = self._place(self.layout.locate(number)[0])
            if end - start <= limits.SAMPLE_BYTES:
                self._stored.want(start, end - start)

    def _group(self, number: int) -> tuple[int, int]:
        if number >= len(self):
            raise BadSample("broken tar entry", f"only {len(self)} samples can be found in the shard")
        return self.layout.locate(number)

    def _place(self, group: int) -> tuple[int, int]:
        start, end = int(self.layout.starts[group]), int(self.layout.ends[group])
        return start, max(min(end, self._stored.size), start)

    def _span(self, start: int, end: int, again: bool) -> bytes:
        if end - start > limits.SAMPLE_BYTES:
            raise BadSample("too large a sample", f"{end - start:,} bytes, more than {limits.SAMPLE_BYTES:,}")
        data = (self._stored.reread if again else self._stored.read_at)(start, end - start)
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
        warn_of_other_layout(self.address, f"{len(found)} samples found")
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


def _first_part(read_at: Callable[[int, int], bytes], start: int, end: int) -> _Part | None:
    """First member of the group between two offsets."""
    block = read_ahead(lambda offset, size: read_at(start + offset, size))
    return next(_parts(block, end - start), None)


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


def warn_of_other_layout(address: str, problem: str) -> None:
    """Log that a shard is scanned, although an index has its layout."""
    get_logger().warning(
        "shard %s has another layout than its index says (%s): scanning its headers instead; write the index again "
        "with launcher/prepare.py index",
        without_credentials(address),
        problem,
    )
