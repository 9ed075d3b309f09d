"""Run a function in a forked child: bounded memory and time; programs, connections and canaries are reported."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eve_ds.cli.command import complain, ending
from hostile.case import CANARY

MEMORY = 2 * 2**30
"""Bytes of address space that the child may map beyond those of its parent."""
SECONDS = 20.0
STARTS_PROGRAM = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn")
CONNECTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")


class Outcome(NamedTuple):
    """What the child did."""

    code: int
    """Exit code; -N for signal N."""
    output: str
    """Standard output and standard error."""
    forbidden: str
    """Forbidden things that the child tried, one per line; empty if there were none."""


def contained(action: Callable[[], Any], folder: Path) -> Outcome:
    """Run `action` in a child, whose output goes to files in `folder`; an error becomes a line as in a command.

    A result that is a whole number becomes the exit code.

    Python reports what it opens and starts to the child's audit hook. Files that a library opens in C or Rust are not
    seen.
    """
    output, forbidden = folder / "output.txt", folder / "forbidden.txt"
    forbidden.touch()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _run_in_child(action, output, forbidden)
            sys.stdout.flush()
        except BaseException:
            os.write(2, traceback.format_exc().encode(errors="replace"))
        finally:
            os._exit(code)  # whatever happens, the child never returns into the tests
    status = _wait(child)
    return Outcome(os.waitstatus_to_exitcode(status), output.read_text(errors="replace"), forbidden.read_text())


def _run_in_child(action: Callable[[], Any], output: Path, forbidden: Path) -> int:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout = sys.stderr = open(descriptor, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    report = os.open(forbidden, os.O_WRONLY | os.O_APPEND)
    sys.addaudithook(lambda event, arguments: _audit(event, arguments, report))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        result = action()
        return result if isinstance(result, int) else 0
    except SystemExit as end:
        return int(end.code or 0)
    except Exception as error:
        end = ending(error)
        if end is None:
            raise
        return complain("case", end.line, end.code)


def _audit(event: str, arguments: tuple[Any, ...], report: int) -> None:
    """Write a line for an event that no file may cause."""
    if event in STARTS_PROGRAM or event in CONNECTS:
        os.write(report, f"{event} {arguments[:2]}\n".encode(errors="replace"))
    elif event == "open" and isinstance(arguments[0], str | bytes) and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if CANARY in path:
            os.write(report, f"opened {path}\n".encode(errors="replace"))


def _wait(child: int) -> int:
    """Wait status of the child; kill it, and processes that it started, after :data:`SECONDS`."""
    with _alarm(SECONDS, child):
        return os.waitpid(child, 0)[1]


@contextlib.contextmanager
def _alarm(seconds: float, child: int) -> Iterator[None]:
    deadline = time.monotonic() + seconds
    former = signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, deadline - time.monotonic())
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
