"""Read files of unknown origin: regular files up to a size, and JSON of bounded depth, with errors of one line.

Every file of JSON that the package reads is parsed here.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from eve_ds import limits

_NO_SPACE = re.compile(r"[^ \t\n\r]")
_TOO_DEEP = f"lists and objects are nested deeper than {limits.JSON_DEPTH} levels"


def read_file(path: str | Path, most: int, offset: int = 0, size: int | None = None) -> bytes:
    """Read a regular file, or `size` bytes of it from `offset`; a slice that the file does not hold is shorter.

    A device, a pipe, a socket or a folder is never read, so the call returns whatever the path names.

    Args:
        path: the file; symbolic links are followed.
        most: largest number of bytes to read.
        offset: first byte.
        size: number of bytes; None: up to the end of the file.

    Raises:
        OSError: the file is missing, not regular or cannot be read, or there are more than `most` bytes; `strerror`
            says which.
    """
    try:
        # Without O_NONBLOCK the open call would wait for a writer of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a NUL character, or a surrogate that stands for no byte
        raise FileNotFoundError(errno.ENOENT, "no file can have this name", str(path)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        wanted = max(status.st_size - offset, 0) if size is None else size
        if wanted > most:
            raise OSError(errno.EOVERFLOW, f"{wanted:,} bytes, more than the {most:,} that are read", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            file.seek(offset)
            return file.read(wanted)
    finally:
        os.close(descriptor)


def read_json(path: str | Path, most: int = limits.SMALL_JSON_BYTES) -> Any:
    """Read a file of one JSON document.

    Raises:
        OSError: see :func:`read_file`.
        ValueError: see :func:`parse_json`.
    """
    return parse_json(read_file(path, most))


def read_lines(path: str | Path, most: int = limits.RECORD_BYTES) -> list[str]:
    """Lines of a UTF-8 file, without their line feeds; the last one, which no line feed ends, is empty in a whole file.

    Only a line feed ends a line: :meth:`str.splitlines` would also split at characters that JSON allows in a string,
    such as U+2028.

    Raises:
        OSError: see :func:`read_file`.
        UnicodeDecodeError: the file is not UTF-8.
    """
    return read_file(path, most).decode("utf-8").split("\n")


def parse_json(document: bytes | str) -> Any:
    """Parse a JSON document; bytes must be UTF-8 and may begin with a byte order mark.

    Raises:
        ValueError: the document is not UTF-8, not JSON, nested deeper than `limits.JSON_DEPTH`, or has a number of more
            than `limits.JSON_DIGITS` digits; the message is one line.
    """
    text = document if isinstance(document, str) else document.decode("utf-8-sig")
    start = _NO_SPACE.search(text)
    tree, end = parse_json_at(text, len(text) if start is None else start.start())
    rest = _NO_SPACE.search(text, end)
    if rest is not None:
        raise json.JSONDecodeError("Extra data", text, rest.start())
    return tree


def parse_json_at(text: str, start: int) -> tuple[Any, int]:
    """Parse the JSON document that begins at a character; returns it and the place behind it.

    Raises:
        ValueError: see :func:`parse_json`; a JSONDecodeError where the text is not JSON, or ends inside the document.
    """
    try:
        tree, end = _DECODER.raw_decode(text, start)
    except RecursionError:  # thousands of levels
        raise ValueError(_TOO_DEEP) from None
    if depth_exceeds(tree, limits.JSON_DEPTH):
        raise ValueError(_TOO_DEEP)
    return tree, end


def _whole_number(digits: str) -> int:
    if len(digits) > limits.JSON_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits, more than {limits.JSON_DIGITS}")
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_whole_number)


def depth_exceeds(tree: Any, most: int) -> bool:
    """Whether lists and objects of a parsed document are nested deeper than `most` levels.

    Code that walks through such a document could end in a traceback.
    """
    level = [tree]
    for _ in range(most):
        lists = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for children in lists for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True
