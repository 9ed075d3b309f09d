"""Folder of compiled libraries: a library runs with the rights of the user, so nobody else may write it.

The folder is `EVE_DS_CACHE`, by default `~/.cache/eve_ds`. It must belong to this user or to root, and neither its
group nor others may write to it; the same holds for a library in it. Users can share the folder of root.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eve_ds.file_lock import lock_file


class CacheError(RuntimeError):
    """The folder of compiled libraries cannot be used; the message says what to do."""


def cache_folder() -> Path:
    """Folder that holds the compiled libraries.

    Raises:
        CacheError: neither an environment variable nor the user database names one.
    """
    chosen = os.environ.get("EVE_DS_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if os.environ.get("EVE_DS_CACHE"):
        return Path(str(chosen))
    try:
        return (Path(chosen) if chosen else Path.home() / ".cache") / "eve_ds"
    except RuntimeError:
        raise CacheError("this user has no home folder: name a folder for compiled libraries in EVE_DS_CACHE") from None


def make_private(folder: Path) -> None:
    """Create the folder, readable by this user only, or check who may write to it.

    Raises:
        CacheError: another user may write to the folder.
        OSError: the folder cannot be created.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if problem := _writers(folder.stat()):
        raise CacheError(
            f"the folder of compiled libraries {folder} {problem}, and libraries run as you: take away that right "
            f"(chmod go-w {folder}), or name a folder of your own in EVE_DS_CACHE"
        )


def is_trusted(library: Path) -> bool:
    """Whether a library exists, is a regular file and no link, and can be written by nobody but this user and root."""
    try:
        status = library.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and _writers(status) is None


def _writers(status: os.stat_result) -> str | None:
    """Phrase on other users who may write to a file or folder; None if there are none."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (uid {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by other users (mode {stat.S_IMODE(status.st_mode):o})"
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock for one process at a time; the system releases the lock if the process dies.

    The file is neither emptied nor reached through a symbolic link.

    Raises:
        OSError: the file cannot be opened for writing, or is a link.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    with open(descriptor, "r+b", buffering=0) as file:
        lock_file(file, wait=True, owner="file")
        yield
