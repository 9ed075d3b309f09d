"""Limit for the time of a request, whatever keeps it: a name server, headers or bytes that come in drops, a library."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from eve_ds.data.remote.errors import FailedAttempt
from eve_ds.data.remote.readers import Readers

T = TypeVar("T")


class TimeLimit:
    """Calls requests in threads, which it leaves alone when their time is over.

    Args:
        most: number of requests at a time.
    """

    def __init__(self, most: int) -> None:
        self._threads = Readers(most)

    def call(self, request: Callable[[], T], seconds: float) -> T:
        """Result or error of a request.

        Raises:
            FailedAttempt: the request has not ended after some seconds; nobody gets its result.
        """
        future = self._threads.submit(request)
        try:
            return future.result(max(seconds, 0.0))
        except TimeoutError:
            if future.done():  # the request itself raised it
                raise
            future.cancel()
            raise FailedAttempt("too slow") from None
