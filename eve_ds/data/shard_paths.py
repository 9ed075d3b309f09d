"""Paths and addresses of shards: expand braces, glob patterns and folders, and name what is no shard."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from glob import escape, glob
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from webdataset.shardlists import expand_urls

from eve_ds import limits
from eve_ds.config import ConfigError
from eve_ds.data.formats.unread import binary_kind
from eve_ds.data.index_file import INDEX_NAME, Indices
from eve_ds.data.remote import addresses
from eve_ds.data.sample_names import COMPRESSED, is_leftover, packed_tars, shard_files
from eve_ds.data.shard_bytes import ShardBytes
from eve_ds.log import get_logger
from eve_ds.printable import without_credentials

SETTING = "data.sources.shards"

_PIPE = re.compile(r"pipe:", re.IGNORECASE)
_QUERY = re.compile(r"(?<=\?).*?(?=::[a-z][a-z0-9+.-]*://|$)", re.IGNORECASE | re.DOTALL)
_IPV6 = re.compile(r"(?<=//\[)::|(?<=\[)::(?=[0-9a-f:.]*\])|(?<=[0-9a-f])::(?=[0-9a-f:.]*\])", re.IGNORECASE)
"""Two colons of an address such as http://[::1]/a.tar, which separate no two names."""
_GLOB = re.compile(r"[*?\[]")
_UNPACK = "samples are read at their offsets in a plain tar; unpack it to .tar"
_BRACES = re.compile(r"\{(?P<start>[^{},.]*)\.\.(?P<end>[^{},.]*)(?:\.\.(?P<step>[^{},.]*))?\}|[{},]")
_MOST_DIGITS = 18


def expand(spec: str | Sequence[str], indices: Indices) -> list[str]:
    """Paths and addresses of a brace list, a glob pattern, a folder, a shard, or a list of these; none named twice.

    Matches of a pattern and shards of a folder without an index are in the order of their names. Paths are those of
    regular files; whether an address exists is not asked.

    Raises:
        ConfigError: a shard is missing or named twice, a folder or pattern has no shards, there are more than
            `limits.SHARDS`, or an item is a pipe, a compressed archive, no regular file, or an address of a scheme that
            is not read.
        RemoteError: a server cannot be read.
    """
    items = [spec] if isinstance(spec, str) else list(spec)
    count = sum(num_expanded(item) for item in items)
    if count > limits.SHARDS:
        shown = [without_credentials(item) for item in items]
        raise ConfigError(f"{SETTING} {shown} names more than {limits.SHARDS:,} shards: check the numbers in braces")
    found = [address for item in items for address in _expand_item(item, indices)]
    _refuse_repeated(found)
    _require_files([Path(address) for address in found if not addresses.is_remote(address)])
    return found


def name_of(address: str) -> str:
    """File name of a shard."""
    return addresses.file_name(address)


def folder_of(address: str) -> str:
    """Folder of a shard, "." for a bare name."""
    return addresses.folder_of(address) if addresses.is_remote(address) else os.path.dirname(address) or "."


def one_name_of(address: str) -> str:
    """The one name of a shard, whatever links, spellings or signatures lead to it."""
    return addresses.object_name(address) if addresses.is_remote(address) else os.path.realpath(address)


