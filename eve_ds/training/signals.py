"""Signals that ask a run to save and stop."""

from __future__ import annotations

import signal
from typing import Any

from eve_ds.distributed import get_logger

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Ask a run to save and end: what `scancel`, pre-emption and `sbatch --signal` send."""


class StopSignals:
    """Notes that a signal has asked to stop, while it is entered; what the signals did before comes back after."""

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
        """The step under way is finished, and one more may follow before all ranks know."""
        self.requested = True
        get_logger().warning("%s: saving at the end of the step, then stopping", signal.Signals(number).name)
