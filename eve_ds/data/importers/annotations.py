"""Annotation files that list images of a folder: JSON of Karpathy, COCO, Visual Genome and others, and tables.

The files are parsed by :mod:`eve_ds.data.formats`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from eve_ds import limits
from eve_ds.data.errors import SourceError
from eve_ds.data.formats import coco, karpathy, released, tables, visual_genome
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.entries import Entry, stream_entries
from eve_ds.data.formats.image_ids import in_data_set
from eve_ds.data.formats.json_stream import read_outline
from eve_ds.data.formats.parquet import EMBEDDED_COLUMNS, ParquetTable, is_parquet
from eve_ds.data.formats.tables import DEFAULT_COLUMNS, Columns
from eve_ds.data.formats.where import EVERY_ROW, Where
from eve_ds.data.importers.annotated_images import BESIDE, AnnotatedImages, ImagePaths, counted, sha256_of
from eve_ds.data.importers.candidate import Skip, existing_file


class Karpathy(AnnotatedImages):
    """COCO or Flickr30K captions with Karpathy's splits; an image id is the file name without its suffix."""

    def __init__(self, path: str | Path, paths: ImagePaths = BESIDE, splits: Sequence[str] | None = None) -> None:
        """Read the annotations; raises :class:`SourceError` for a file of another form or a split it does not have.

        Args:
            path: the file.
            paths: rules of paths.
            splits: splits to read, each of which the file must have; None: those of `train` and `restval` that it has.
        """
        self._splits = karpathy.TRAIN_SPLITS if splits is None else splits
        super().__init__("karpathy", [path], paths, {"splits": sorted(self._splits)}, has_groups=True)
        (file,) = self.files
        karpathy.require_karpathy(read_outline(file, keep_undecodable=True).tree, file)
        self.total = karpathy.require_splits(stream_entries(file, "images"), splits, file)
        self.require_some_image()

    def records(self) -> Iterator[ImageCaptions | Skip]:
        """Images in the order of the file."""
        entries = (e for e in stream_entries(self.files[0], "images") if karpathy.in_splits(e, self._splits))
        return counted(map(_karpathy_record, entries))


def _karpathy_record(entry: Entry) -> ImageCaptions | Entry:
    try:
        image = karpathy.captioned_image(entry)
    except SourceError as error:
        return entry.malformed(error)
    stem = PurePosixPath(image.path).stem
    return ImageCaptions(image.path, image.captions, stem, in_data_set("COCO", image.cocoid))


class CaptionJson(AnnotatedImages):
    """`[{image, caption, image_id}]`; `caption` may be a list; without `image_id` the image path is the id.

    Args:
        files: annotation files.
        paths: rules of paths.
        boxes: whether captions of `elems` are of their boxes, which are cut out, instead of the whole image.
        where: which entries to take.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        paths: ImagePaths = BESIDE,
        boxes: bool = False,
        where: Where = EVERY_ROW,
    ) -> None:
        """Read the annotations; raises :class:`SourceError` for a file of another form."""
        options = where.description() | ({"boxes": True} if boxes else {})
        super().__init__("json", files, paths, options, has_local_ids=True)
        self._boxes, self._where = boxes, where
        for path in self.files:
            tree = read_outline(path, keep_undecodable=True).tree
            released.require_captions(tree, stream_entries(path), path)
        contents = (entry.content for entry in self._entries())
        where.require_values((content for content in contents if isinstance(content, dict)), self.files[0])
        self.require_some_image()

    def records(self) -> Iterator[ImageCaptions | Skip]:
        """Entries in the order of the files."""
        return counted(released.read_captions(self._where.taken(self._entries()), self._boxes))

    def _entries(self) -> Iterator[Entry]:
        return chain.from_iterable(map(stream_entries, self.files))


class Coco(AnnotatedImages):
    """COCO captions of one or more years; an image id is the file name without its suffix, as in Karpathy's."""

    def __init__(self, files: Sequence[str | Path], paths: ImagePaths = BESIDE) -> None:
        """Read the annotations; raises :class:`SourceError` for a file of another form."""
        super().__init__("coco", files, paths)
        for path in self.files:
            coco.require_coco(path)
        self.require_some_image()

    def records(self) -> Iterator[ImageCaptions | Skip]:
        """Annotations in the order of the files."""
        for path in self.files:
            yield from counted(coco.read_captions(path, coco.read_images(path)))


