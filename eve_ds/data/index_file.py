"""Index of a folder of shards, `index.json`: read it from a disk or from an address.

    {"version": 2, "shards": [{"name", "samples", "bytes", "sha256", "groups"}, ...]}

Version 1 has no `groups`, which is the layout of a shard (:mod:`eve_ds.data.shard_index`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from eve_ds import limits
from eve_ds.config import ConfigError
from eve_ds.data.failed_download import failed_download
from eve_ds.data.remote import addresses
from eve_ds.data.remote.errors import RefusedObject, RemoteError, WrongContent, wrong_content
from eve_ds.data.remote.storage import RemoteStorage
from eve_ds.data.shard_index import Varints, decode_text
from eve_ds.log import get_logger
from eve_ds.printable import without_credentials
from eve_ds.reading import parse_json, read_file

INDEX_NAME = "index.json"
INDEX_VERSION = 2
"""Version that is written; 1 is read as well."""


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
        self._has_warned = False

    def beside(self, folder: str) -> dict[str, IndexEntry]:
        """Entries of the index of a folder whose shards are named: as :meth:`of`, but an index is not needed.

        If a server refuses it, or sends something else such as a web page, there is none, and one warning says so.
        """
        try:
            return self.of(folder)
        except (RefusedObject, WrongContent) as error:
            if not self._has_warned:
                get_logger().warning("%s; going on without an index", error)
            self._has_warned = True
            self._read[folder] = {}
            return {}

    def of(self, folder: str) -> dict[str, IndexEntry]:
        """Entries of the index of a folder by the name of the shard; empty without an index.

        Raises:
            ConfigError: the index has another version or form.
            RemoteError: the server of the folder cannot be read or refuses it, or sends something else.
        """
        if folder not in self._read:
            found = _read_remote_index(folder, self.remote) if addresses.is_remote(folder) else read_index(folder)
            self._read[folder] = found
        return self._read[folder]


def read_index(folder: str | Path) -> dict[str, IndexEntry]:
    """Entries of the index of a folder on disk by the name of the shard; empty without an index.

    Raises:
        ConfigError: the index has another version or form.
    """
    path = Path(folder) / INDEX_NAME
    if not path.exists():
        return {}
    try:
        tree = parse_json(read_file(path, limits.INDEX_BYTES))
    except (OSError, ValueError) as error:
        raise _no_index(str(path), error) from None
    return _entries(tree, str(path))


def _read_remote_index(folder: str, remote: RemoteStorage) -> dict[str, IndexEntry]:
    address = addresses.join(folder, INDEX_NAME)
    shown = without_credentials(address)

    def parse(document: bytes) -> Any:
        if (found := failed_download(document[:512])) is not None:
            raise WrongContent(wrong_content(address, f"{found}, not a shard index"))
        return parse_json(document)

    try:
        tree = remote.read_small(address, limits.INDEX_BYTES, parse)
    except RemoteError:
        raise
    except ValueError as error:
        raise _no_index(shown, error) from None
    return {} if tree is None else _entries(tree, shown)


def _entries(tree: Any, path: str) -> dict[str, IndexEntry]:
    """Entries of a parsed index; `path` is for messages."""
    try:
        if tree["version"] not in (1, INDEX_VERSION):
            raise ConfigError(f"{path} has version {tree['version']!r}, only 1 and 2 can be read")
        return dict(_index_entry(item) for item in tree["shards"])
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _no_index(path, error) from None


def _no_index(path: str, error: Exception) -> ConfigError:
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return ConfigError(
        f"{path} is not a shard index ({reason}); write it again with launcher/prepare.py, or remove it to have "
        "the shards scanned"
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
