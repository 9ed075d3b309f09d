"""Terminal of the demo: shows log and progress of a step, while messages of libraries go to a file."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TextIO

TERMINAL_FD = "EVE_DS_TERMINAL_FD"
"""Environment variable that the demo sets for its steps: file descriptor of its terminal."""


def keep_terminal() -> None:
    """In a step of the demo, let `sys.stderr` be the demo's terminal; without :data:`TERMINAL_FD` do nothing.

    Descriptors 1 and 2 are the log file then, for the output of DeepSpeed, NCCL, gloo and child processes; warnings of
    Python join them. The package's logger and the progress line look up `sys.stderr` when they write.
    """
    descriptor = os.environ.pop(TERMINAL_FD, None)  # child processes have another descriptor of that number
    if descriptor is None:
        return
    try:
        sys.stderr = os.fdopen(os.dup(int(descriptor)), "w", buffering=1, errors="backslashreplace")
    except (ValueError, OSError):  # not set by the demo
        return
    warnings.showwarning = _to_log


def _to_log(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    stream = file or sys.__stderr__
    if stream is not None:
        stream.write(warnings.formatwarning(message, category, filename, lineno, line))
        stream.flush()
