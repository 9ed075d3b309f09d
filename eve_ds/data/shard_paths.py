"""Paths of shards: expand braces and folders, read the index of a folder, and name what cannot be read as a shard."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.shardlists import expand_urls

from eve_ds import limits
from eve_ds.config import ConfigError
from eve_ds.data.formats.unread import binary_kind
from eve_ds.data.sample_names import COMPRESSED, packed_tars, shard_files
from eve_ds.data.shard_index import Varints, decode_text
from eve_ds.distributed import get_logger
from eve_ds.reading import read_file, read_json

INDEX_NAME = "index.json"
INDEX_VERSIONS = (1, 2)
SETTING = "data.sources.shards"

_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://|(?P<pipe>pipe):", re.IGNORECASE)
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


def expand(spec: str | Sequence[str]) -> list[str]:
    """Addresses of a brace list, a folder, a path, or a list of these; all of them regular files, none named twice.

    Raises:
        ConfigError: a shard is missing or named twice, a folder has no shards, there are more than `limits.SHARDS`, or
            an item is an address, a glob pattern, a compressed archive or no regular file.
    """
    items = [spec] if isinstance(spec, str) else list(spec)
    count = sum(num_expanded(item) for item in items)
    if count > limits.SHARDS:
        raise ConfigError(f"{SETTING} {items} names more than {limits.SHARDS:,} shards: check the numbers in braces")
    paths = [path for item in items for path in _expand_item(item)]
    _refuse_repeated(paths)
    _require_files(paths)
    return [str(path) for path in paths]


def name_of(address: str) -> str:
    """File name of a shard."""
    return address.rpartition("/")[2]


def folder_of(address: str) -> str:
    """Folder of a shard, "." for a bare name."""
    return os.path.dirname(address) or "."


def _refuse_repeated(paths: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise ConfigError(f"shard {path} is named twice in one source; raise the `weight` of the source instead")
        seen.add(path)


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


def read_index(folder: str | Path) -> dict[str, IndexEntry]:
    """Entries of the index of a folder by the name of the shard; empty without an index.

    Raises:
        ConfigError: the index has another version or form.
    """
    path = Path(folder) / INDEX_NAME
    if not path.exists():
        return {}
    try:
        tree = read_json(path, limits.INDEX_BYTES)
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


def refuse_other_content(address: str) -> None:
    """Raise :class:`ConfigError` for a file without samples, and name what it is by its first bytes."""
    path, size = Path(address), os.stat(address).st_size
    start = read_file(path, limits.MIB, size=min(size, 64))
    kind = binary_kind(start)
    if kind is not None:
        raise ConfigError(f"shard {path} is {kind[0]}: {_UNPACK if kind[1].startswith('unpack') else kind[1]}")
    what = "holds no sample" if any(start) else "is empty"
    raise ConfigError(f"shard {path} {what} ({size} bytes, 0 samples); remove it from data.sources")


def _expand_item(item: str) -> Iterator[Path]:
    if not item.strip():
        raise ConfigError(f"{SETTING} has an empty name (a variable that is not set?): name a folder or files")
    _refuse_address(item)
    try:
        names = expand_urls(item)
    except (ValueError, AssertionError) as error:  # unbalanced braces, or ${NAME} without a variable WDS_NAME
        raise ConfigError(f"{SETTING} '{item}' cannot be expanded: {error}") from None
    for name in names:
        path = Path(os.path.expanduser(name))  # "~stranger" stays as it is
        if path.is_dir():
            yield from _folder_shards(path)
        else:
            yield path


def _folder_shards(folder: Path) -> list[Path]:
    tars = shard_files(folder)
    shards = [folder / name for name in read_index(folder)] or tars
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


def _refuse_address(item: str) -> None:
    address = _ADDRESS.match(item)
    if address is not None and address["pipe"]:
        raise ConfigError(f"{SETTING} '{item}' is a command of a pipe, which is not run: name files or a folder")
    if address is not None:
        raise ConfigError(
            f"{SETTING} '{item}' is an address ({address['scheme']}://): shards are read from files, so download them "
            "or mount the storage, and name the path"
        )


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
    if re.search(r"[*?\[]", str(first)):
        raise ConfigError(
            f"{SETTING} '{first}' is a glob pattern, which is not expanded: name the folder, or numbers in braces as "
            "{00000..00331}"
        )
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
    stored = decode_text(groups) if groups else None
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
