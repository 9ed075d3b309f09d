"""Shards: list them, count their samples, and read any sample of a tar directly.

`webdataset` reads a tar from front to back. This module reads the headers of a shard once; after that, any sample is
one read at a known offset, so a resumed run, a rank or a worker reads only the bytes of its own samples. Members are
grouped into samples by the rules of `webdataset`.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from eve_ds.config import ConfigError
from eve_ds.data.errors import BadSample
from eve_ds.distributed import get_logger

INDEX_NAME = "index.json"
INDEX_VERSION = 1

_BLOCK = 512
_READ_AHEAD = 4096
"""Bytes to read for a header; usually they include the headers of the caption and of the next image."""
_META = re.compile(r"__[^/]*__($|/)")
"""Names that `webdataset` reserves."""
_REGULAR = (b"0", b"\0", b"7")
"""Type flags of regular files."""


class Shard(NamedTuple):
    """One tar and its number of samples."""

    path: Path
    num_samples: int


def find_shards(spec: str | Sequence[str]) -> list[Shard]:
    """Find the shards of a path, a brace list, a folder, or a list of these, with their numbers of samples.

    The numbers come from `index.json` in the folder of the shards: `{"version": 1, "shards": [{"name", "samples",
    "bytes", "sha256"}, ...]}`. A shard without an entry is scanned once, which reads its headers.

    Raises:
        ConfigError: a shard that is missing, empty or named twice, a folder without shards, an unreadable index.
    """
    paths = [path for item in ([spec] if isinstance(spec, str) else spec) for path in _expand(item)]
    _refuse_repeated(paths)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(
            f"shard {missing[0]} does not exist ({len(missing)} of {len(paths)} shards are missing); "
            "check data.sources.shards"
        )
    indices: dict[Path, dict[str, dict[str, Any]]] = {
        folder: _read_index(folder) for folder in {path.parent for path in paths}
    }
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


def _expand(item: str) -> list[Path]:
    try:
        names = expand_urls(item)
    except (ValueError, AssertionError) as error:  # unbalanced braces, or ${NAME} without a variable WDS_NAME
        raise ConfigError(f"data.sources.shards '{item}' cannot be expanded: {error}") from None
    return [path for name in names for path in _expand_folder(Path(name).expanduser())]


def _expand_folder(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    shards = [path / name for name in _read_index(path)] or sorted(path.glob("*.tar"))
    if not shards:
        raise ConfigError(f"folder {path} holds neither shards (*.tar) nor an {INDEX_NAME} that lists some")
    return shards


def _refuse_repeated(paths: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise ConfigError(f"shard {path} is named twice in one source; raise the `weight` of the source instead")
        seen.add(path)


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["version"] != INDEX_VERSION:
            raise ConfigError(f"{path} has version {tree['version']}, only {INDEX_VERSION} can be read")
        return {
            str(item["name"]): {"samples": int(item["samples"]), "bytes": item.get("bytes")} for item in tree["shards"]
        }
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a shard index ({type(error).__name__}: {error}); write it again with launcher/prepare.py, "
            "or remove it to have the shards scanned"
        ) from None


def _measure(path: Path, entry: dict[str, Any] | None) -> Shard:
    size = path.stat().st_size
    if entry is None:
        samples = _count(path)
    else:
        samples = entry["samples"]
        if entry["bytes"] not in (None, size):
            get_logger().warning(
                "shard %s has %d bytes, its %s says %d: incomplete copy?", path, size, INDEX_NAME, entry["bytes"]
            )
    if size == 0 or samples == 0:
        raise ConfigError(f"shard {path} is empty ({size} bytes, {samples} samples); remove it from data.sources")
    return Shard(path, samples)


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
        for member in _members(_block_reader(self._file.fileno()), os.fstat(self._file.fileno()).st_size):
            prefix = _split_name(member.name)[0]
            if prefix is None:
                continue
            if prefix != key:
                key = prefix
                self._starts.append(member.header)
                self._ends.append(0)
            elif member.header != _round_up(last_end):
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
        members = _members(lambda offset: os.pread(self._file.fileno(), _BLOCK, start + offset), size, verify=False)
        return next(prefix for member in members if (prefix := _split_name(member.name)[0]) is not None)

    def read(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Read the key and the members (lower-case extension -> bytes) of one sample.

        Raises:
            BadSample: a damaged tar lacks the sample, or the sample has two members with the same extension.
        """
        if number >= len(self):
            raise BadSample("broken tar entry", f"only {len(self)} samples can be found in the shard")
        start, end = self._starts[number], self._ends[number]
        data = os.pread(self._file.fileno(), end - start, start)
        fields: dict[str, bytes] = {}
        key = ""
        # Checksums were verified when the shard was opened; adjacent members need no second check.
        for member in _members(lambda offset: data[offset : offset + _BLOCK], len(data), verify=number in self._gaps):
            prefix, extension = _split_name(member.name)
            if prefix is None or extension is None:
                continue
            key, extension = prefix, extension.lower()
            if extension in fields:
                raise BadSample("duplicate member", f"{member.name} occurs twice")
            fields[extension] = data[member.end - member.size : member.end]
        return key, fields

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _split_name(name: str) -> tuple[str | None, str | None]:
    if _META.match(name):
        return None, None
    key, extension = base_plus_ext(name)
    return key, extension


