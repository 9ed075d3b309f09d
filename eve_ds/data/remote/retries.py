"""Repeat failed requests: exponential backoff with jitter, a deadline per read, and a limit for their rate."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

from eve_ds.config import RemoteConfig
from eve_ds.data.remote.errors import FailedAttempt, RemoteError
from eve_ds.data.remote.time_limit import TimeLimit
from eve_ds.log import get_logger
from eve_ds.printable import without_credentials

FIRST_WAIT = 0.1
"""Seconds before the first repetition; the wait doubles with each further one."""
LONGEST_WAIT = 30.0
"""Seconds."""
MANY_ATTEMPTS = 6
"""Failed attempts of one read, in some three seconds, that are worth a warning."""
PAUSE_SECONDS = 60.0
"""Seconds between two warnings of a process."""
WINDOW = 200
"""Least number of reads over which the share of those is measured whose first request failed."""
WINDOW_SHARE = 4
"""Least number of reads, for each of those that a process has in progress, over which that share is measured: when a
server goes down, all of them fail at once."""

T = TypeVar("T")


class Clock(NamedTuple):
    """Time in seconds, and a way to let it pass."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


SYSTEM_CLOCK = Clock()


class Retries:
    """Repetition of the requests of one process, in any of its threads.

    Args:
        config: deadline, and largest share of failed requests.
        clock: clock of deadlines and waits.
    """

    def __init__(self, config: RemoteConfig, clock: Clock) -> None:
        self._config, self._clock = config, clock
        self._limit = TimeLimit(config.reads_ahead + 1)
        self._random = random.Random()  # not the global one, which belongs to the run
        self._window = max(WINDOW, WINDOW_SHARE * (config.reads_ahead + 1))
        self._outcomes: deque[str] = deque(maxlen=self._window)
        """Reason for which the first request of each read failed, and an empty text for each that succeeded."""
        self._counting = threading.Lock()
        self._next_warning = -math.inf

    def call(self, address: str, request: Callable[[float], T]) -> T:
        """Result of `request(end)` at its first success; `end` is the time on the clock when it should give up.

        Raises:
            RemoteError: the deadline has passed, too many requests fail, or the request raised it.
        """
        start = self._clock.now()
        end = start + self._config.deadline_seconds
        attempts = 0
        while True:
            try:
                result = self._limit.call(partial(request, end), end - self._clock.now())
            except FailedAttempt as failure:
                attempts += 1
                if attempts == 1:  # while a server is down, every read in progress repeats its requests many times
                    self._count(address, failure.reason)
                wait = max(self._wait(attempts), failure.wait)
                if self._clock.now() + wait > end:
                    asked = f" and asks to wait {failure.wait:,.0f} s" if failure.wait == wait else ""
                    raise RemoteError(
                        f"{without_credentials(address)} cannot be read: {failure.reason}{asked} ({attempts} attempts "
                        f"in {self._clock.now() - start:.0f} s, data.remote.deadline_seconds is "
                        f"{self._config.deadline_seconds:g}); rerun the same command when the server answers again"
                    ) from None
                if attempts >= MANY_ATTEMPTS:
                    self._warn(address, failure.reason, attempts, end)
                self._clock.sleep(wait)
            else:
                if not attempts:
                    self._count(address, "")
                return result

    def _warn(self, address: str, reason: str, attempts: int, end: float) -> None:
        """Say that a read waits for a server; several threads may, but one line in a minute is enough."""
        with self._counting:
            now = self._clock.now()
            if now < self._next_warning:
                return
            self._next_warning = now + PAUSE_SECONDS
        get_logger().warning(
            "%s cannot be read: %s (%d attempts); trying for %.0f s more (data.remote.deadline_seconds)",
            without_credentials(address),
            reason,
            attempts,
            end - now,
        )

    def _wait(self, attempts: int) -> float:
        """Seconds before the next attempt: half fixed, half random, so that many workers do not come at once."""
        wait = min(FIRST_WAIT * 2.0 ** min(attempts - 1, 30), LONGEST_WAIT)
        return wait * self._random.uniform(0.5, 1.0)

    def _count(self, address: str, reason: str) -> None:
        with self._counting:
            self._outcomes.append(reason)
            count, failed = len(self._outcomes), Counter(filter(None, self._outcomes))
        if count < self._window or failed.total() <= self._config.max_failed_share * self._window:
            return
        reasons = ", ".join(f"{name} {count}" for name, count in failed.most_common())
        raise RemoteError(
            f"the first requests of {failed.total()} of the last {self._window} reads failed ({reasons}; the last one "
            f"for {without_credentials(address)}), more than data.remote.max_failed_share "
            f"({self._config.max_failed_share:g}) allows: repair the server or the network, then rerun the same command"
        )
