"""A clock whose sleeps take no time."""

from __future__ import annotations

from eve_ds.data.remote.retries import Clock


class FakeClock:
    """Clock that a sleep, or the test, moves on.

    Attributes:
        time: seconds on the clock.
        sleeps: seconds of each sleep so far.
    """

    def __init__(self) -> None:
        self.time = 0.0
        self.sleeps: list[float] = []
        self.clock = Clock(lambda: self.time, self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.time += seconds
