"""Write the index of a folder of shards that another tool made, or an earlier version of this one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from eve_ds import limits
from eve_ds.config import ConfigError
from eve_ds.data.errors import BadSample
from eve_ds.data.image_file import IMAGE_EXTENSIONS
from eve_ds.data.index_file import INDEX_NAME, INDEX_VERSION, read_index
from eve_ds.data.sample_names import TOGETHER, packed_tars, shard_files
from eve_ds.data.shard_bytes import FileBytes
from eve_ds.data.shard_file import ShardFile
from eve_ds.data.shard_index import encode, scan_layout
from eve_ds.data.shard_paths import refuse_other_content
from eve_ds.data.writing.progress_files import PROGRESS_FOLDER
from eve_ds.log import get_logger
from eve_ds.storage import replace_file

PROBED_SAMPLES = 20
"""Samples of a shard that are read to see whether images and captions belong together."""


def write_index(folder: Path, on_shard: Callable[[int, int], None] = lambda done, total: None) -> list[dict[str, Any]]:
    """Read every tar of a folder, write `index.json` beside them, and return its entries.

    Args:
        folder: folder of plain tars; an index that it has is replaced at the end.
        on_shard: called after every shard with the number of finished shards and of all.

    Raises:
        ConfigError: a folder that is missing, without tars or that `prepare` still writes, or a tar without a sample.
        OSError: reading or writing failed.
    """
    shards = _shards(folder)
    entries = []
    for done, path in enumerate(shards, start=1):
        entries.append(_entry(path))
        on_shard(done, len(shards))
    _warn_of_other_bytes(folder, entries)
    replace_file(folder / INDEX_NAME, json.dumps({"version": INDEX_VERSION, "shards": entries}, indent=1) + "\n")
    return entries


def _shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: name a folder of shards (*.tar)")
    if (folder / PROGRESS_FOLDER).exists():
        raise ConfigError(f"{folder} is not finished: rerun the command of launcher/prepare.py that writes its shards")
    shards, packed = shard_files(folder), packed_tars(folder)
    hint = f"; unpack {packed[0].name} and others to .tar" if packed else ""
    if not shards:
        raise ConfigError(f"{folder} holds no shards (*.tar){hint}")
    if packed:
        get_logger().warning("%d compressed tars of %s are left out%s", len(packed), folder, hint)
    return shards


def _warn_of_other_bytes(folder: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Log that shards do not have the hashes of the index that is replaced: they may be damaged."""
    try:
        before = read_index(folder)
    except ConfigError:
        return
    known = [(entry, before[entry["name"]].sha256) for entry in entries if entry["name"] in before]
    other = [entry["name"] for entry, sha256 in known if sha256 not in (None, entry["sha256"])]
    if other:
        get_logger().warning(
            "%d shards of %s have other bytes than those with the hashes of the %s that is replaced, for example %s: "
            "were they changed, or damaged?",
            len(other),
            folder,
            INDEX_NAME,
            other[0],
        )


def _entry(path: Path) -> dict[str, Any]:
    stored = FileBytes(path)
    try:
        layout = scan_layout(stored)
        if not len(layout):
            refuse_other_content(str(path), stored)
        _warn_of_parted_members(ShardFile(str(path), stored, layout))
        digest = hashlib.sha256()
        for block in _blocks(stored):
            digest.update(block)
    finally:
        stored.close()
    entry = {"name": path.name, "samples": len(layout), "bytes": stored.size, "sha256": digest.hexdigest()}
    return entry | {"groups": encode(layout)}


def _warn_of_parted_members(shard: ShardFile) -> None:
    """Log that samples of a shard, some of which are read, have either an image or a caption, although both occur."""
    numbers = sorted({number * len(shard) // PROBED_SAMPLES for number in range(PROBED_SAMPLES)})
    images = captions = 0
    for number in numbers:
        try:
            names = shard.read(number).fields.keys()
        except BadSample:  # counted by training
            continue
        is_pair = "txt" in names and any(name in IMAGE_EXTENSIONS for name in names)
        if is_pair:
            return
        images += any(name.rpartition(".")[2] in IMAGE_EXTENSIONS for name in names)
        captions += "txt" in names
    if images and captions:
        get_logger().warning("no sample read of %s has both an image and a caption: %s", shard.address, TOGETHER)


def _blocks(stored: FileBytes) -> Iterator[bytes]:
    for offset in range(0, stored.size, limits.MIB):
        yield stored.read_at(offset, limits.MIB)
