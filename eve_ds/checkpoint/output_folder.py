"""Rule for output folders: new, empty, or holding nothing but an earlier result that the caller may replace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from eve_ds.checkpoint.files import listed


def check_output_folder(out: Path, error: type[ValueError], is_own: Callable[[str], object] | None = None) -> set[str]:
    """Refuse an output folder that holds other files than those of an earlier result.

    Args:
        out: the folder, which need not exist.
        error: class of the error to raise.
        is_own: whether a name in the folder is part of an earlier result; None: the folder must be empty.

    Returns:
        Names in the folder; empty if it does not exist.

    Raises:
        error: `out` is a file, or holds a name that is not the caller's.
    """
    if out.exists() and not out.is_dir():
        raise error(f"--out {out} is a file: name a new or empty folder")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = {name for name in names if is_own is None or not is_own(name)}
    if foreign:
        raise error(not_empty(out, foreign))
    return names


def not_empty(out: Path, names: Iterable[str]) -> str:
    """Message that refuses a folder because of the names in it."""
    return f"--out {out} is not empty, it holds {listed(names)}: name a new or empty folder"
