"""Headers of tars: find the members at their offsets without reading them, past damage and hostile sizes.

One bad header costs its own member only: the search goes on at the next valid header, and no size in a header is
believed that the file cannot hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from eve_ds import limits

BLOCK = 512
"""Bytes of a header; the data of a member fills whole blocks."""
_END = 21 * BLOCK
"""Most bytes of zeros that usually end a tar: two blocks, and what fills a record of twenty blocks."""
HEADER_BYTES = 4096
"""Bytes to read for a header; usually they include the headers of the caption and of the next image."""
_REGULAR = (b"0", b"\0", b"7")
"""Type flags of regular files."""
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Type flags of links, devices, folders and pipes, which have no data whatever size their header gives."""
_EXTENSIONS = (b"L", b"K", b"x", b"g")
"""Type flags of extension headers: long name, long link, pax records of the next member, of all members."""
_OCTAL = re.compile(rb"[\0 ]*([0-7]*)([\0 ].*)?", re.DOTALL)
_DECIMAL = re.compile(r"[0-9]{1,18}")


class Member(NamedTuple):
    """Regular file in a tar."""

    name: str
    header: int
    """Offset of the first header block, extension headers included."""
    end: int
    """Offset after the last byte."""
    size: int


def block_reader(descriptor: int) -> Callable[[int], bytes]:
    """Return a function that reads 512 bytes of a file at an offset through a small read-ahead buffer."""
    return read_ahead(lambda offset, size: os.pread(descriptor, size, offset))


def read_ahead(read_at: Callable[[int, int], bytes]) -> Callable[[int], bytes]:
    """Return a function that reads 512 bytes at an offset through a small buffer; `read_at` takes offset and size."""
    start, buffer = 0, b""

    def block(offset: int) -> bytes:
        nonlocal start, buffer
        if not start <= offset <= start + len(buffer) - BLOCK:
            start, buffer = offset, read_at(offset, HEADER_BYTES)
        return buffer[offset - start : offset - start + BLOCK]

    return block


class Damage(NamedTuple):
    """Place in a tar where a header should be and none is; one for each stretch without a valid header."""

    offset: int


def members(
    block: Callable[[int], bytes], size: int, verify: bool = True, again: Callable[[int], bytes] | None = None
) -> Iterator[Member]:
    """Yield the regular members that :func:`scan` finds."""
    return (found for found in scan(block, size, verify, again) if isinstance(found, Member))


def scan(
    block: Callable[[int], bytes], size: int, verify: bool = True, again: Callable[[int], bytes] | None = None
) -> Iterator[Member | Damage]:
    """Yield the regular members of a tar (ustar, GNU long names, pax) of `size` bytes, and its damage.

    After a damaged header the search continues at the next valid one, so a broken entry costs only that entry; it ends
    after `limits.TAR_DAMAGE_BYTES` without one. Zero blocks are skipped in the same way, but are no damage. A header
    whose data would extend beyond the end, or an extension header above `limits.TAR_RECORD_BYTES`, is a damaged one.

    Args:
        block: function that reads 512 bytes at an offset.
        size: size of the tar, in bytes.
        verify: whether to check the checksums of headers.
        again: function that reads 512 bytes once more where a stretch without a valid header begins, as they may have
            been read wrongly; None: `block` is right.
    """
    offset, lost, first, name, length = 0, 0, None, None, None
    reported = False
    while offset + BLOCK <= size and lost < limits.TAR_DAMAGE_BYTES:
        here = block(offset)
        header = _parse_header(here, verify)
        if header is None and again is not None and not lost and (any(here) or size - offset > _END):
            here = again(offset)
            header = _parse_header(here, verify)
        stored = 0 if header is None else _stored(header, length)
        end = offset + BLOCK + stored
        if header is None or end > size or (header.kind in _EXTENSIONS and stored > limits.TAR_RECORD_BYTES):
            if not reported and any(here):
                reported = True
                yield Damage(offset)
            offset, lost, first, name, length = offset + BLOCK, lost + BLOCK, None, None, None
            continue
        first = offset if first is None else first
        if header.kind == b"L":
            name = _text(_span(block, offset + BLOCK, stored))
        elif header.kind == b"x":
            records = _pax_records(_span(block, offset + BLOCK, stored))
            name, length = records.get("path", name), _decimal(records.get("size")) or length
        elif header.kind not in _EXTENSIONS:
            if header.kind in _REGULAR:
                yield Member(name or header.name, first, end, stored)
            first, name, length = None, None, None
        offset, lost, reported = round_up(end), 0, False
    if offset < size < offset + BLOCK and any(block(offset)):
        yield Damage(offset)


def round_up(offset: int) -> int:
    """Offset of the block that begins at or after an offset."""
    return -(-offset // BLOCK) * BLOCK


class _Header(NamedTuple):
    name: str
    size: int
    kind: bytes


def _stored(header: _Header, length: int | None) -> int:
    """Bytes of data behind a header; `length` is the size in pax records, which belongs to the next regular member."""
    if header.kind in _WITHOUT_DATA:
        return 0
    return header.size if length is None or header.kind in _EXTENSIONS else length


def _parse_header(block: bytes, verify: bool) -> _Header | None:
    """Parse one header block; None if its checksum is wrong (POSIX.1-2017, pax, "ustar Interchange Format")."""
    try:
        if len(block) < BLOCK:
            return None
        checksum = _number(block[148:156])
        if verify and sum(block) - sum(block[148:156]) + 8 * 32 != checksum:
            return None
        size = _number(block[124:136])
    except ValueError:
        return None
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    return _Header(name, size, block[156:157])


def _number(data: bytes) -> int:
    """Parse a number of a header; raises ValueError for one that is negative or not octal."""
    if data[0] == 0x80:  # GNU extension: base 256, for sizes of 8 GiB and more
        return int.from_bytes(data[1:], "big")
    match = _OCTAL.fullmatch(data)
    if match is None:
        raise ValueError("not an octal number")
    return int(match[1] or b"0", 8)


def _decimal(text: str | None) -> int | None:
    return int(text) if text and _DECIMAL.fullmatch(text) else None


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _span(block: Callable[[int], bytes], offset: int, length: int) -> bytes:
    return b"".join(block(offset + done) for done in range(0, length, BLOCK))[:length]


def _pax_records(data: bytes) -> dict[str, str]:
    """Parse records of the form `LENGTH KEY=VALUE\\n`, where LENGTH is that of the whole record."""
    records = {}
    start = 0
    while start < len(data):
        space = data.find(b" ", start, start + len(str(limits.TAR_RECORD_BYTES)) + 1)
        length = _decimal(data[start:space].decode("latin-1")) if space > start else None
        if length is None or start + length <= space:
            break
        key, _, value = data[space + 1 : start + length - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        start += length
    return records
