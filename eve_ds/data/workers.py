"""Worker processes of data loaders, which leave the signals that end a run to its main process.

They are forked by a fork server, a process without threads: to fork a process in which NCCL and gloo have threads is
undefined. The server imports what workers need once, while the main process builds the model.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from eve_ds.data.one_buffer import OneBuffer
from eve_ds.signals import STOP_SIGNALS, children_without_signals

START_METHOD = "forkserver"
POLL_SECONDS = 0.5
"""Seconds between looks at the parent."""


def start_server(*modules: str) -> None:
    """Start the fork server of this process, unless it runs, and let it import modules that workers need.

    A caller that knows early that it will need workers saves the seconds of these imports. The launcher's variables
    must be complete: workers take the rank of their messages from them.
    """
    # The main module first: workers need it, and a launcher makes the package beside it the one that is imported.
    multiprocessing.set_forkserver_preload(["__main__", *modules])
    with children_without_signals():
        resource_tracker.ensure_running()  # unblocks signals here, which the server must not inherit
    with children_without_signals():
        forkserver.ensure_running()


def start_loader(
    dataset: Any,
    num_workers: int,
    imports: str,
    start_method: str | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Iterator[Any]:
    """Iterator of a `DataLoader`, whose worker processes leave :data:`STOP_SIGNALS` to this process.

    Args:
        dataset: data set of the loader, which workers receive by pickle; tensors in it are shared, not copied.
        num_workers: number of worker processes; 0: this process loads.
        imports: module with what the data set needs, for :func:`start_server`.
        start_method: "fork", "spawn" or "forkserver"; None: :data:`START_METHOD`.
        collate_fn: function that makes what is delivered, which worker processes send in one buffer; None: the items
            of the data set are delivered.
        options: further arguments of `DataLoader`.
    """
    start_method, collate_fn = start_method or START_METHOD, collate_fn or _unchanged
    if num_workers and start_method == START_METHOD:
        start_server(imports)
    if num_workers:
        options |= {"multiprocessing_context": start_method}
        options |= {"worker_init_fn": _leave_signals_to_the_parent}
        collate_fn = partial(_in_one_buffer, collate_fn)
    loader = DataLoader(dataset, num_workers=num_workers, collate_fn=collate_fn, **options)
    with children_without_signals():
        return iter(loader)


def _unchanged(item: Any) -> Any:
    return item


def _in_one_buffer(collate_fn: Callable[[Any], Any], samples: Any) -> OneBuffer:
    return OneBuffer(collate_fn(samples))


def _leave_signals_to_the_parent(_: int) -> None:
    """Drop the signals that end a run, except SIGTERM from the parent, by which torch ends a worker that hangs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a process that `spawn` starts inherits nothing
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent, os.getppid()), name="signals", daemon=True).start()


def _follow(parent: BaseProcess, above: int) -> None:
    """End the process with its parent or at its wish.

    A forked worker holds the sockets of its parent: while it lives, the other ranks do not notice that the parent died.

    Args:
        parent: process that reads the batches.
        above: process that started this one, the parent or its fork server. A server outlives the parent as long as
            one of its workers lives, and forked workers keep the pipes open by which they would notice the end.
    """
    while os.getppid() == above and parent.is_alive():
        received = signal.sigtimedwait(STOP_SIGNALS, POLL_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == parent.pid:
            break
    os._exit(0)
