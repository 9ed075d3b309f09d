"""Image folder of Hugging Face's `datasets`: images beside metadata.jsonl, metadata.csv or metadata.parquet.

Each folder of the tree may have a file of its own, such as `train/metadata.csv`; its paths are below that folder.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from eve_ds.data.errors import SourceError
from eve_ds.data.folder_tree import File, FolderTree
from eve_ds.data.formats import released
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.entries import Entry, stream_entries
from eve_ds.data.formats.json_stream import read_outline
from eve_ds.data.formats.metadata import NAMES, metadata_columns
from eve_ds.data.formats.parquet import SUFFIX
from eve_ds.data.formats.tables import Columns
from eve_ds.data.formats.where import EVERY_ROW, Where
from eve_ds.data.importers.annotated_images import AnnotatedImages, ImagePaths, counted
from eve_ds.data.importers.annotations import open_table
from eve_ds.data.importers.candidate import Skip, existing_folder

TWICE = "caption that two metadata files give"


class MetadataFolder(AnnotatedImages):
    """All images that metadata files of a folder describe; an image id is its path below the folder.

    Args:
        folder: folder of the tree; metadata files are found through links to folders as well.
        caption_column: column, or key, of captions; None: `text`, or `caption` without it.
        follow_links: whether symbolic links may lead to images out of the folder.
        image_column: column, or key, of paths; None: see :mod:`eve_ds.data.formats.metadata`.
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
        root = existing_folder(folder, "image folder")
        tree = FolderTree(root)
        found = _found(tree, root)
        options = {"caption_column": caption_column, "image_column": image_column}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        paths = ImagePaths(root, None, follow_links)
        super().__init__("imagefolder", [file.path for file in found], paths, given | where.description())
        self._unread = tree.unread
        self._folders = [PurePosixPath(file.name).parent for file in found]
        self._columns = [metadata_columns(path, caption_column, image_column, where) for path in self.files]
        for path, columns in zip(self.files, self._columns, strict=True):
            _check(path, columns)
        cells = chain.from_iterable(map(_cells, self.files, self._columns))
        where.require_values(cells, self.files[0])
        self.require_some_image()

    def records(self) -> Iterator[ImageCaptions | Skip]:
        """Rows of the files, sorted by path; a caption that a file in a folder above gives as well is taken once."""
        nested = any(one in other.parents for one in self._folders for other in self._folders)
        yield from self._taken_once() if nested else (record for rows in self._rows() for record in rows)
        yield from (Skip(name, reason) for name, reason in self._unread)

    def _rows(self) -> Iterator[Iterator[ImageCaptions | Skip]]:
        """Rows of each file, with the paths of images below the root."""
        for path, folder, columns in zip(self.files, self._folders, self._columns, strict=True):
            yield (
                record if isinstance(record, Skip) else record._replace(image=str(folder / record.image))
                for record in _read(path, columns)
            )

    def _taken_once(self) -> Iterator[ImageCaptions | Skip]:
        earlier: set[int] = set()
        for rows in self._rows():
            known = frozenset(earlier)
            for record in rows:
                if isinstance(record, Skip) or not record.captions:
                    yield record
                    continue
                hashes = [_hash(record.image, caption) for caption in record.captions]
                new = tuple(text for text, hash_ in zip(record.captions, hashes, strict=True) if hash_ not in known)
                earlier.update(hashes)
                yield from [Skip(record.image, TWICE)] * (len(hashes) - len(new))
                if new:
                    yield record._replace(captions=new)


def _hash(image: str, caption: str) -> int:
    text = f"{posixpath.normpath(image)}\0{caption}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _read(path: Path, columns: Columns) -> Iterator[ImageCaptions | Skip]:
    if path.suffix != ".jsonl":
        return counted(open_table(path, columns))
    entries = columns.where.taken(stream_entries(path))
    return counted(released.read_captions(_named(entry, columns) for entry in entries))


def _cells(path: Path, columns: Columns) -> Iterator[Mapping[str, Any]]:
    """Values by which rows are taken."""
    if path.suffix != ".jsonl":
        return open_table(path, columns).cells()
    return (entry.content for entry in stream_entries(path) if isinstance(entry.content, dict))


def _named(entry: Entry, columns: Columns) -> Entry:
    """Entry with the keys that :mod:`eve_ds.data.formats.released` reads."""
    if not isinstance(entry.content, dict):
        return entry
    keys = {str(columns.image): "image", **dict.fromkeys(reversed(tuple(columns.caption)), "caption")}
    return Entry({new: entry.content[old] for old, new in keys.items() if old in entry.content}, entry.where)


def _check(path: Path, columns: Columns) -> None:
    if path.suffix != ".jsonl":
        open_table(path, columns)
        return
    tree = read_outline(path, keep_undecodable=True).tree
    released.require_captions(tree, (_named(entry, columns) for entry in stream_entries(path)), path)


def _found(tree: FolderTree, root: Path) -> list[File]:
    """Metadata files of a tree; raises :class:`SourceError` for none, or for two in one folder."""
    files = [file for file in tree.ending(*NAMES) if PurePosixPath(file.name).name in NAMES]
    if not files:
        tables = "; give its Parquet files to `prepare.py table`" if tree.ending(SUFFIX) else ""
        raise SourceError(
            f"{root} holds no {', '.join(NAMES[:-1])} or {NAMES[-1]}, which give the captions of an image "
            f"folder{tables}"
        )
    names: dict[PurePosixPath, list[str]] = {}
    for path in (PurePosixPath(file.name) for file in files):
        names.setdefault(path.parent, []).append(path.name)
    folder, both = max(names.items(), key=lambda item: len(item[1]))
    if len(both) > 1:
        raise SourceError(
            f"{root / folder} holds {' and '.join(both)}, which both give captions of its images: remove all but one"
        )
    return files
