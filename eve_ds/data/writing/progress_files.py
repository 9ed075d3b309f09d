"""Files of an unfinished folder of shards: where they are, and how they are written and read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from eve_ds import storage
from eve_ds.reading import read_json

PROGRESS_FOLDER = ".prepare"


class OutputError(ValueError):
    """Raised for an output folder that cannot be written or has other contents; the message says what to do."""


def record_path(folder: Path, shard: str) -> Path:
    """Path of the record of a finished shard."""
    return folder / PROGRESS_FOLDER / f"{shard}.json"


def read_progress(path: Path) -> Any:
    """Content of a file of an unfinished run; raises FileNotFoundError, or OutputError for one that is not JSON."""
    try:
        return read_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(not_written(path, storage.cause(error))) from None


def not_written(path: Path, problem: str) -> str:
    """Message about a file that another program wrote into the folder of the progress."""
    return f"{path} is no file of this command ({problem}); remove {path.parent}, or choose another --out"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file aside and rename it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def dump(tree: Any, indent: int | None = None) -> bytes:
    """JSON in ASCII, because names may contain bytes that are not valid text; one line without `indent`."""
    separators = None if indent else (",", ":")
    return json.dumps(tree, sort_keys=True, indent=indent, separators=separators).encode() + (b"\n" if indent else b"")
