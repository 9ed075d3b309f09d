"""Paths and addresses of shards: expand braces, globs and folders, read indices, and name what is no shard."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from webdataset.shardlists import expand_urls

from eve_ds import limits
from eve_ds.config import ConfigError
from eve_ds.data.formats.unread import binary_kind
from eve_ds.data.remote import addresses
from eve_ds.data.remote.storage import RemoteStorage
from eve_ds.data.sample_names import COMPRESSED, is_leftover, packed_tars, shard_files
from eve_ds.data.shard_bytes import ShardBytes
from eve_ds.data.shard_index import Varints, decode_text
from eve_ds.distributed import get_logger
from eve_ds.printable import without_credentials
from eve_ds.reading import parse_json, read_file

INDEX_NAME = "index.json"
INDEX_VERSIONS = (1, 2)
SETTING = "data.sources.shards"

_PIPE = re.compile(r"pipe:", re.IGNORECASE)
_IPV6 = re.compile(r"(?<=\[)::(?=[0-9a-f:.]*\])|(?<=[0-9a-f])::(?=[0-9a-f:.]*\])", re.IGNORECASE)
"""Two colons of an address such as http://[::1]/a.tar, which separate no two names."""
_GLOB = re.compile(r"[*?\[]")
_UNPACK = "samples are read at their offsets in a plain tar; unpack it to .tar"
_BRACES = re.compile(r"\{(?P<start>[^{},.]*)\.\.(?P<end>[^{},.]*)(?:\.\.(?P<step>[^{},.]*))?\}|[{},]")
_MOST_DIGITS = 18


class IndexEntry(NamedTuple):
    """Entry of a shard in an index."""

    samples: int
    bytes: int | None
    """Size of the shard; None: not in the index."""
    sha256: str | None
    """Hash of the shard when it was written; None: not in the index."""
    groups: Varints | None
    """Varints of the layout of the shard, see :mod:`eve_ds.data.shard_index`; None: not in the index."""


class Indices:
    """Indices of folders, each read once.

    Args:
        remote: storage of the folders at addresses.
    """

    def __init__(self, remote: RemoteStorage) -> None:
        self.remote = remote
        self._read: dict[str, dict[str, IndexEntry]] = {}

    def of(self, folder: str) -> dict[str, IndexEntry]:
        """Entries of the index of a folder by the name of the shard; empty without an index.

        Raises:
            ConfigError: the index has another version or form.
            RemoteError: the server of the folder cannot be read.
        """
        if folder not in self._read:
            found = _read_remote_index(folder, self.remote) if is_remote(folder) else read_index(folder)
            self._read[folder] = found
        return self._read[folder]


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
        raise ConfigError(f"{SETTING} {items} names more than {limits.SHARDS:,} shards: check the numbers in braces")
    found = [address for item in items for address in _expand_item(item, indices)]
    _refuse_repeated(found)
    _require_files([Path(address) for address in found if not is_remote(address)])
    return found


def is_remote(address: str) -> bool:
    """Whether a shard lies at an address, not at a path."""
    return addresses.scheme_of(address) is not None


def name_of(address: str) -> str:
    """File name of a shard."""
    return addresses.file_name(address)


def folder_of(address: str) -> str:
    """Folder of a shard, "." for a bare name."""
    return addresses.folder_of(address) if is_remote(address) else os.path.dirname(address) or "."


def _refuse_repeated(found: Sequence[str]) -> None:
    seen: set[str] = set()
    for address in found:
        if address in seen:
            raise ConfigError(
                f"shard {without_credentials(address)} is named twice in one source; raise the `weight` of the source "
                "instead"
            )
        seen.add(address)


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


def _read_remote_index(folder: str, remote: RemoteStorage) -> dict[str, IndexEntry]:
    address = addresses.join(folder, INDEX_NAME)
    document = remote.read_small(address, limits.INDEX_BYTES)
    return {} if document is None else _parse_index(lambda: document, without_credentials(address))