def _refuse_repeated(found: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for address in found:
        name = one_name_of(address)
        if name in seen:
            other = "" if seen[name] == address else f" (also as {without_credentials(seen[name])})"
            raise ConfigError(
                f"shard {without_credentials(address)} is named twice in one source{other}; raise the `weight` of the "
                "source instead"
            )
        seen[name] = address


def num_expanded(pattern: str) -> int:
    """Number of names that a pattern with braces expands to, without expanding it; a malformed range counts as one."""
    # One pair for each open brace: names of the finished alternatives, and of the current one.
    levels = [[0, 1]]
    for token in _BRACES.finditer(pattern.replace("::", ",")):
        if token[0] == "{":
            levels.append([0, 1])
        elif token[0] == "}" and len(levels) > 1:
            inner = sum(levels.pop())
            levels[-1][1] *= inner
        elif token[0] == ",":
            levels[-1] = [sum(levels[-1]), 1]
        elif token["start"] is not None:
            levels[-1][1] *= _length(token["start"], token["end"], token["step"])
    return max(sum(level) for level in levels)


def refuse_other_content(address: str, stored: ShardBytes) -> None:
    """Raise :class:`ConfigError` for a shard without samples, and name what it is by its first bytes."""
    start = stored.read_at(0, 64)
    shown, kind = without_credentials(address), binary_kind(start)
    if kind is not None:
        raise ConfigError(f"shard {shown} is {kind[0]}: {_UNPACK if kind[1].startswith('unpack') else kind[1]}")
    what = "holds no sample" if any(start) else "is empty"
    raise ConfigError(f"shard {shown} {what} ({stored.size} bytes, 0 samples); remove it from data.sources")


def _expand_item(item: str, indices: Indices) -> Iterator[str]:
    if not item.strip():
        raise ConfigError(f"{SETTING} has an empty name (a variable that is not set?): name a folder or files")
    if _PIPE.match(item):
        raise ConfigError(f"{SETTING} '{item}' is a command of a pipe, which is not run: name files or a folder")
    try:
        names = [name.replace("\0", "::") for name in expand_urls(_without_colons(item))]
    except (ValueError, AssertionError) as error:  # unbalanced braces, or ${NAME} without a variable WDS_NAME
        shown = without_credentials(item)
        reason = f": {error}" if shown == item else ""  # the error repeats a part of the name
        raise ConfigError(f"{SETTING} '{shown}' cannot be expanded{reason}") from None
    for name in names:
        scheme = addresses.scheme_of(name)
        if scheme is not None and scheme != "file":
            yield from _remote_shards(name, indices)
        else:
            yield from _local_shards(addresses.path_of(name) if scheme else os.path.expanduser(name), indices)


def _without_colons(item: str) -> str:
    """Item with a NUL in place of each `::` that separates no two names, as in a host or a query."""
    item = _IPV6.sub("\0", item)
    return _QUERY.sub(lambda query: query[0].replace("::", "\0"), item) if addresses.is_http(item) else item


def _local_shards(name: str, indices: Indices) -> Iterator[str]:
    """Shards of a path: a folder, a file, or a glob pattern unless a file has that very name."""
    path = Path(name)
    if path.name == INDEX_NAME and path.is_file():
        path = path.parent
    matches = [] if path.exists() or not _GLOB.search(name) else sorted(glob(name, recursive=True))
    if path.is_dir():
        yield from map(str, _folder_shards(path, indices))
    elif not matches:
        yield str(path)
    for match in matches:
        if not is_leftover(match):
            yield from _local_shards(match, indices)


def _remote_shards(address: str, indices: Indices) -> list[str]:
    """Shards of an address: a tar, a folder, or a glob pattern."""
    scheme = str(addresses.scheme_of(address))
    address = addresses.encoded(scheme + address[len(scheme) :])  # the scheme in lower case
    shown = without_credentials(address)
    if scheme not in addresses.READERS:
        schemes = ", ".join(f"{scheme}://" for scheme in addresses.READERS)
        raise ConfigError(f"{SETTING} '{shown}' is an address of a scheme that is not read; these are: {schemes}")
    _require_server(address, shown)
    name = addresses.file_name(address)
    if "*" in shown or (_GLOB.search(address) and not addresses.is_http(address)):
        return _matching(address, indices)
    if name.lower().endswith(COMPRESSED):
        raise ConfigError(f"shard {shown} is compressed: {_UNPACK}")
    if name.endswith(".tar"):
        return [address]
    return _folder_at(folder_of(address) if name == INDEX_NAME else address, indices)


def _folder_at(address: str, indices: Indices) -> list[str]:
    """Shards of a folder at an address: those of its index, or its tars."""
    listed = [addresses.join(address, name) for name in indices.of(address)]
    if listed or addresses.is_http(address):
        return listed or _refuse_folder(without_credentials(address))
    return _matching(addresses.join(escape(address), "*.tar"), indices)


def _require_server(address: str, shown: str) -> None:
    """Raise ConfigError for an address whose host or bucket is missing or not valid."""
    if not addresses.is_http(address):
        if not address.partition("://")[2].partition("/")[0]:
            raise ConfigError(f"{SETTING} '{shown}' has no bucket (a variable that is not set?): name one")
        return
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname or "", parts.port
        if host.isascii():
            host.encode("idna")
    except ValueError:
        raise ConfigError(
            f"{SETTING} '{shown}' has a host or port that is not valid: labels of a host have 1 to 63 characters, "
            "IPv6 addresses stand in brackets, and ports are at most 65535"
        ) from None
    if not host:
        raise ConfigError(
            f"{SETTING} '{shown}' has no host (a variable that is not set, or IPv6 without brackets?): name one"
        )


def _matching(pattern: str, indices: Indices) -> list[str]:
    shown = without_credentials(pattern)
    found = []
    for match in indices.remote.matching(pattern):
        if match.endswith("/"):
            found += _folder_at(match.rstrip("/"), indices)
        elif not is_leftover(match):
            found.append(match)
    if not found:
        raise ConfigError(f"{SETTING} '{shown}' matches no shard: check the name of the bucket and the folder")
    packed = next((address for address in found if address.lower().endswith(COMPRESSED)), None)
    if packed is not None:
        raise ConfigError(f"shard {packed} is compressed: {_UNPACK}")
    return found


def _refuse_folder(shown: str) -> NoReturn:
    raise ConfigError(
        f"{SETTING} '{shown}' has no {INDEX_NAME} that lists shards, and HTTP has no lists of files: write one with "
        "launcher/prepare.py index and upload it, or name the tars, whose names end in .tar"
    )


def _folder_shards(folder: Path, indices: Indices) -> list[Path]:
    tars = shard_files(folder)
    shards = [folder / name for name in indices.of(str(folder))] or tars
    left = sorted({*tars, *packed_tars(folder)} - {*shards}) if shards else []
    if left:
        get_logger().warning(
            "%d tars of %s are not read, since they are compressed or its %s does not list them, for example %s",
            len(left),
            folder,
            INDEX_NAME,
            left[0].name,
        )
    if not shards:
        packed = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in COMPRESSED)
        more = f"; it holds {packed[0]}, which is compressed: {_UNPACK}" if packed else ""
        raise ConfigError(f"folder {folder} holds neither shards (*.tar) nor an {INDEX_NAME} that lists some{more}")
    return shards