class VisualGenome(AnnotatedImages):
    """Region descriptions of Visual Genome, of the whole image or of boxes that are cut out.

    Args:
        path: region_descriptions.json.
        paths: rules of paths; the folder holds VG_100K and VG_100K_2, or all images.
        image_data: image_data.json, which says which images are COCO's or Flickr30K's; None: the file beside `path`
            if there is one.
        boxes: whether a description is of its box.
    """

    def __init__(
        self,
        path: str | Path,
        paths: ImagePaths = BESIDE,
        image_data: str | Path | None = None,
        boxes: bool = False,
    ) -> None:
        """Read the annotations; raises :class:`SourceError` for a file of another form."""
        super().__init__("visual_genome", [path], paths, {"boxes": boxes}, has_groups=True)
        self._boxes = boxes
        beside = self.files[0].with_name(visual_genome.IMAGE_DATA)
        named = existing_file(image_data, "image data") if image_data is not None else beside
        self.knows_other_names = named.is_file()
        self._aliases = visual_genome.read_aliases(named) if self.knows_other_names else {}
        self.description["image_data"] = sha256_of(named) if self.knows_other_names else None
        number = visual_genome.require_regions(self.files[0])
        self.total = None if boxes else number
        self.require_some_image()

    def records(self) -> Iterator[ImageCaptions | Skip]:
        """Images, or boxes, in the order of the file."""
        return counted(visual_genome.read_regions(self.files[0], self._aliases, self._boxes))


class Table(AnnotatedImages):
    """CSV, TSV or Parquet tables with a header row; rows of one image need not be adjacent.

    A Parquet table may hold the images themselves. Without a column of ids, the image path is the id.

    Args:
        files: tables.
        paths: rules of paths.
        columns: names of the columns.
        delimiter: None: a tab for `.tsv`, otherwise a comma.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        paths: ImagePaths = BESIDE,
        columns: Columns = DEFAULT_COLUMNS,
        delimiter: str | None = None,
    ) -> None:
        """Check the headers; raises :class:`SourceError` where a column is missing."""
        super().__init__("table", files, paths)
        self._tables = [open_table(path, columns, delimiter) for path in self.files]
        parquet = [table for table in self._tables if isinstance(table, ParquetTable)]
        self._groups_all &= sum(table.num_bytes for table in parquet) <= limits.GROUPED_BYTES
        self._groups_all &= not any(table.is_embedded for table in parquet)
        self.description |= _description(self._tables[0]) | columns.where.description()
        columns.where.require_values(chain.from_iterable(table.cells() for table in self._tables), self.files[0])
        self.require_some_image()

    def records(self) -> Iterator[ImageCaptions | Skip]:
        """Rows in the order of the files."""
        return chain.from_iterable(map(counted, self._tables))


AnyTable = tables.Table | ParquetTable


def open_table(path: Path, columns: Columns, delimiter: str | None = None) -> AnyTable:
    """Table of any kind, whose rows become records by :func:`counted`; raises :class:`SourceError`."""
    if not is_parquet(path):
        return tables.Table(path, columns, delimiter)
    embedded = columns._replace(image=EMBEDDED_COLUMNS) if columns.image == DEFAULT_COLUMNS.image else columns
    return ParquetTable(path, embedded)


def _description(table: AnyTable) -> dict[str, Any]:
    image, caption, *more = table.columns
    return {
        "columns": [image, caption, more[0] if more else None],
        "delimiter": None if isinstance(table, ParquetTable) else table.delimiter,
    }
