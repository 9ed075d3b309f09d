"""Signals that end a command; standard library only, so that a command handles them before anything is imported."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that end a command: `scancel`, preemption, `sbatch --signal`, launchers and Ctrl-C send them."""


class Stopped(KeyboardInterrupt):
    """A signal ends the command; like Ctrl-C, it passes every `except Exception` and reaches every cleanup.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.name = signal.Signals(number).name


class StopSignals:
    """Context that handles :data:`STOP_SIGNALS`; leaving it restores the handlers of before. It may be nested.

    The first signal raises :class:`Stopped` in the main thread. After :meth:`defer`, signals are only recorded: a run
    that trains saves first. Later signals change nothing, since launchers repeat them while a run ends.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether a signal has arrived."""
        self.deferred = False
        """Whether signals are only recorded."""
        self._unnamed: int | None = None
        """Signal that the log does not name yet."""
        self._before: list[dict[int, Any]] = []

    def __enter__(self) -> StopSignals:
        # A shell lets the background jobs of a script ignore Ctrl-C, which is meant for the script.
        ignored = {signal.SIGINT} if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else set()
        handled = [number for number in STOP_SIGNALS if number not in ignored]
        self._before.append({number: signal.signal(number, self._receive) for number in handled})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.pop().items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        """Record a signal; writes nothing, since the signal may interrupt a write to the same stream."""
        first, self.requested, self._unnamed = not self.requested, True, number
        if first and not self.deferred:
            raise Stopped(number)

    def defer(self) -> None:
        """Only record signals from now on."""
        self.deferred = True

    def take_name(self) -> str | None:
        """Name of a signal that this method has not returned yet, or None."""
        number, self._unnamed = self._unnamed, None
        return None if number is None else signal.Signals(number).name


@contextmanager
def children_without_signals() -> Iterator[None]:
    """Context in which started processes inherit :data:`STOP_SIGNALS` as blocked, from their first moment."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def held_signals() -> Iterator[None]:
    """Context in which no signal raises an exception in the main thread; signals that arrive are handled at its end.

    An exception in the middle of a call that takes a lock, such as :func:`concurrent.futures.wait`, may leave the lock
    taken, and then a thread of the library waits for it for ever. To block the signals in the main thread is not
    enough: any other thread may receive them, and Python calls the handler in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in held:
        signal.signal(number, lambda received, _: arrived.append(received))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for received in arrived:
            held[signal.Signals(received)](received, None)


def ignore_stop_signals() -> None:
    """Ignore the signals from now on, for a process whose exit code is decided."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