def _require_files(paths: Sequence[Path]) -> None:
    missing = [path for path in paths if not path.is_file()]
    if not missing:
        packed = next((path for path in paths if path.suffix.lower() in COMPRESSED), None)
        if packed is not None:
            raise ConfigError(f"shard {packed} is compressed: {_UNPACK}")
        return
    first = missing[0]
    if first.exists():
        raise ConfigError(f"shard {first} is not a regular file: name tars or a folder of tars in {SETTING}")
    if _GLOB.search(str(first)):
        raise ConfigError(f"{SETTING} '{first}' is a glob pattern that matches no file: check it")
    raise ConfigError(
        f"shard {first} does not exist ({len(missing)} of {len(paths)} shards are missing); check {SETTING}"
    )


def _length(start: str, end: str, step: str | None) -> int:
    """Number of terms of a range in braces; 1 where it is none."""
    if max(len(start), len(end), len(step or "")) > _MOST_DIGITS:
        return limits.SHARDS + 1
    if re.fullmatch(r"[A-Za-z]{2}", start + end):
        distance = abs(ord(end) - ord(start))
    elif all(re.fullmatch(r"-?[0-9]+", text) for text in (start, end)):
        distance = abs(int(start) - int(end))
    else:
        return 1
    stride = abs(int(step)) if re.fullmatch(r"-?[0-9]+", step or "") and step else 1
    return distance // max(stride, 1) + 1
