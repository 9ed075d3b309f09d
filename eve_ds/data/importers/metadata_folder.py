"""Image folder of Hugging Face's `datasets`: images beside metadata.jsonl, metadata.csv or metadata.parquet.

Each folder of the tree may have a file of its own, such as `train/metadata.csv`; `file_name` is a path below that
folder. https://huggingface.co/docs/datasets/image_dataset
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

from eve_ds.data.errors import SourceError
from eve_ds.data.formats import released
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.delimited import first_fields
from eve_ds.data.formats.entries import Entry, stream_entries
from eve_ds.data.formats.json_stream import read_outline
from eve_ds.data.formats.parquet import SUFFIX, column_names
from eve_ds.data.formats.tables import Columns, default_delimiter
from eve_ds.data.formats.where import EVERY_ROW, Where
from eve_ds.data.importers.annotated_images import AnnotatedImages, ImagePaths, counted
from eve_ds.data.importers.annotations import open_table
from eve_ds.data.importers.candidate import Skip, existing_folder
from eve_ds.data.sample_names import is_leftover
from eve_ds.printable import excerpt

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME, CAPTIONS = "file_name", ("text", "caption")
_PROBED_ENTRIES = 1000
"""Entries of metadata.jsonl whose keys are its columns."""


class MetadataFolder(AnnotatedImages):
    """All images that metadata files of a folder describe; an image id is its path below the folder.

    Args:
        folder: folder of the tree.
        caption_column: column, or key, of captions; None: `text`, or `caption` without it.
        follow_links: whether symbolic links may lead out of the folder.
        image_column: column, or key, of paths; None: `file_name`, or the one column whose name ends with `_file_name`.
        where: which rows to take.
    """

    def __init__(
        self,
        folder: str | Path,
        caption_column: str | None = None,
        follow_links: bool = False,
        image_column: str | None = None,
        where: Where = EVERY_ROW,
    ) -> None:
        """Find the metadata; raises :class:`SourceError` for a folder without, or for one of another form."""
        self._root = existing_folder(folder, "image folder")
        self._captions: str | tuple[str, ...] = caption_column or CAPTIONS
        self._file_name, self._where = image_column, where
        options = {"caption_column": caption_column, "image_column": image_column}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        paths = ImagePaths(self._root, None, follow_links)
        super().__init__("imagefolder", _found(self._root), paths, given | where.description())
        self._names = {path: self._check(path) for path in self.files}
        where.require_values(chain.from_iterable(map(self._cells, self.files)), self.files[0])
        self.require_some_image()

    def records(self) -> Iterator[ImageCaptions | Skip]:
        """Rows of the files, sorted by path."""
        for path in self.files:
            below = PurePosixPath(path.parent.relative_to(self._root))
            for record in self._read(path):
                yield record if isinstance(record, Skip) else record._replace(image=str(below / record.image))

    def _read(self, path: Path) -> Iterator[ImageCaptions | Skip]:
        if path.suffix != ".jsonl":
            return counted(open_table(path, self._columns(self._names[path])))
        entries = self._where.taken(stream_entries(path))
        return counted(released.read_captions(_named(entry, self._names[path]) for entry in entries))

    def _cells(self, path: Path) -> Iterator[Mapping[str, Any]]:
        if path.suffix != ".jsonl":
            return open_table(path, self._columns(self._names[path])).cells()
        return (entry.content for entry in stream_entries(path) if isinstance(entry.content, dict))

    def _columns(self, names: Sequence[str]) -> Columns:
        return Columns(names[0], names[1], where=self._where)

    def _check(self, path: Path) -> tuple[str, ...]:
        """Names of the columns of image and caption; raises :class:`SourceError`."""
        header = _header(path)
        wanted = Columns(self._file_name or _image_column(header, path), self._captions, where=self._where)
        names = wanted.of(header, path)
        if path.suffix != ".jsonl":
            open_table(path, self._columns(names))
        else:
            tree = read_outline(path, keep_undecodable=True).tree
            released.require_captions(tree, (_named(entry, names) for entry in stream_entries(path)), path)
        return names


def _header(path: Path) -> list[str]:
    """Columns of a table, or keys of the first entries of JSON lines."""
    if path.suffix == SUFFIX:
        return column_names(path)
    if path.suffix != ".jsonl":
        return first_fields(path, default_delimiter(path)) or []
    entries = islice(stream_entries(path), _PROBED_ENTRIES)
    return list(dict.fromkeys(key for entry in entries if isinstance(entry.content, dict) for key in entry.content))


def _image_column(header: Sequence[str], path: Path) -> str:
    """Column of paths, as `datasets` finds it; raises :class:`SourceError` for several, or for lists of paths."""
    found = [name for name in header if name.endswith(f"_{FILE_NAME}")]
    if FILE_NAME in header or not found:
        lists = [name for name in header if name == f"{FILE_NAME}s" or name.endswith(f"_{FILE_NAME}s")]
        if lists and FILE_NAME not in header:
            raise SourceError(
                f"{path} has lists of images in the column '{excerpt(lists[0])}'; these are not read: write a row with "
                f"'{FILE_NAME}' for each image"
            )
        return FILE_NAME
    if len(found) > 1:
        names = excerpt(", ".join(found))
        raise SourceError(f"{path} has {len(found)} columns of images ({names}): choose one with --image_column")
    return found[0]


def _named(entry: Entry, names: Sequence[str]) -> Entry:
    """Entry with the keys that :mod:`eve_ds.data.formats.released` reads."""
    if not isinstance(entry.content, dict):
        return entry
    keys = {"image": names[0], "caption": names[1]}
    return Entry({new: entry.content[old] for new, old in keys.items() if old in entry.content}, entry.where)


def _found(folder: Path) -> list[Path]:
    found = sorted(path for name in NAMES for path in folder.rglob(name))
    files = [path for path in found if not is_leftover(str(path.relative_to(folder)))]
    if not files:
        tables = "; give its Parquet files to `prepare.py table`" if any(folder.rglob(f"*{SUFFIX}")) else ""
        raise SourceError(
            f"{folder} holds no {', '.join(NAMES[:-1])} or {NAMES[-1]}, which give the captions of an image "
            f"folder{tables}"
        )
    return files
