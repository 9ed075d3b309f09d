"""Files that appear whole or not at all, and errors that say that a disk takes no more bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE})
"""Full disk, used-up quota, too large a file, read-only mount, broken device, lost network mount: other settings do not
help, and the same command succeeds once the disk works again."""
_OS_ERROR_OF_RUST = re.compile(r"(?P<reason>[^:]+) \(os error (?P<number>\d+)\)")


class SaveError(RuntimeError):
    """Results or checkpoints cannot be written to disk; older checkpoints are intact."""


def is_disk_error(error: BaseException) -> bool:
    """Whether an exception of Python, torch or safetensors is caused by one of :data:`DISK_ERRORS`."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := _OS_ERROR_OF_RUST.search(str(error))):  # libraries in Rust give it as text
        number = int(match["number"])
    return number in DISK_ERRORS


def reason(error: BaseException) -> str:
    """Text of an exception on one line, as :func:`cause` gives it, behind the name of the file if known."""
    name = error.filename if isinstance(error, OSError) and error.strerror else None
    return f"{name}: {cause(error)}" if name else cause(error)


def cause(error: BaseException) -> str:
    """Text of an exception on one line, without the number of an operating-system error and the name of the file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if match := _OS_ERROR_OF_RUST.search(str(error)):
        return match["reason"].strip()
    return " ".join(str(error).split())


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file and flush it to disk, replacing an earlier one; after an error or a signal that one is unchanged.

    Raises:
        OSError: writing failed.
    """
    aside = path.with_name(f".{path.name}.writing")
    try:
        with aside.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
