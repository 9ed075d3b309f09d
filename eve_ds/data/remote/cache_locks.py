"""Locks between the processes that share a cache; their owners may be stopped, so nobody waits for one for long."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eve_ds.data.remote.retries import Clock
from eve_ds.file_lock import HELD

LOCK_SECONDS = 3.0
"""Seconds to wait for a lock: a block takes less, unless its server or the process that fetches it is in trouble."""
STUCK_SECONDS = 60.0
"""Seconds for which nobody of this process waits again for a lock that did not come."""
_POLL_SECONDS = 0.02


class CacheLocks:
    """Locks of the threads of one process, among themselves and with other processes.

    Args:
        clock: clock of the waits.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._stuck_until: dict[Path, float] = {}

    @contextmanager
    def taken(self, path: Path) -> Iterator[int | None]:
        """Context in which a file is open and locked, which is created if it is missing.

        Yields:
            Descriptor of the file; None if the lock has another owner. In a file system without locks the file counts
            as locked.

        Raises:
            OSError: the file cannot be opened.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            yield descriptor if self._lock(descriptor, path) else None
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int, path: Path) -> bool:
        start = self._clock.now()
        is_stuck = start < self._stuck_until.get(path, start)
        while not _try_to_lock(descriptor):
            if is_stuck or self._clock.now() >= start + LOCK_SECONDS:
                self._stuck_until[path] = self._clock.now() + STUCK_SECONDS
                return False
            self._clock.sleep(_POLL_SECONDS)
        return True


def _try_to_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; False if it has another owner."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in HELD
    return True
