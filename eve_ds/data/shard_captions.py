"""Captions of shards, for training a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from eve_ds import limits
from eve_ds.data.caption_text import clean_caption
from eve_ds.data.errors import SourceError
from eve_ds.data.remote.addresses import is_remote
from eve_ds.data.sample_names import caption_label, shard_files, split_name
from eve_ds.data.tar_headers import Damage, block_reader, scan


def read_captions(folder: str | Path) -> Iterator[str]:
    """Yield the captions (KEY.txt, KEY.N.txt, UTF-8) of one shard, or of all shards of a folder by name.

    The shards may come from another tool.

    Raises:
        SourceError: an address, a folder without shards, a damaged shard, or a caption that is not UTF-8.
    """
    if is_remote(str(folder)):
        raise SourceError(f"{folder} is an address: download some of its shards, whose captions are enough for tokens")
    shards = [Path(folder)] if Path(folder).is_file() else shard_files(Path(folder))
    if not shards:
        raise SourceError(f"{folder} holds no .tar shards")
    for path in shards:
        try:
            with path.open("rb", buffering=0) as file:
                for text in _texts(file.fileno()):
                    yield clean_caption(text.decode("utf-8"))[: limits.CAPTION_CHARACTERS]
        except (OSError, ValueError) as error:  # ValueError: damage, UnicodeDecodeError
            raise SourceError(f"{path} cannot be read: {error}") from None


def _texts(descriptor: int) -> Iterator[bytes]:
    """Yield the captions of a tar; raises ValueError for damage and for a member above the cap."""
    for found in scan(block_reader(descriptor), os.fstat(descriptor).st_size):
        if isinstance(found, Damage):
            raise ValueError(f"damaged at byte {found.offset:,}")
        extension = split_name(found.name)[1]
        if extension is not None and caption_label(extension) is not None:
            if found.size > limits.METADATA_BYTES:
                raise ValueError(f"{found.name} has {found.size:,} bytes, more than {limits.METADATA_BYTES:,}")
            yield os.pread(descriptor, found.size, found.end - found.size)
