"""Rules for image files that annotations name: which of several paths is meant, and whether the folder is right."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from eve_ds.data.errors import SourceError
from eve_ds.printable import excerpt

PROBED_IMAGES = 20
"""Number of images to probe of a list of known length."""
PROBES_BEFORE_DOUBLING = 1000
"""Number of images to probe before the distance between them doubles, where the length of the list is not known."""
Item = TypeVar("Item")


def is_file(path: Path) -> bool:
    """Whether a path is a file; not, and no OSError, where no file can have its name, as that of 1,000 letters."""
    try:
        return path.is_file()
    except OSError:
        return False


def image_path(folder: Path, name: str) -> Path:
    """Path of an image below the folder.

    Raises:
        SourceError: an absolute name, or one with `..`, leads out of the folder. Symbolic links may.
    """
    path = folder / name
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise SourceError(
            f"image {excerpt(name)} lies outside the image folder {folder}: name a folder that holds all images with "
            "--images"
        )
    return path


def first_existing(folder: Path, names: Sequence[str]) -> Path:
    """The first of several paths below the folder that is a file; without any the last, whose reader reports it.

    Raises:
        SourceError: see :func:`image_path`.
    """
    paths = [image_path(folder, name) for name in names]
    return next((path for path in paths if is_file(path)), paths[-1])


def probe_step(total: int) -> int:
    """Distance between the probed ones of `total` entries."""
    return max(1, total // PROBED_IMAGES)


def spread(items: Iterable[Item]) -> Iterator[Item]:
    """Items from all parts of a list of unknown length: the first PROBES_BEFORE_DOUBLING, then every second, and so on.

    Of a million items these are 10,000, which take a twentieth of a second to look up on a local disk.
    """
    step, left, taken = 1, 0, 0
    for item in items:
        if left == 0:
            yield item
            taken += 1
            step *= 2 if taken % PROBES_BEFORE_DOUBLING == 0 else 1
            left = step
        left -= 1


def require_some_image(paths: Iterable[Path], where: str | Path, advice: str = "--images") -> None:
    """Refuse an image folder in which no probed image exists, before an hour is spent skipping every sample.

    Args:
        paths: probed images; none are read after the first that exists. No path at all passes.
        where: annotation file, for the message.
        advice: options that set the folder, for the message.

    Raises:
        SourceError: no path is a file.
    """
    missing: dict[Path, None] = {}
    for path in paths:
        if is_file(path):
            return
        missing[path] = None
    if missing:
        first = excerpt(str(next(iter(missing))))
        raise SourceError(
            f"{where}: none of {len(missing)} probed images exists (the first: {first}): set the folder of the images "
            f"with {advice}"
        )
