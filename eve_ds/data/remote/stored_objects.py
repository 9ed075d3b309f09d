"""Objects of object stores (s3://, gs://), read in ranges by the file systems of `fsspec`.

They know the credentials of each store and its signatures. Their event loop runs in a thread, which a forked process
does not have: each process makes its own file system.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from eve_ds.data.remote.addresses import scheme_of
from eve_ds.data.remote.errors import FailedAttempt, MissingObject, RefusedObject, RemoteError
from eve_ds.data.remote.interface import Version
from eve_ds.printable import excerpt, printable, without_credentials

_LASTING = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, getattr(errno, "EREMCHG", errno.ENOENT)}
"""Errors by which the file systems say that a request is wrong."""
_LIBRARIES = {"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "requests", "s3fs", "urllib3"}
"""Packages whose exceptions, if they are no OSError, say that a request failed."""
_WITHOUT_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}


class ObjectStore:
    """Buckets of one scheme; see :class:`eve_ds.data.remote.interface.Server`.

    The file system reads credentials and endpoints from the environment. Its own repetitions are off where it has an
    option for them, so that one rule holds for all servers.

    Args:
        scheme: scheme of the addresses, such as `s3`.
        timeout: seconds to wait for a connection, and for further bytes.
        connections: number of connections to keep open.
    """

    def __init__(self, scheme: str, timeout: float, connections: int) -> None:
        options: dict[str, Any] = {"requests_timeout": timeout}
        if scheme == "s3":
            limits = {"connect_timeout": timeout, "read_timeout": timeout, "max_pool_connections": connections}
            options = {"config_kwargs": limits | {"retries": {"max_attempts": 0}}}
        self._files = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
        self._files.retries = 1

    def open(self, address: str, end: float) -> StoredObject:
        """Open an object."""
        return StoredObject(self._files, address)

    def read_whole(self, address: str, most: int) -> bytes:
        """Read a small object as a whole."""
        found = StoredObject(self._files, address)
        size = found.version.size
        if size > most:
            raise RemoteError(f"{without_credentials(address)} has more than the {most:,} bytes that are read")
        return found.read(0, size, 0.0) if size else b""

    def matching(self, pattern: str) -> list[str]:
        """Addresses of the objects and folders that match a glob pattern, or have that very name, sorted."""
        scheme, path = scheme_of(pattern), self._files._strip_protocol(pattern)
        with translated(pattern):
            found = self._named(path) or self._files.glob(path, detail=True)
        slash = {name: "/" if details["type"] == "directory" else "" for name, details in found.items()}
        return sorted(f"{scheme}://{self._files._strip_protocol(name)}{slash[name]}" for name in found)

    def _named(self, path: str) -> dict[str, dict[str, Any]]:
        """The object or folder of a name, which may have the characters of a pattern; empty if there is none."""
        try:
            return {path: self._files.info(path)}
        except (FileNotFoundError, PermissionError):  # stores forbid what is missing to those who may not list
            return {}


class StoredObject:
    """One object; the constructor asks for its size and version.

    Args:
        files: file system of this process.
        address: address of the object.

    Raises:
        FailedAttempt: the request may be repeated.
        RemoteError: the object is missing, or the credentials are.
    """

    start = b""

    def __init__(self, files: Any, address: str) -> None:
        self._address = address
        with translated(address):
            # Without a cache of its own. The file of s3fs sends the ETag with each range, so that the store refuses
            # a range of another object.
            self._file = files.open(address, "rb", cache_type="none")
            self.version = Version(int(self._file.size), _tag(self._file.details))

    def read(self, offset: int, size: int, end: float) -> bytes:
        """Read a range; see :class:`eve_ds.data.remote.interface.RemoteObject`."""
        with translated(self._address):
            # The method by which each file system reads a range for its files. It leaves their position alone, so
            # threads may call it at the same time.
            data: bytes = self._file._fetch_range(offset, offset + size)
        if len(data) != size:
            raise FailedAttempt(f"cut after {len(data):,} of {size:,} bytes")
        return data


@contextmanager
def translated(address: str) -> Iterator[None]:
    """Turn the errors of file systems into those of this package; others, which are bugs, stay as they are."""
    try:
        yield
    except (FailedAttempt, RemoteError):
        raise
    except Exception as error:
        found = _translation(error, address)
        if found is None:
            raise
        raise found from None


def _translation(error: Exception, address: str) -> Exception | None:
    if isinstance(error, IndexError) and isinstance(error.__context__, TimeoutError):
        error = error.__context__  # files of s3fs look for a number in it, which it does not have
    shown, name, text = without_credentials(address), type(error).__name__, _text(error)
    is_forbidden = isinstance(error, PermissionError) or (isinstance(error, OSError) and text.startswith("Forbidden"))
    if is_forbidden or isinstance(error, FileNotFoundError):
        what = "may not be read with these credentials" if is_forbidden else "does not exist"
        return (RefusedObject if is_forbidden else MissingObject)(f"{shown} {what} ({text})")
    if name == "FileExpired":
        return RemoteError(
            f"{shown} was replaced while it was read: restore it and rerun the same command, or start another run"
        )
    if name in _WITHOUT_CREDENTIALS:
        advice = "FSSPEC_S3_ANON=true reads public buckets" if scheme_of(address) == "s3" else "log in first"
        return RemoteError(f"{shown} needs credentials ({text}); {advice}")
    if isinstance(error, OSError) and error.errno in _LASTING:
        return RemoteError(f"{shown} cannot be read ({text})")
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _LIBRARIES:
        return FailedAttempt(text)
    return None


def _tag(details: dict[str, Any]) -> str:
    """Tag of a version: of S3, of Google, or the time of the last change."""
    names = ("ETag", "etag", "generation", "mtime", "LastModified", "created")
    return excerpt(next((str(details[name]) for name in names if details.get(name)), ""))


def _text(error: BaseException) -> str:
    """Text of an error on one line, without its address, which the message names already."""
    if isinstance(error, TimeoutError):
        return "timed out"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return excerpt(printable(" ".join(text.split()))) or type(error).__name__
