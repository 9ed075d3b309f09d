"""COCO captions: `captions_train2014.json`, `captions_val2017.json` and others of that form (https://cocodataset.org).

`{"images": [{id, file_name, flickr_url}], "annotations": [{image_id, caption}]}`; the lists may stand in any order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from eve_ds.data.errors import SourceError
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.entries import Entry, described, stream_entries
from eve_ds.data.formats.image_ids import coco_names, flickr_names
from eve_ds.data.formats.json_stream import read_outline
from eve_ds.data.formats.unread import refuse_document

_SUBSET = re.compile(r"(train|val|test)20[0-9]{2}")


class Image(NamedTuple):
    """File of an image, and names by which lists of ids may call it."""

    file_name: str
    names: tuple[str, ...]


def require_coco(path: Path) -> None:
    """Raise :class:`SourceError` for a file that is not JSON, or not COCO captions."""
    outline = read_outline(path, keep_undecodable=True)
    tree = outline.tree
    if isinstance(tree, dict) and outline.counts.get("images") and outline.counts.get("annotations"):
        first = tree["annotations"][0]
        if isinstance(first, dict) and "caption" not in first and "bbox" in first:
            raise SourceError(f"{path} has boxes of objects and no captions: give captions_*.json of the same download")
        return
    refuse_document(path, tree, "coco")
    raise SourceError(
        f'{path} is not a COCO JSON: expected {{"images": [{{"id", "file_name"}}], "annotations": [{{"image_id", '
        f'"caption"}}]}}, found {described(tree)}'
    )


def read_images(path: Path) -> dict[str, Image]:
    """Images by their id; those without an id or a name of a file are left out."""
    images = {}
    for entry in stream_entries(path, "images"):
        try:
            number = entry.text("id")
            names = (*coco_names(number), *flickr_names(str(entry.get("flickr_url") or "")))
            images[number] = Image(entry.file_name("file_name"), names)
        except SourceError:
            continue
    return images


def read_captions(path: Path, images: dict[str, Image]) -> Iterator[ImageCaptions | Entry]:
    """Each annotation with its image; the entry itself where it is malformed or of no known image."""
    for entry in stream_entries(path, "annotations"):
        try:
            yield _captioned(entry, path, images)
        except SourceError as error:
            yield entry.malformed(error)


def _captioned(entry: Entry, path: Path, images: dict[str, Image]) -> ImageCaptions:
    number = entry.text("image_id")
    image = images.get(number)
    if image is None:
        raise entry.error(f"image_id ({number}) is not in the list of images")
    return ImageCaptions(
        image.file_name,
        entry.captions("caption"),
        PurePosixPath(image.file_name).stem,  # the id in Karpathy's files
        image.names,
        _folders(image.file_name, path),
    )


def _folders(name: str, path: Path) -> tuple[str, ...]:
    """Paths in the folder of a subset, such as `train2014/`, which the name of the image or of the JSON gives."""
    subset = _SUBSET.search(name) or _SUBSET.search(path.name)
    return () if subset is None or "/" in name else (f"{subset[0]}/{name}",)
