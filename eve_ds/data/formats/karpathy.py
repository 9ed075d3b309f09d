"""COCO and Flickr30K captions with Karpathy's splits: `dataset_coco.json`, `dataset_flickr30k.json`.

`{"images": [{filename, filepath, split, cocoid, sentences: [{raw}]}]}`; `filepath` and `cocoid` only for COCO.
https://cs.stanford.edu/people/karpathy/deepimagesent
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from eve_ds.data.caption_text import clean_caption
from eve_ds.data.errors import SourceError
from eve_ds.data.formats.entries import Entry, Undecodable, described, is_null, numbered, read_json, shortened
from eve_ds.data.formats.unread import refuse_document

TRAIN_SPLITS = ("train", "restval")
"""Splits that are trained on together."""


class CaptionedImage(NamedTuple):
    """One image with its captions."""

    entry: Entry
    path: str
    """Path below the image folder."""
    captions: tuple[str, ...]
    """Captions; the tuple and each caption may be empty."""
    cocoid: str | None
    """Number of the image in COCO."""


def other_places(image: CaptionedImage) -> tuple[str, ...]:
    """Further paths of an image: without its folder, and the names of COCO's release of 2017."""
    name = PurePosixPath(image.path).name
    number = image.cocoid or ""
    renamed = f"{number.zfill(12)}.jpg"
    of_2017 = (f"train2017/{renamed}", f"val2017/{renamed}", renamed) if number.isdecimal() else ()
    return tuple(place for place in (name, *of_2017) if place != image.path)


def read_entries(path: Path, undecodable: Undecodable = "refuse") -> list[Entry]:
    """Entries of all splits in the order of the file; raises :class:`SourceError` for a file of another form."""
    tree = read_json(path, undecodable)
    require_karpathy(tree, path)
    return numbered(tree["images"], path)


def require_karpathy(tree: Any, path: Path) -> None:
    """Raise :class:`SourceError` for a document of another form; the first entry of each list is enough."""
    refuse_document(path, tree, "karpathy")
    if not (isinstance(tree, dict) and isinstance(tree.get("images"), list)):
        raise SourceError(
            f'{path} is not a Karpathy JSON: expected {{"images": [{{"filename", "split", "sentences": '
            f'[{{"raw"}}]}}]}}, found {described(tree)}'
        )


def of_splits(entries: Sequence[Entry], splits: Sequence[str], path: Path) -> list[Entry]:
    """Entries of the splits, and those that are no objects, which the reader of records judges.

    Raises:
        SourceError: no entry is of one of the splits; names the splits of the file.
    """
    require_splits(entries, splits, path)
    return [entry for entry in entries if in_splits(entry, splits)]


def require_splits(entries: Iterable[Entry], splits: Sequence[str], path: Path) -> int:
    """Number of entries of the splits; raises :class:`SourceError` for none, with the splits of the file."""
    names = (entry.content.get("split") for entry in entries if isinstance(entry.content, dict))
    found = Counter(name if name is None else str(name) for name in names)
    if not any(split in found for split in splits):
        have = ", ".join(f"{name} ({count})" for name, count in sorted(found.items(), key=str))
        raise SourceError(f"{path} has no image of split {' or '.join(splits)}; it has: {have or 'no images'}")
    return sum(found[split] for split in splits)


def in_splits(entry: Entry, splits: Sequence[str]) -> bool:
    """Whether an entry is of one of the splits, or no object."""
    return not isinstance(entry.content, dict) or entry.content.get("split") in splits


def captioned_image(entry: Entry) -> CaptionedImage:
    """Record of an entry; raises :class:`SourceError` for a field that is missing or malformed."""
    folder = entry.get("filepath") or ""
    if not isinstance(folder, str):
        raise entry.error(f"filepath ({folder!r}) must be a string")
    name = entry.file_name("filename")
    path = str(PurePosixPath(folder) / name) if folder else name
    sentences = entry.get("sentences")
    sentences = [] if sentences is None and entry.has("sentences") else sentences
    if not isinstance(sentences, list) or not all(isinstance(item, dict) for item in sentences):
        raise entry.error(
            f"image {path} has no sentences but {shortened(sentences)}: give a list of objects with `raw`"
        )
    raw = ["" if "raw" in item and is_null(item["raw"]) else item.get("raw") for item in sentences]
    if not all(isinstance(caption, str) for caption in raw):
        raise entry.error(f"raw of a sentence of image {path} must be a string")
    captions = tuple(map(clean_caption, raw))
    return CaptionedImage(entry, path, captions, entry.identity("cocoid"))
