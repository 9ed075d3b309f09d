"""Rules for output folders: in no checkpoint; new, empty, or holding only an earlier result that may be replaced."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import listed


def enclosing_checkpoint(folder: Path) -> Path | None:
    """Checkpoint that a folder is or lies in, links followed; with further files it would count as damaged."""
    inside = Path(os.path.realpath(folder))
    names = (manifest.MANIFEST, manifest.STATE)
    return next(
        (place for place in (inside, *inside.parents) if all((place / name).is_file() for name in names)),
        None,
    )


def refuse_checkpoint(out: Path, error: type[ValueError]) -> None:
    """Raise an error of the given class if the folder `out` lies in a checkpoint."""
    checkpoint = enclosing_checkpoint(out)
    if checkpoint is not None:
        raise error(f"--out {out} lies in the checkpoint {checkpoint}, which it would damage: name another folder")


def check_output_folder(out: Path, error: type[ValueError], is_own: Callable[[str], object] | None = None) -> set[str]:
    """Refuse an output folder that holds other files than those of an earlier result.

    Args:
        out: the folder, which need not exist.
        error: class of the error to raise.
        is_own: whether a name in the folder is part of an earlier result; None: the folder must be empty.

    Returns:
        Names in the folder; empty if it does not exist.

    Raises:
        error: `out` lies in a checkpoint, is a file, or holds a name that is not the caller's.
    """
    if out.exists() and not out.is_dir():
        raise error(f"--out {out} is a file: name a new or empty folder")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = {name for name in names if is_own is None or not is_own(name)}
    if foreign:
        raise error(not_empty(out, foreign))
    refuse_checkpoint(out, error)
    return names


def not_empty(out: Path, names: Iterable[str]) -> str:
    """Message that refuses a folder because of the names in it."""
    return f"--out {out} is not empty, it holds {listed(names)}: name a new or empty folder"
