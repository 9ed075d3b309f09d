"""Group the captions of one image, which several rows or annotations of a source give, so that it is stored once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from itertools import groupby

from eve_ds import limits
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.importers.candidate import Skip

Spelling = Callable[[str], str]
"""The one spelling of a path, in which paths are compared."""


def group_all(records: Iterable[ImageCaptions | Skip], spelling: Spelling = str) -> list[ImageCaptions | Skip]:
    """Records of one image joined at the place of the first, wherever they stand; all of them are in memory."""
    groups: dict[Hashable, tuple[ImageCaptions | Skip, list[str]]] = {}
    for number, record in enumerate(records):
        image = _image(record, spelling)
        if isinstance(record, Skip) or image is None:
            groups[number] = record, []
        else:
            groups.setdefault(image, (record._replace(captions=()), []))[1].extend(record.captions)
    return [part for record, captions in groups.values() for part in _divided(record, captions)]


def group_adjacent(records: Iterable[ImageCaptions | Skip], spelling: Spelling = str) -> Iterator[ImageCaptions | Skip]:
    """Records of one image joined where they follow one another."""
    for image, group in groupby(records, key=partial(_image, spelling=spelling)):
        if image is None:
            yield from group
        else:
            yield from group_all(group, spelling)


def _image(record: ImageCaptions | Skip, spelling: Spelling) -> Hashable | None:
    """What the records of one image, or of one box in it, have in common; None for a record without captions."""
    if isinstance(record, Skip) or not record.captions:
        return None
    # Tables with images call all of them image.png, or have no names.
    return record.data or spelling(record.image), record.image_id, record.box


def _divided(record: ImageCaptions | Skip, captions: list[str]) -> Iterator[ImageCaptions | Skip]:
    """The record with captions, at most `limits.GROUP_CAPTIONS` each time."""
    if isinstance(record, Skip) or not captions:
        yield record
        return
    for start in range(0, len(captions), limits.GROUP_CAPTIONS):
        yield record._replace(captions=tuple(captions[start : start + limits.GROUP_CAPTIONS]))
