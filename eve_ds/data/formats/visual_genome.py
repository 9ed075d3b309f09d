"""Visual Genome region descriptions (https://homes.cs.washington.edu/~ranjay/visualgenome): `region_descriptions.json`.

`[{"id", "regions": [{image_id, phrase, x, y, width, height}]}]`, an entry for each image, in pixels of the image.
`image_data.json` beside it, `[{image_id, url, coco_id, flickr_id}]`, says which images are those of other data sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from eve_ds.data.caption_text import clean_caption
from eve_ds.data.errors import SourceError
from eve_ds.data.formats.captioned import Box, ImageCaptions, box, by_box
from eve_ds.data.formats.entries import Entry, described, is_null, shortened, stream_entries
from eve_ds.data.formats.image_ids import in_data_set
from eve_ds.data.formats.json_stream import read_outline
from eve_ds.data.formats.unread import refuse_document

FOLDERS = ("VG_100K", "VG_100K_2")
"""Folders of the images as published."""
IMAGE_DATA = "image_data.json"


def require_regions(path: Path) -> int:
    """Number of images; raises :class:`SourceError` for a file that is not JSON, or not region descriptions."""
    outline = read_outline(path, keep_undecodable=True)
    tree = outline.tree
    if isinstance(tree, list) and tree and isinstance(tree[0], dict) and isinstance(tree[0].get("regions"), list):
        return outline.counts[None]
    refuse_document(path, tree, "visual_genome")
    raise SourceError(
        f'{path} is not region_descriptions.json: expected [{{"id", "regions": [{{"phrase", "x", "y", "width", '
        f'"height"}}]}}], found {described(tree)}'
    )


def read_aliases(path: Path) -> dict[str, tuple[str, ...]]:
    """Names in COCO and Flickr30K of images by their id; raises :class:`SourceError` for a file of another form."""
    tree = read_outline(path, keep_undecodable=True).tree
    if not (
        isinstance(tree, list) and tree and isinstance(tree[0], dict) and {"coco_id", "flickr_id"} & tree[0].keys()
    ):
        raise SourceError(
            f'{path} has no numbers of images in COCO and Flickr: expected [{{"image_id", "coco_id", "flickr_id"}}], '
            f"found {described(tree)}"
        )
    aliases = {}
    for entry in stream_entries(path):
        numbers = {"COCO": entry.identity("coco_id"), "Flickr": entry.identity("flickr_id")}
        names = tuple(name for key, number in numbers.items() for name in in_data_set(key, number))
        if names:
            aliases[entry.identity("image_id") or entry.text("id")] = names
    return aliases


def read_regions(path: Path, aliases: dict[str, tuple[str, ...]], boxes: bool) -> Iterator[ImageCaptions | Entry]:
    """Captions of each image, or of each box in it if `boxes`; entries and regions themselves that are malformed."""
    for entry in stream_entries(path):
        regions: list[tuple[Box | None, str]] = []
        try:
            for region in _listed(entry):
                try:
                    regions.append((_box(region) if boxes else None, _phrase(region)))
                except SourceError as error:
                    yield region.malformed(error)
            number = entry.identity("id") or _listed(entry)[0].text("image_id")
        except (SourceError, IndexError):
            yield entry
            continue
        for box_, phrases in by_box(regions):
            yield ImageCaptions(
                f"{FOLDERS[0]}/{number}.jpg",
                phrases,
                aliases=aliases.get(number, ()),
                other_places=(f"{FOLDERS[1]}/{number}.jpg", f"{number}.jpg"),
                box=box_,
            )


def _listed(entry: Entry) -> list[Entry]:
    regions = entry.get("regions")
    if not isinstance(regions, list):
        raise entry.error(f"regions ({shortened(regions)}) must be a list")
    return [Entry(region, f"{entry.where} region {number}") for number, region in enumerate(regions)]


def _box(region: Entry) -> Box:
    return box(region, [region.get(key) for key in ("x", "y", "width", "height")])


def _phrase(region: Entry) -> str:
    phrase = region.get("phrase")
    if not isinstance(phrase, str) and not is_null(phrase):
        raise region.error(f"phrase ({shortened(phrase)}) must be a string")
    return "" if is_null(phrase) else clean_caption(phrase)
