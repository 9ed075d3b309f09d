"""Files that appear whole or not at all, and errors that say that a disk takes no more bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path

from eve_ds.printable import excerpt, printable

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE})
"""Full disk, used-up quota, too large a file, read-only mount, broken device, lost network mount: other settings do not
help, and the same command succeeds once the disk works again."""
_OS_ERROR_OF_RUST = re.compile(r"(?P<reason>[^:]+) \(os error (?P<number>\d+)\)")
_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/", re.IGNORECASE)


class SaveError(RuntimeError):
    """Results or checkpoints cannot be written to disk; older checkpoints are intact."""


def is_disk_error(error: BaseException) -> bool:
    """Whether an exception of Python, torch or safetensors is, or was raised after, one of :data:`DISK_ERRORS`."""
    return _disk_error(error) is not None


def _disk_error(error: BaseException) -> BaseException | None:
    """Return the error of the disk in the chain of an exception: torch.save ends in another one about its archive."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := _OS_ERROR_OF_RUST.search(str(error))):  # libraries in Rust give it as text
        number = int(match["number"])
    if number in DISK_ERRORS:
        return error
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None if before is None else _disk_error(before)


def reason(error: BaseException) -> str:
    """Text of an exception on one line, as :func:`cause` gives it, behind the name of the file if known.

    If an error of the disk came before the exception, the text is that of the error of the disk.
    """
    error = _disk_error(error) or error
    name = error.filename if isinstance(error, OSError) and error.strerror else None
    return f"{name}: {cause(error)}" if name else cause(error)


def cause(error: BaseException) -> str:
    """Text of an exception on one line, without the number of an operating-system error and the name of the file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if match := _OS_ERROR_OF_RUST.search(str(error)):
        return match["reason"].strip()
    return " ".join(str(error).split())


def unusable(error: OSError) -> str:
    """One line about an error of the operating system that is none of the disk's."""
    return f"{excerpt(str(error.filename or 'disk'))} cannot be used: {error.strerror or error}"


def output_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file or folder to write.

    Raises:
        ValueError: the path is empty, an address such as `s3://bucket/x`, or not UTF-8, which libraries that write
            weights and tokenizers require.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError("an empty path is given, perhaps by an unset variable of the shell: name a folder or file")
    if address := _ADDRESS.match(text):
        raise ValueError(
            f"{printable(text)} is an address ({address['scheme']}:), and only disks are written: name a path, upload "
            "later"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{printable(text)} is not UTF-8: rename it") from None
    return Path(path)


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
