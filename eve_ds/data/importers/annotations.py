"""Annotation files that list images of a folder: Karpathy JSON, caption JSON, and CSV or TSV tables.

Karpathy: https://cs.stanford.edu/people/karpathy/deepimagesent (`dataset_coco.json`, `dataset_flickr30k.json`).
Caption JSON: `[{image, caption, image_id}]`, the pre-training and retrieval files of ALBEF, X-VLM and EVE.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from eve_ds.data.importers.candidate import (
    Candidate,
    FileSlice,
    Skip,
    SourceError,
    existing_file,
    existing_folder,
)

PROBED_IMAGES = 20
"""Images spread over an annotation file of which at least one must exist, or the image folder is taken to be wrong."""


class Karpathy:
    """COCO or Flickr30K captions with Karpathy's splits; an image id is the file name without its suffix."""

    def __init__(
        self, path: str | Path, images: str | Path | None = None, splits: Sequence[str] = ("train", "restval")
    ) -> None:
        """Read the annotations; raises :class:`SourceError` for a file of another form or a split it does not have."""
        annotations, root = _locate([path], images)
        tree, digest = _read_json(annotations[0])
        if not (isinstance(tree, dict) and isinstance(tree.get("images"), list)):
            raise SourceError(
                f'{path} is not a Karpathy JSON: expected {{"images": [{{"filename", "split", "sentences": '
                f'[{{"raw"}}]}}]}}, found {_shape(tree)}'
            )
        found = Counter(entry.get("split") for entry in tree["images"] if isinstance(entry, dict))
        if not any(split in found for split in splits):
            have = ", ".join(f"{name} ({count})" for name, count in sorted(found.items(), key=str))
            raise SourceError(f"{path} has no image of split {' or '.join(splits)}; it has: {have or 'no images'}")
        self._images = root
        self._entries = [
            entry for entry in tree["images"] if not isinstance(entry, dict) or entry.get("split") in splits
        ]
        self.total: int | None = len(self._entries)
        self.description: dict[str, Any] = {
            "format": "karpathy",
            "annotations": [{"path": str(annotations[0]), "sha256": digest}],
            "images": str(root),
            "splits": sorted(splits),
        }
        _probe(self, root)

    def __iter__(self) -> Iterator[Candidate | Skip]:
        """Images in the order of the file."""
        for number, entry in enumerate(self._entries):
            try:
                path = str(PurePosixPath(entry.get("filepath", "")) / entry["filename"])
                captions = tuple(sentence["raw"] for sentence in entry["sentences"])
            except (AttributeError, KeyError, TypeError):
                yield Skip(f"entry {number}", "malformed entry")
                continue
            ids = [str(entry[key]) for key in ("cocoid",) if key in entry]
            yield _candidate(self._images, path, captions, PurePosixPath(path).stem, ids)


class CaptionJson:
    """`[{image, caption, image_id}]`; `caption` may be a list; without `image_id` the image path is the id."""

    def __init__(self, paths: Sequence[str | Path], images: str | Path | None = None) -> None:
        """Read the annotations; raises :class:`SourceError` for a file of another form."""
        annotations, root = _locate(paths, images)
        self._images = root
        self._entries: list[Any] = []
        described = []
        for path in annotations:
            entries, digest = _read_json(path)
            _check_caption_json(path, entries)
            self._entries += entries
            described.append({"path": str(path), "sha256": digest})
        self.total: int | None = len(self._entries)
        self.description: dict[str, Any] = {"format": "json", "annotations": described, "images": str(root)}
        _probe(self, root)

    def __iter__(self) -> Iterator[Candidate | Skip]:
        """Entries in the order of the files."""
        for number, entry in enumerate(self._entries):
            if not _is_caption_entry(entry):
                yield Skip(f"entry {number}", "malformed entry")
                continue
            caption = entry["caption"]
            captions = tuple(caption) if isinstance(caption, list) else (caption,)
            image_id = entry.get("image_id")
            yield _candidate(
                self._images, entry["image"], captions, entry["image"] if image_id is None else str(image_id)
            )


