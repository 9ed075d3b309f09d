"""COCO captions: `captions_train2014.json`, `captions_val2017.json` and others of that form (https://cocodataset.org).

`{"images": [{id, file_name, coco_url, flickr_url}], "annotations": [{image_id, caption}]}`; the lists may stand in any
order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from eve_ds.data.errors import SourceError
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.entries import Entry, described, stream_entries
from eve_ds.data.formats.json_stream import read_outline
from eve_ds.data.formats.unread import refuse_document

ADDRESSES = ("coco_url", "flickr_url")
_SUBSET = re.compile(r"(train|val|test)20[0-9]{2}")
_FILE = re.compile(
    r"(?:.*/)?COCO_(?:train|val)2014_(?P<first>[0-9]{12}\.jpg)"
    r"|(?:(?:.*/)?(?:train|val)2017/)?(?P<second>[0-9]{12}\.jpg)"
)
_NAMES = ("COCO_train2014_{}", "COCO_val2014_{}", "{}", "{}")
_FOLDERS = ("train2014", "val2014", "train2017", "val2017")


class Image(NamedTuple):
    """File of an image, and its addresses at COCO and Flickr.

    Names of files and addresses hold the number in COCO; `id` need not, as others write their images in this form.
    """

    file_name: str
    addresses: tuple[str, ...]


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
            addresses = tuple(address for key in ADDRESSES if isinstance(address := entry.get(key), str) and address)
            images[number] = Image(entry.file_name("file_name"), addresses)
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


def published_places(path: str) -> tuple[str, ...]:
    """Paths at which folders of 2014 and 2017 hold an image, each with its subfolder and without; none for others.

    Both years have the same images by the same numbers, in other subsets.
    """
    found = _FILE.fullmatch(path.replace("\\", "/"))
    if found is None:
        return ()
    names = [name.format(found["first"] or found["second"]) for name in _NAMES]
    nested = (f"{folder}/{name}" for folder, name in zip(_FOLDERS, names, strict=True))
    return (*nested, *dict.fromkeys(names))


def _captioned(entry: Entry, path: Path, images: dict[str, Image]) -> ImageCaptions:
    number = entry.text("image_id")
    image = images.get(number)
    if image is None:
        raise entry.error(f"image_id ({number}) is not in the list of images")
    return ImageCaptions(
        image.file_name,
        entry.captions("caption"),
        PurePosixPath(image.file_name).stem,  # the id in Karpathy's files
        image.addresses,
        _folders(image.file_name, path),
    )


def _folders(name: str, path: Path) -> tuple[str, ...]:
    """Paths in the folder of a subset, such as `train2014/`, which the name of the image or of the JSON gives."""
    subset = _SUBSET.search(name) or _SUBSET.search(path.name)
    return () if subset is None or "/" in name else (f"{subset[0]}/{name}",)
