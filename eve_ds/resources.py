"""Errors of Python and torch that mean that a machine lacks memory, files or processes, or that it ended a worker."""

from __future__ import annotations

import errno
import re
from typing import NamedTuple

from eve_ds.printable import excerpt


class Lack(NamedTuple):
    """Kind of such an error."""

    name: str
    numbers: frozenset[int]
    """Numbers of operating-system errors of this kind."""
    words: re.Pattern[str]
    """Words of other errors, which have no class of their own: torch raises most of them as RuntimeError."""
    advice: str


_LACKS = (
    Lack(
        "a worker process of the data loader ended",
        frozenset(),
        re.compile(r"DataLoader worker \(pid.*"),
        "the system ends processes for which there is too little memory: set data.num_workers lower, or give "
        "containers more shared memory (--shm-size), and rerun the same command to resume",
    ),
    Lack(
        "too many open files",
        frozenset({errno.EMFILE, errno.ENFILE}),
        re.compile(r"Too many open files.*|received 0 items of ancdata"),
        "raise the limit of the system (ulimit -n), or set data.num_workers lower",
    ),
    Lack(
        "too many processes",
        frozenset({errno.EAGAIN}),
        re.compile(r"can't start new thread|Resource temporarily unavailable"),
        "raise the limit of the system (ulimit -u), or set data.num_workers lower",
    ),
    Lack(
        "out of memory",
        frozenset({errno.ENOMEM}),
        re.compile(
            r".*(out of memory|not enough memory|can(no|')t allocate memory|_ALLOC_FAILED|unable to mmap).*",
            re.IGNORECASE,
        ),
        "take smaller batches (training: train.micro_batch_size, train.activation_checkpointing), a smaller model, or "
        "more devices",
    ),
)


def lack(error: BaseException) -> str | None:
    """One line about an error that says what the machine lacks, and what to do; None for any other error."""
    if isinstance(error, BlockingIOError) and hasattr(error, "characters_written"):
        return None  # of a full pipe; a process that cannot start has the same number, but writes nothing
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, for GPUs
        number = errno.ENOMEM
    for kind in _LACKS:
        found = None if isinstance(error, OSError) else kind.words.search(str(error))
        if number in kind.numbers or (isinstance(error, RuntimeError) and found is not None):
            said = found[0].strip() if found is not None else str(error)
            return f"{kind.name}{f' ({excerpt(said)})' if said else ''}: {kind.advice}"
    return None