class _Member(NamedTuple):
    """Regular file in a tar."""

    name: str
    header: int
    """Offset of the first header block, extension headers included."""
    end: int
    """Offset after the last byte."""
    size: int


def _block_reader(descriptor: int) -> Callable[[int], bytes]:
    """Return a function that reads 512 bytes at an offset through a small read-ahead buffer."""
    start, buffer = 0, b""

    def block(offset: int) -> bytes:
        nonlocal start, buffer
        if not start <= offset <= start + len(buffer) - _BLOCK:
            start, buffer = offset, os.pread(descriptor, _READ_AHEAD, offset)
        return buffer[offset - start : offset - start + _BLOCK]

    return block


def _members(block: Callable[[int], bytes], size: int, verify: bool = True) -> Iterator[_Member]:
    """Yield the regular members of a tar (ustar, GNU long names, pax) of `size` bytes.

    After a damaged header the search continues at the next valid one, so a broken entry costs only that entry. Zero
    blocks are skipped in the same way. A member that extends beyond the end is omitted.

    Args:
        block: function that reads 512 bytes at an offset.
        size: size of the tar, in bytes.
        verify: whether to check the checksums of headers.
    """
    offset, first, name, length = 0, None, None, None
    while offset + _BLOCK <= size:
        header = _parse_header(block(offset), verify)
        if header is None:
            offset, first, name, length = offset + _BLOCK, None, None, None
            continue
        first = offset if first is None else first
        stored = header.size if length is None or header.kind in b"xgLK" else length
        end = offset + _BLOCK + stored
        if header.kind == b"L":
            name = _text(_span(block, offset + _BLOCK, stored))
        elif header.kind == b"x":
            records = _pax_records(_span(block, offset + _BLOCK, stored))
            name, length = records.get("path", name), _digits(records.get("size")) or length
        elif header.kind not in b"gK":
            if header.kind in _REGULAR and end <= size:
                yield _Member(name or header.name, first, end, stored)
            first, name, length = None, None, None
        offset = _round_up(end)


def _round_up(offset: int) -> int:
    return -(-offset // _BLOCK) * _BLOCK


class _Header(NamedTuple):
    name: str
    size: int
    kind: bytes


def _parse_header(block: bytes, verify: bool) -> _Header | None:
    """Parse one header block; None if its checksum is wrong (POSIX.1-2017, pax, "ustar Interchange Format")."""
    try:
        if len(block) < _BLOCK:
            return None
        if verify and sum(block) - sum(block[148:156]) + 8 * 32 != _number(block[148:156]):
            return None
        size = _number(block[124:136])
    except ValueError:
        return None
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    return _Header(name, size, block[156:157])


def _number(data: bytes) -> int:
    if data[0] & 0x80:  # GNU extension: base 256, for sizes of 8 GiB and more
        return int.from_bytes(data[1:], "big")
    return int(data.strip(b"\0 ") or b"0", 8)


def _digits(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _span(block: Callable[[int], bytes], offset: int, length: int) -> bytes:
    return b"".join(block(offset + done) for done in range(0, length, _BLOCK))[:length]


def _pax_records(data: bytes) -> dict[str, str]:
    """Parse records of the form `LENGTH KEY=VALUE\\n`, where LENGTH is that of the whole record."""
    records = {}
    while data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or int(digits) <= len(digits):
            break
        record, data = data[len(digits) + 1 : int(digits) - 1], data[int(digits) :]
        key, _, value = record.partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
    return records
