"""Annotation files that list images of a folder: Karpathy JSON, caption JSON, and CSV or TSV tables.

The files are parsed by :mod:`eve_ds.data.formats`. Captions that are not UTF-8 keep their bytes as surrogates; the
shard writer finds and counts them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from eve_ds.data.errors import SourceError
from eve_ds.data.formats import karpathy, released, tables
from eve_ds.data.formats.entries import Entry, numbered, read_json
from eve_ds.data.formats.images import PROBED_IMAGES, probe_step, require_some_image
from eve_ds.data.formats.tables import MALFORMED, NO_CAPTION
from eve_ds.data.importers.candidate import Candidate, FileSlice, Skip, Source, existing_file, existing_folder
from eve_ds.data.importers.image_folder import ImageFolder


class Karpathy:
    """COCO or Flickr30K captions with Karpathy's splits; an image id is the file name without its suffix."""

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        splits: Sequence[str] = karpathy.TRAIN_SPLITS,
        strip_prefix: str | None = None,
        follow_links: bool = False,
    ) -> None:
        """Read the annotations; raises :class:`SourceError` for a file of another form or a split it does not have."""
        (annotations,), self._images = _locate([path], images, strip_prefix, follow_links)
        entries = karpathy.read_entries(annotations, "keep")
        self._entries = karpathy.of_splits(entries, splits, annotations)
        self.total: int | None = len(self._entries)
        self.description: dict[str, Any] = {
            **_description("karpathy", [annotations], self._images),
            "splits": sorted(splits),
        }
        _probe(self, annotations)

    def __iter__(self) -> Iterator[Candidate | Skip]:
        """Images in the order of the file."""
        for number, entry in enumerate(self._entries):
            try:
                image = karpathy.captioned_image(entry)
            except SourceError:
                yield Skip(f"entry {number}", MALFORMED)
                continue
            ids = [] if image.cocoid is None else [image.cocoid]
            yield _candidate(self._images, image.path, image.captions, PurePosixPath(image.path).stem, ids)


class CaptionJson:
    """`[{image, caption, image_id}]`; `caption` may be a list; without `image_id` the image path is the id."""

    def __init__(
        self,
        files: Sequence[str | Path],
        images: str | Path | None = None,
        strip_prefix: str | None = None,
        follow_links: bool = False,
    ) -> None:
        """Read the annotations; raises :class:`SourceError` for a file of another form."""
        annotations, self._images = _locate(files, images, strip_prefix, follow_links)
        self._entries: list[Entry] = []
        for path in annotations:
            tree = read_json(path, "keep")
            released.require_captions(tree, path)
            self._entries += numbered(tree, path)
        self.total: int | None = len(self._entries)
        self.description: dict[str, Any] = _description("json", annotations, self._images)
        _probe(self, annotations[0])

    def __iter__(self) -> Iterator[Candidate | Skip]:
        """Entries in the order of the files."""
        for number, entry in enumerate(self._entries):
            try:
                image = released.captioned_image(entry)
            except SourceError:
                yield Skip(f"entry {number}", MALFORMED)
                continue
            yield _candidate(self._images, image.image, image.captions, image.image_id)


class Table:
    """A CSV or TSV file with a header row; rows of one image need not be adjacent."""

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        id_column: str | None = None,
        delimiter: str | None = None,
        strip_prefix: str | None = None,
        follow_links: bool = False,
    ) -> None:
        """Check the header; raises :class:`SourceError` where a column is missing.

        `delimiter` defaults to a tab for `.tsv` and a comma otherwise; without `id_column` the image path is the id.
        """
        (annotations,), self._images = _locate([path], images, strip_prefix, follow_links)
        columns = tables.Columns(image_column, caption_column, id_column)
        self._table = tables.Table(annotations, columns, delimiter)
        self.total: int | None = None
        self.description: dict[str, Any] = {
            **_description("table", [annotations], self._images),
            "columns": list(columns),
            "delimiter": self._table.delimiter,
        }
        _probe(self, annotations)

    def __iter__(self) -> Iterator[Candidate | Skip]:
        """Rows in the order of the file."""
        for row in self._table:
            if row.problem is not None:
                yield Skip(f"row {row.number}", row.problem)
            else:
                yield _candidate(self._images, row.image, (row.caption,), row.image_id)


def _locate(
    paths: Sequence[str | Path], images: str | Path | None, strip_prefix: str | None, follow_links: bool
) -> tuple[list[Path], ImageFolder]:
    """Absolute paths of the annotation files, and the image folder, by default that of the first file."""
    annotations = [existing_file(path, "annotation file") for path in paths]
    root = annotations[0].parent if images is None else existing_folder(images, "image folder")
    return annotations, ImageFolder(root, strip_prefix, follow_links)


def _description(name: str, annotations: Sequence[Path], images: ImageFolder) -> dict[str, Any]:
    """Format, annotation files with their SHA-256, and image folder; rules of paths only where they are not default."""
    files = [{"path": str(path), "sha256": _sha256(path)} for path in annotations]
    rules = {"strip_prefix": images.strip_prefix, "follow_links": images.follow_links}
    used = {key: value for key, value in rules.items() if value}
    return {"format": name, "annotations": files, "images": str(images.root), **used}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _candidate(
    images: ImageFolder, image: str, captions: tuple[str, ...], image_id: str | None, aliases: Sequence[str] = ()
) -> Candidate | Skip:
    """Candidate of an annotated path; without an id the path below the image folder is the id."""
    if not captions:
        return Skip(image, NO_CAPTION)
    name = images.name(image)
    path = PurePosixPath(name)
    return Candidate(
        name=name,
        image=images.image(name),
        captions=captions,
        image_id=name if image_id is None else image_id,
        aliases=(*aliases, image, *([name] if name != image else []), path.name, path.stem),
    )


def _probe(source: Source, annotations: Path) -> None:
    """Raise :class:`SourceError` where none of a few images spread over the source exists."""
    step = probe_step(source.total or 1)
    spread = (item for number, item in enumerate(source) if number % step == 0 and isinstance(item, Candidate))
    paths = (Path(item.image.path) for item in islice(spread, PROBED_IMAGES) if isinstance(item.image, FileSlice))
    require_some_image(paths, annotations, "--images, or remove the start of their paths with --strip_prefix")
