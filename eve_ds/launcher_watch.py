"""Thread of a rank that ends it with its launcher, and before training with its peers and at signals.

A rank that waits for another one, in the rendezvous or in a collective, runs no Python and thus no signal handler.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from eve_ds.signals import STOP_SIGNALS, StopSignals

POLL_SECONDS = 1.0
"""Seconds between looks at the launcher."""
GRACE_SECONDS = 5.0
"""Seconds that the main thread of a rank gets to end by itself before training."""
GONE = -1
"""Id in place of a launcher that has ended already."""
MARKS = (
    *("TORCHELASTIC_RUN_ID", "CROSS_SIZE", "SLURM_STEP_ID", "PMI_RANK", "PMIX_RANK", "PALS_RANKID"),
    *("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK", "FLUX_TASK_RANK"),
)
"""Variables of launchers that stay beside their ranks; the first is torchrun's, the second deepspeed's.

Ranks that a shell starts with RANK and WORLD_SIZE have none of these, and may outlive the shell."""


class LauncherWatch(threading.Thread):
    """Context around the work of a rank. The death of its launcher counts as SIGTERM.

    Args:
        stop: handlers of the signals, installed already.
        stopped: exit code of a rank whose main thread does not handle a signal before it trains.
        rank_lost: exit code of a rank that has lost a rank of its host before it trains.
        environ: environment of the process.
    """

    def __init__(self, stop: StopSignals, stopped: int, rank_lost: int, environ: Mapping[str, str]) -> None:
        super().__init__(name="launcher watch", daemon=True)
        self._signals, self._stopped, self._rank_lost, self._environ = stop, stopped, rank_lost, environ
        self._signaled = self._lost_peer = False
        self._launcher = launcher_processes() if any(mark in environ for mark in MARKS) else []
        self._peers = _children_of(self._launcher[0]) if self._launcher else set()
        self._ended = threading.Event()

    def __enter__(self) -> LauncherWatch:
        self._received, self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Python writes the number of a signal there as it arrives, even if the main thread is busy outside of Python.
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakeup)  # wakes the thread
        self.join()
        os.close(self._received)

    def run(self) -> None:
        """Look at signals as they arrive, and at the launcher every second."""
        while not self._ended.is_set():
            ready, _, _ = select.select([self._received], [], [], POLL_SECONDS)
            self._signaled |= bool(ready and set(os.read(self._received, 64)) & set(STOP_SIGNALS))
            if self._signaled:  # even if a library has caught the exception
                self._end_after_grace(self._stopped, "stopped by a signal before training")
            if self._launcher and not self._signals.deferred and self._has_lost_a_peer():
                self._end_after_grace(self._rank_lost, "another rank of this host has ended before training")
            if self._launcher and not still_above(self._launcher):
                _say("the launcher has ended, this rank stops")
                self._launcher = []
                os.kill(os.getpid(), signal.SIGTERM)

    def _has_lost_a_peer(self) -> bool:
        """Whether a process that this thread has seen beside its own has ended; not every launcher ends the others."""
        now = _children_of(self._launcher[0])
        self._lost_peer |= not self._peers <= now
        self._peers = now
        return self._lost_peer

    def _end_after_grace(self, code: int, reason: str) -> None:
        """End a rank unless its main thread does, or trains; a process without other ranks never waits for them."""
        if self._signals.deferred or self._environ.get("WORLD_SIZE", "1") == "1":  # set once the launcher is known
            return
        if not self._ended.wait(GRACE_SECONDS) and not self._signals.deferred:
            _say(f"{reason}; rerun the same command to resume")
            os._exit(code)


def _say(message: str) -> None:
    with suppress(OSError):  # the end of a launcher may have closed the pipe
        sys.stderr.write(f"{message}\n")


def launcher_processes() -> list[int]:
    """Ids of the processes whose end is the end of the launcher: the parent, and then the command that started it.

    The parent of a rank of `deepspeed` is a process of its host; the command that the user typed is one above. A parent
    that ended while Python started has left this process to process 1, which is the launcher in a container only.
    """
    parent = os.getppid()
    if parent == 1 and not _names_program(1, b"python"):
        return [GONE]
    above = _parent_of(parent)
    return [parent, above] if _names_program(above, b"deepspeed") else [parent]


def still_above(processes: list[int]) -> bool:
    """Whether each of the processes still is the parent of the one before, and the first that of this process.

    An orphan gets another parent at once, so a process of the same id cannot be taken for the launcher.
    """
    return os.getppid() == processes[0] and all(_parent_of(child) == parent for child, parent in pairwise(processes))


def _names_program(process: int, program: bytes) -> bool:
    """Whether the program of a process, or the script or module that it runs, has a name like this."""
    with suppress(OSError):
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[:3]
        return any(program in word.rpartition(b"/")[2] for word in words)
    return False


def _children_of(process: int) -> set[int]:
    """Ids of the children of a process that run; empty where the kernel does not list them."""
    with suppress(OSError):
        listed = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
        return {int(child) for child in listed if not _is_zombie(int(child))}
    return set()


def _is_zombie(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    return True


def _parent_of(process: int) -> int:
    """Id of the parent of a process; 0 if the process has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    return 0
