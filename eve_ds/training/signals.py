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
        self._received: int | None = None
        """Signal that the log does not name yet."""
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: object) -> None:
        """Record the request; writes nothing, since the signal may interrupt a write to the same stream."""
        self.requested, self._received = True, number

    def log(self) -> None:
        """Log a new request; the current step finishes, and one more step may follow before all ranks know."""
        if self._received is not None:
            name, self._received = signal.Signals(self._received).name, None
            get_logger().warning("%s: saving and stopping after this step or the next", name)
