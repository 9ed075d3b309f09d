"""Lock of a file; a file system without locks is warned of, not refused."""

from __future__ import annotations

import errno
import fcntl
import logging
from typing import IO, Any, Literal

HELD = (errno.EAGAIN, errno.EACCES)
"""Errors by which POSIX says that another process holds the lock."""


def lock_file(file: IO[Any], *, wait: bool, owner: Literal["process", "file"]) -> None:
    """Lock an open file until it is closed or the process ends.

    On a file system without locks (Lustre without `flock`: ENOSYS, NFS: ENOLCK) the call warns and returns.

    Args:
        file: file that is open for writing.
        wait: whether to wait for another owner of the lock.
        owner: `process`: children do not hold the lock, such as data workers that outlive a killed rank by seconds, and
            this process can lock the file again. `file`: the lock excludes other threads of this process too, and a
            forked child holds it.

    Raises:
        BlockingIOError: the lock has another owner.
    """
    call = fcntl.lockf if owner == "process" else fcntl.flock
    try:
        call(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in HELD:
            raise BlockingIOError(error.errno, error.strerror, file.name) from None
        logging.getLogger(__name__).warning(
            "%s cannot be locked (%s), so nothing keeps two processes from writing there at a time: start one only",
            file.name,
            error.strerror,
        )
