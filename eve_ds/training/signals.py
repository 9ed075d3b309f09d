"""Signals that make a run save and stop."""

from __future__ import annotations

import signal
from typing import Any

from eve_ds.distributed import get_logger

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that make a run save and stop; `scancel`, preemption and `sbatch --signal` send them."""


class StopSignals:
    """Context that records a request to stop; leaving it restores the previous signal handlers."""

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: object) -> None:
        """Record the request; the current step finishes, and one more step may follow before all ranks know."""
        self.requested = True
        get_logger().warning("%s: will save after this step and stop", signal.Signals(number).name)
