"""Worker processes of data loaders, which leave the signals that end a run to its main process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from eve_ds.signals import STOP_SIGNALS, children_without_signals

POLL_SECONDS = 0.5
"""Seconds between looks at the parent."""


def start_loader(dataset: Any, **options: Any) -> Iterator[Any]:
    """Iterator of a `DataLoader`, whose worker processes leave :data:`STOP_SIGNALS` to this process.

    Args:
        dataset: data set of the loader.
        options: further arguments of `DataLoader`.
    """
    loader = DataLoader(dataset, worker_init_fn=_leave_signals_to_the_parent, **options)
    with children_without_signals():
        return iter(loader)


def _leave_signals_to_the_parent(_: int) -> None:
    """Drop the signals that end a run, except SIGTERM from the parent, by which torch ends a worker that hangs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # `forkserver` inherits nothing
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        threading.Thread(target=_follow, args=(parent.pid, os.getppid()), name="signals", daemon=True).start()


def _follow(parent: int, above: int) -> None:
    """End the process with its parent or at its wish.

    A forked worker holds the sockets of its parent: while it lives, the other ranks do not notice that the parent died.

    Args:
        parent: process that reads the batches.
        above: process that started this one, the parent or its fork server.
    """
    while os.getppid() == above:
        received = signal.sigtimedwait(STOP_SIGNALS, POLL_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == parent:
            break
    os._exit(0)
