"""Threads that read ahead, so that a process waits for many answers of a server at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Readers:
    """Threads of one process. They are daemons: a process that ends does not wait for a server that hangs.

    Args:
        most: number of threads; each is started when no fewer would do.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Call a function in a thread; its result or error is that of the future."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._serve, name="read ahead", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def _serve(self) -> None:
        while True:
            future, call = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # raised where the result is needed
                future.set_exception(error)
