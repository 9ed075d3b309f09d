"""Worker processes of data loaders, which leave the signals that end a run to its main process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from eve_ds.signals import STOP_SIGNALS


def start_loader(dataset: Any, **options: Any) -> Iterator[Any]:
    """Iterator of a `DataLoader`, whose worker processes leave :data:`STOP_SIGNALS` to this process.

    Args:
        dataset: data set of the loader.
        options: further arguments of `DataLoader`.
    """
    loader = DataLoader(dataset, worker_init_fn=_leave_signals_to_the_parent, **options)
    # Workers inherit the blocked signals, so there is no moment at which one could end a worker.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(_: int) -> None:
    """Drop the signals that end a run, except SIGTERM from the parent, by which torch ends a worker that hangs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # `forkserver` inherits nothing
    threading.Thread(target=_drop_signals, args=(os.getppid(),), name="signals", daemon=True).start()


def _drop_signals(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
