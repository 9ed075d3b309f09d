"""Output folders: in no checkpoint; new, empty, or holding an earlier result only; whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import flush_folder, listed


def enclosing_checkpoint(folder: Path) -> Path | None:
    """Checkpoint that a folder is or lies in, links followed; with further files it would count as damaged."""
    inside = Path(os.path.realpath(folder))
    names = (manifest.MANIFEST, manifest.STATE)
    return next(
        (place for place in (inside, *inside.parents) if all((place / name).is_file() for name in names)),
        None,
    )


def refuse_checkpoint(out: Path, error: type[ValueError], option: str = "--out") -> None:
    """Raise an error of the given class if the folder or file `out`, which an option names, lies in a checkpoint."""
    checkpoint = enclosing_checkpoint(out)
    if checkpoint is not None:
        raise error(f"{option} {out} lies in the checkpoint {checkpoint}, which it would damage: name another folder")


def check_output_folder(out: Path, error: type[ValueError], is_own: Callable[[str], object] | None = None) -> set[str]:
    """Refuse an output folder that holds other files than those of an earlier result.

    Args:
        out: the folder, which need not exist.
        error: class of the error to raise.
        is_own: whether a name in the folder is part of an earlier result; None: the folder must be empty.

    Returns:
        Names in the folder; empty if it does not exist.

    Raises:
        error: `out` is a file, a mounted disk or the working directory, lies in a checkpoint, or holds a name that is
            not the caller's.
    """
    if out.exists() and not out.is_dir():
        raise error(f"--out {out} is a file: name a new or empty folder")
    for what, is_so in (("a mounted disk", os.path.ismount(out.resolve())), ("the working directory", _is_here(out))):
        if is_so:
            raise error(f"--out {out} is {what}, whose folder cannot be replaced: name a folder in it")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = {name for name in names if is_own is None or not is_own(name)}
    if foreign:
        raise error(not_empty(out, foreign))
    refuse_checkpoint(out, error)
    return names


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield a hidden folder that replaces `out` at the end, or is deleted after an error or a signal.

    The folder is on the disk of the result: beside `out`, or beside the folder that `out` links to. An earlier result
    is removed last; one that a killed call has moved aside comes back.
    """
    out = Path(os.path.realpath(out))
    hidden, earlier = (out.with_name(f".{out.name}.{what}") for what in ("writing", "earlier"))
    shutil.rmtree(hidden, ignore_errors=True)  # left by a killed call
    _settle(earlier, out)
    hidden.mkdir(parents=True)
    try:
        yield hidden
        if out.exists():
            os.rename(out, earlier)
        os.rename(hidden, out)
        flush_folder(out.parent)
    finally:
        _settle(earlier, out)
        shutil.rmtree(hidden, ignore_errors=True)


def _settle(earlier: Path, out: Path) -> None:
    """Move an earlier result back if nothing took its place, or else remove it."""
    if earlier.exists() and not out.exists():
        os.rename(earlier, out)
    shutil.rmtree(earlier, ignore_errors=True)


def _is_here(out: Path) -> bool:
    return out.is_dir() and out.samefile(Path.cwd())


def not_empty(out: Path, names: Iterable[str]) -> str:
    """Message that refuses a folder because of the names in it."""
    return f"--out {out} is not empty, it holds {listed(names)}: name a new or empty folder"