class Table:
    """A CSV or TSV file with a header row; rows of one image need not stand together."""

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        id_column: str | None = None,
        delimiter: str | None = None,
    ) -> None:
        """Check the header; raises :class:`SourceError` where a column is missing.

        `delimiter` defaults to a tab for `.tsv` and a comma otherwise; without `id_column` the image path is the id.
        """
        annotations, root = _locate([path], images)
        self._path, self._images = annotations[0], root
        self._columns = (image_column, caption_column, id_column)
        self._delimiter = delimiter or ("\t" if self._path.suffix.lower() == ".tsv" else ",")
        header = self._read_header(path)
        for column in self._columns:
            if column is not None and column not in header:
                raise SourceError(f"{path} has no column '{column}'; it has: {', '.join(header)}")
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.total: int | None = None
        self.description: dict[str, Any] = {
            "format": "table",
            "annotations": [{"path": str(self._path), "sha256": digest}],
            "images": str(root),
            "columns": list(self._columns),
            "delimiter": self._delimiter,
        }
        _probe(self, root)

    def _open(self) -> io.TextIOWrapper:
        # A caption that is not UTF-8 keeps its bytes as surrogates; the writer finds and counts it.
        return self._path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")

    def _read_header(self, path: str | Path) -> list[str]:
        with self._open() as file:
            try:
                return next(csv.reader(file, delimiter=self._delimiter))
            except StopIteration:
                raise SourceError(f"{path} is empty; expected a header row with the columns {self._named()}") from None
            except csv.Error as error:
                raise SourceError(f"{path} is not a table: {error}") from None

    def _named(self) -> str:
        return ", ".join(column for column in self._columns if column is not None)

    def __iter__(self) -> Iterator[Candidate | Skip]:
        """Rows in the order of the file."""
        image_column, caption_column, id_column = self._columns
        with self._open() as file:
            rows = csv.DictReader(file, delimiter=self._delimiter)
            try:
                for number, row in enumerate(rows, start=1):
                    image, caption = row[image_column], row[caption_column]
                    if not image or caption is None:
                        yield Skip(f"row {number}", "malformed entry")
                        continue
                    image_id = row[id_column] if id_column else None
                    yield _candidate(self._images, image, (caption,), image_id or image)
            except csv.Error as error:
                raise SourceError(f"{self._path} line {rows.line_num}: {error}") from None


def _locate(paths: Sequence[str | Path], images: str | Path | None) -> tuple[list[Path], Path]:
    annotations = [existing_file(path, "annotation file") for path in paths]
    root = annotations[0].parent if images is None else existing_folder(images, "image folder")
    return annotations, root


def _read_json(path: Path) -> tuple[Any, str]:
    data = path.read_bytes()
    try:
        # Captions that are not UTF-8 keep their bytes as surrogates; the writer finds and counts them.
        tree = json.loads(data.decode("utf-8-sig", errors="surrogateescape"))
    except json.JSONDecodeError as error:
        raise SourceError(f"{path} is not JSON: {error}") from None
    return tree, hashlib.sha256(data).hexdigest()


def _is_caption_entry(entry: Any) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("image"), str) and entry["image"]):
        return False
    caption = entry.get("caption")
    return isinstance(caption, str) or (isinstance(caption, list) and all(isinstance(text, str) for text in caption))


def _check_caption_json(path: Path, entries: Any) -> None:
    if isinstance(entries, list) and entries and _is_caption_entry(entries[0]):
        return
    found = f"a list of {_shape(entries[0])}" if isinstance(entries, list) and entries else _shape(entries)
    raise SourceError(
        f'{path} is not a caption JSON: expected [{{"image": path, "caption": text or list, "image_id": id}}], '
        f"found {found}"
    )


def _shape(tree: Any) -> str:
    if isinstance(tree, dict):
        return "an object with the keys " + (", ".join(list(tree)[:8]) or "(none)")
    if isinstance(tree, list):
        return f"a list of {len(tree)}"
    return f"a {type(tree).__name__}"


def _candidate(
    root: Path, image: str, captions: tuple[str, ...], image_id: str, aliases: Sequence[str] = ()
) -> Candidate | Skip:
    if not captions:
        return Skip(image, "no caption")
    path = PurePosixPath(image)
    return Candidate(
        name=image,
        image=FileSlice(str(root / image)),
        captions=captions,
        image_id=image_id,
        aliases=(*aliases, image, path.name, path.stem),
    )


def _probe(source: Karpathy | CaptionJson | Table, root: Path) -> None:
    """Refuse an image folder under which nothing is found, before an hour has gone into skipping every sample."""
    step = max(1, (source.total or 1) // PROBED_IMAGES)
    first, probed = None, 0
    for number, item in enumerate(source):
        if number % step or not isinstance(item, Candidate):
            continue
        if isinstance(item.image, FileSlice) and Path(item.image.path).is_file():
            return
        first, probed = first or item.name, probed + 1
        if probed == PROBED_IMAGES:
            break
    if first is not None:
        raise SourceError(f"none of {probed} probed images lies under the image folder {root} (the first: {first})")
