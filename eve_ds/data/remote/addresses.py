"""Addresses of shards: their schemes, their parts, and the package that reads each scheme."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit, urlunsplit

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


class Reader(NamedTuple):
    """Package that reads a scheme."""

    module: str
    requirement: str
    """What to install, as an argument of pip."""


HTTP = ("http", "https")
READERS = {
    **dict.fromkeys(HTTP, Reader("requests", "requests>=2.32")),
    "s3": Reader("s3fs", "s3fs>=2025.3"),
    **dict.fromkeys(("gs", "gcs"), Reader("gcsfs", "gcsfs>=2025.3")),
}
"""Scheme -> package. Further file systems of fsspec would need a row here and a test."""


def scheme_of(text: str) -> str | None:
    """Scheme of an address in lower case; None for a path."""
    match = _SCHEME.match(text)
    return match[1].lower() if match else None


def is_remote(text: str) -> bool:
    """Whether a shard lies at an address, not at a path."""
    return scheme_of(text) is not None


def is_http(address: str) -> bool:
    """Whether an address is read by HTTP, so that its path is quoted and a query may follow."""
    return scheme_of(address) in HTTP


def file_name(address: str) -> str:
    """Part of an address or path behind its last slash, without a query; empty for `https://host/folder/`."""
    path = unquote(urlsplit(address).path) if is_http(address) else address
    return path.rpartition("/")[2]


def path_of(address: str) -> str:
    """Path of a `file://` address."""
    return unquote(address.partition("://")[2].removeprefix("localhost"))


def folder_of(address: str) -> str:
    """Address of the folder of a file; a query, such as a signature, is kept."""
    return _with_path(address, lambda path: path.rpartition("/")[0])


def join(folder: str, name: str) -> str:
    """Address of a file of a folder; a query of the folder is kept."""
    shown = quote(name) if is_http(folder) else name
    return _with_path(folder, lambda path: f"{path.rstrip('/')}/{shown}")


def _with_path(address: str, change: Callable[[str], str]) -> str:
    if not is_http(address):
        return change(address)
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=change(parts.path), fragment=""))
