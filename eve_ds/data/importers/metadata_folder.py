"""Image folder of Hugging Face's `datasets`: images beside metadata.jsonl, metadata.csv or metadata.parquet.

Each folder of the tree may have a file of its own, such as `train/metadata.csv`; `file_name` is a path below that
folder. https://huggingface.co/docs/datasets/image_dataset
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from eve_ds.data.errors import SourceError
from eve_ds.data.formats import released
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.entries import Entry, stream_entries
from eve_ds.data.formats.json_stream import read_outline
from eve_ds.data.formats.parquet import SUFFIX
from eve_ds.data.formats.tables import Columns
from eve_ds.data.importers.annotated_images import AnnotatedImages, ImagePaths, counted
from eve_ds.data.importers.annotations import open_table, table_records
from eve_ds.data.importers.candidate import Skip, existing_folder
from eve_ds.data.sample_names import is_leftover

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME, CAPTIONS = "file_name", ("text", "caption")


class MetadataFolder(AnnotatedImages):
    """All images that metadata files of a folder describe; an image id is its path below the folder.

    Args:
        folder: folder of the tree.
        caption_column: column, or key, of captions; None: `text`, or `caption` without it.
        follow_links: whether symbolic links may lead out of the folder.
    """

    def __init__(self, folder: str | Path, caption_column: str | None = None, follow_links: bool = False) -> None:
        """Find the metadata; raises :class:`SourceError` for a folder without, or for one of another form."""
        self._root = existing_folder(folder, "image folder")
        self._captions = CAPTIONS if caption_column is None else (caption_column,)
        options = {} if caption_column is None else {"caption_column": caption_column}
        super().__init__("imagefolder", _found(self._root), ImagePaths(self._root, None, follow_links), options)
        for path in self.files:
            self._check(path)
        self.require_some_image()

    def records(self) -> Iterator[ImageCaptions | Skip]:
        """Rows of the files, sorted by path."""
        for path in self.files:
            below = PurePosixPath(path.parent.relative_to(self._root))
            for record in self._read(path):
                yield record if isinstance(record, Skip) else record._replace(image=str(below / record.image))

    def _read(self, path: Path) -> Iterator[ImageCaptions | Skip]:
        if path.suffix == ".jsonl":
            return counted(released.read_captions(map(self._named, stream_entries(path))))
        return table_records(open_table(path, Columns(FILE_NAME, self._captions)))

    def _named(self, entry: Entry) -> Entry:
        """Entry with the keys that :mod:`eve_ds.data.formats.released` reads."""
        if not isinstance(entry.content, dict):
            return entry
        content = {new: entry.content[old] for old, new in self._keys().items() if old in entry.content}
        return Entry(content, entry.where)

    def _keys(self) -> dict[str, str]:
        return {FILE_NAME: "image", **dict.fromkeys(reversed(self._captions), "caption")}

    def _check(self, path: Path) -> None:
        if path.suffix != ".jsonl":
            open_table(path, Columns(FILE_NAME, self._captions))
            return
        tree = read_outline(path, keep_undecodable=True).tree
        released.require_captions(tree, map(self._named, stream_entries(path)), path)


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
