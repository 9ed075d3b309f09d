"""Group the captions of one image, which several rows or annotations of a source give, so that it is stored once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from itertools import groupby

from eve_ds import limits
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.importers.candidate import Skip


def group_all(records: Iterable[ImageCaptions | Skip]) -> list[ImageCaptions | Skip]:
    """Records of one image joined at the place of the first, wherever they stand; all of them are in memory."""
    groups: dict[Hashable, list[ImageCaptions | Skip]] = {}
    for number, record in enumerate(records):
        # A record without captions is counted by itself.
        groups.setdefault(_image(record) or number, []).append(record)
    return [record for group in groups.values() for record in _joined(group)]


def group_adjacent(records: Iterable[ImageCaptions | Skip]) -> Iterator[ImageCaptions | Skip]:
    """Records of one image joined where they follow one another."""
    for image, group in groupby(records, key=_image):
        if image is None:
            yield from group
        else:
            yield from _joined(group)


def _image(record: ImageCaptions | Skip) -> Hashable | None:
    """What the records of one image, or of one box in it, have in common; None for a record without captions."""
    if isinstance(record, Skip) or not record.captions:
        return None
    return record.image, record.image_id, record.box


def _joined(records: Iterable[ImageCaptions | Skip]) -> Iterator[ImageCaptions | Skip]:
    """Join records of one image, and divide what has more than `limits.GROUP_CAPTIONS` captions."""
    found = list(records)
    if len(found) == 1 and isinstance(found[0], Skip):
        yield found[0]
        return
    images = [record for record in found if isinstance(record, ImageCaptions)]
    captions = tuple(caption for record in images for caption in record.captions)
    for start in range(0, max(len(captions), 1), limits.GROUP_CAPTIONS):
        yield images[0]._replace(captions=captions[start : start + limits.GROUP_CAPTIONS])