def read_index(folder: str | Path) -> dict[str, IndexEntry]:
    """Entries of the index of a folder on disk by the name of the shard; empty without an index.

    Raises:
        ConfigError: the index has another version or form.
    """
    path = Path(folder) / INDEX_NAME
    return _parse_index(lambda: read_file(path, limits.INDEX_BYTES), str(path)) if path.exists() else {}


def _parse_index(read: Callable[[], bytes], path: str) -> dict[str, IndexEntry]:
    try:
        tree = parse_json(read())
        if tree["version"] not in INDEX_VERSIONS:
            raise ConfigError(f"{path} has version {tree['version']!r}, only 1 and 2 can be read")
        return dict(_index_entry(item) for item in tree["shards"])
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{path} is not a shard index ({reason}); write it again with launcher/prepare.py, or remove it to have "
            "the shards scanned"
        ) from None


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
        names = [name.replace("\0", "::") for name in expand_urls(_IPV6.sub("\0", item))]
    except (ValueError, AssertionError) as error:  # unbalanced braces, or ${NAME} without a variable WDS_NAME
        raise ConfigError(f"{SETTING} '{item}' cannot be expanded: {error}") from None
    for name in names:
        scheme = addresses.scheme_of(name)
        if scheme is not None and scheme != "file":
            yield from _remote_shards(name, indices)
        else:
            yield from _local_shards(addresses.path_of(name) if scheme else os.path.expanduser(name), indices)


def _local_shards(name: str, indices: Indices) -> Iterator[str]:
    """Shards of a path: a folder, a file, or a glob pattern unless a file has that very name."""
    path = Path(name)
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
    shown, name = without_credentials(address), addresses.file_name(address)
    if addresses.scheme_of(address) not in addresses.READERS:
        schemes = ", ".join(f"{scheme}://" for scheme in addresses.READERS)
        raise ConfigError(f"{SETTING} '{shown}' is an address of a scheme that is not read; these are: {schemes}")
    if (_GLOB.search(address) and not addresses.is_http(address)) or "*" in address:
        return _matching(address, indices)
    if name.lower().endswith(COMPRESSED):
        raise ConfigError(f"shard {shown} is compressed: {_UNPACK}")
    if name.endswith(".tar"):
        return [address]
    listed = [addresses.join(address, name) for name in indices.of(address)]
    if listed or addresses.is_http(address):
        return listed or _refuse_folder(shown)
    return _matching(addresses.join(address, "*.tar"), indices)


def _matching(pattern: str, indices: Indices) -> list[str]:
    shown = without_credentials(pattern)
    if addresses.is_http(pattern):
        raise ConfigError(
            f"{SETTING} '{shown}' is a glob pattern, but HTTP has no lists of files: name numbers in braces as "
            f"{{00000..00331}}, or a folder with an {INDEX_NAME}"
        )
    found = [address for address in indices.remote.matching(pattern) if not is_leftover(address)]
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
    left = sorted({*tars, *packed_tars(folder, "*.t*z*")} - {*shards}) if shards else []
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


def _index_entry(item: Any) -> tuple[str, IndexEntry]:
    name, samples, size = item["name"], item["samples"], item.get("bytes")
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"name {name!r} must be the name of a file in the folder of the index")
    for key, value in (("samples", samples), ("bytes", 0 if size is None else size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{key} of {name} ({value!r}) must be a whole number")
    if samples > limits.SHARD_SAMPLES:
        raise ValueError(f"samples of {name} ({samples:,}) must be at most {limits.SHARD_SAMPLES:,}")
    digest, groups = item.get("sha256"), item.get("groups")
    if not isinstance(groups, str | None):
        raise ValueError(f"groups of {name} must be text")
    stored = None if groups is None else decode_text(groups)
    return name, IndexEntry(samples, size, digest if isinstance(digest, str) and digest else None, stored)


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
