"""The record that readers of image-caption formats have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from eve_ds.data.formats.entries import Entry, shortened


class Box(NamedTuple):
    """Rectangle of an image, in pixels from the top left corner."""

    x: float
    y: float
    width: float
    height: float


class ImageCaptions(NamedTuple):
    """Captions of one image, or of one box in it."""

    image: str
    """Path below the image folder, or address."""
    captions: tuple[str, ...]
    """Captions; the tuple and each caption may be empty."""
    image_id: str | None = None
    """Id of the image; None: its path is the id."""
    aliases: tuple[str, ...] = ()
    """Further names of the image, as :func:`eve_ds.data.formats.image_ids.image_names` takes them."""
    other_places: tuple[str, ...] = ()
    """Further paths below the image folder where the file may lie."""
    box: Box | None = None
    """None: the captions describe the whole image."""
    data: bytes | None = None
    """Encoded image, where the annotations hold it themselves."""


def box(entry: Entry, numbers: object) -> Box:
    """Box of `[x, y, width, height]`; raises :class:`SourceError` for anything else."""
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(map(_is_number, numbers)):
        raise entry.error(f"box ({shortened(numbers)}) must be the four numbers x, y, width and height")
    return Box(*map(float, numbers))


def by_box(phrases: Iterable[tuple[Box | None, str]]) -> Iterator[tuple[Box | None, tuple[str, ...]]]:
    """Phrases of each box in the order of the first; a phrase that a box has twice stands once."""
    groups: dict[Box | None, dict[str, None]] = {}
    for place, phrase in phrases:
        groups.setdefault(place, {})[phrase] = None
    return ((place, tuple(texts)) for place, texts in groups.items())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9  # no NaN either
