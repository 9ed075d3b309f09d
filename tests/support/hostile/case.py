"""One case of the corpus, and parts that several kinds share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CANARY = "canary"
"""Part of the name of every file that no command may open."""
DEEP = b"[" * 100_000
"""JSON, and YAML, that ends parsers which call themselves."""
BIGINT = b"9" * 100_000


class Case(NamedTuple):
    """Hostile files, what reads them, and how that ends."""

    run: Callable[[Path, Path], Any]
    """Writes the files into the first folder, reads them as a user would, and returns an exit code; anything else is 0.
    The second folder holds an honest `run`, `export` and `task`, to be copied."""
    line: str
    """Regular expression of a line on standard output or standard error."""
    code: int = 2
    """Exit code."""


def write(path: Path, content: bytes | str | Any) -> Path:
    """Write bytes, text, or a tree as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def pipe(path: Path) -> Path:
    """Create a pipe, on which a plain `open` waits for ever."""
    os.mkfifo(path)
    return path


def endless(path: Path) -> Path:
    """Create a link to a device that never ends."""
    path.symlink_to("/dev/zero")
    return path


def sparse(path: Path, size: int, start: bytes = b"") -> Path:
    """Create a file of any size that takes no room on the disk."""
    write(path, start)
    os.truncate(path, size)
    return path
