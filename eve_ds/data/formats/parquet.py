"""Parquet tables, read batch by batch: lists of addresses (LAION, DataComp), or images beside their captions.

An image is a path, the encoded bytes, or `{bytes, path}` as Hugging Face's `datasets` writes it. `pyarrow` reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eve_ds.data.caption_text import clean_caption
from eve_ds.data.errors import SourceError
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.cells import captions_of, image_name
from eve_ds.data.formats.entries import Entry, is_null, shortened
from eve_ds.data.formats.tables import Columns, Row

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BATCH_ROWS = 256
"""Rows in memory at a time; with images of 100 kB they take 25 MB."""
EMBEDDED_COLUMNS = ("image", "jpg", "png", "webp", "image_bytes", "file_name", "image_path", "filepath")
"""Columns of an image or its path, the first that a table has; img2dataset names them by the encoding."""
NO_IMAGE = "no image"
DAMAGED = "damaged row group (rows of it are lost)"
SUFFIX, MAGIC = ".parquet", b"PAR1"


class ParquetTable:
    """Rows of one file.

    Args:
        path: the file.
        columns: names that the file must have; see :meth:`eve_ds.data.formats.tables.Columns.of`.
        address: column of addresses that are further names of the images; not read where the file lacks it.

    Attributes:
        num_rows: number of rows.
        num_bytes: size of the table after decompression.
        is_embedded: whether the column of images can hold their bytes.
        columns: names of the columns of image, caption, and id if there is one.

    Raises:
        SourceError: the file is no Parquet or damaged, lacks a column, or `pyarrow` is not installed.
    """

    def __init__(self, path: Path, columns: Columns, address: str | None = None) -> None:
        self._path, self._where = path, columns.where
        with _opened(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
        self.num_rows: int = metadata.num_rows
        self.num_bytes = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        self.columns = columns.of(schema.names, path)
        self.is_embedded = "binary" in str(schema.field(self.columns[0]).type)
        self._addresses = [address] if address is not None and address in schema.names else []

    def __iter__(self) -> Iterator[ImageCaptions | Row | Entry]:
        """Each row in the order of the file that the conditions take; malformed ones themselves.

        Rows without an image have that problem, and damage costs the row group that it is in, counted as one row.
        """
        shared = self._shared_names()
        for number, row in self._rows():
            if row is None:
                yield Row(number, DAMAGED)
                continue
            if not self._where.holds(row):
                continue
            entry = Entry(row, f"{self._path} row {number}")
            try:
                yield self._record(entry, number, shared) or Row(number, NO_IMAGE)
            except SourceError as error:
                yield entry.malformed(error)

    def cells(self) -> Iterator[dict[str, Any]]:
        """Values of the columns of the conditions of each row that can be read."""
        return (row for _, row in _rows(self._path, list(self._where.values)) if row is not None)

    def _rows(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        return _rows(self._path, (*self.columns, *self._addresses, *self._where.values))

    def _shared_names(self) -> frozenset[str]:
        """Names that different images of the first rows have, such as image.png: they name none of these images."""
        images: dict[str, set[bytes]] = {}
        for _, row in islice(self._rows() if self.is_embedded else (), BATCH_ROWS):
            value = row and row[self.columns[0]]
            if isinstance(value, dict) and isinstance(value.get("path"), str) and isinstance(value.get("bytes"), bytes):
                images.setdefault(value["path"], set()).add(value["bytes"])
        return frozenset(path for path, different in images.items() if len(different) > 1)

    def _record(self, entry: Entry, number: int, shared: frozenset[str]) -> ImageCaptions | None:
        image, caption, *more = self.columns
        value = entry.get(image)
        if is_null(value) or (isinstance(value, dict) and is_null(value.get("bytes")) and is_null(value.get("path"))):
            return None
        name, data = _image(entry, image)
        name = "" if name in shared else name
        name = name or f"{self._path.parent.name}/{self._path.name}/{number}"
        image_id = entry.identity(more[0]) if more else None
        aliases = tuple(address for column in self._addresses if isinstance(address := entry.get(column), str))
        name = name if data else image_name(name)
        return ImageCaptions(name, _captions(entry, caption), image_id, aliases, data=data)


def is_parquet(path: Path) -> bool:
    """Whether a file has the suffix or the first bytes of Parquet."""
    if path.suffix.lower() == SUFFIX:
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def column_names(path: Path) -> list[str]:
    """Names of the columns of a file; raises :class:`SourceError`."""
    with _opened(path) as file:
        names: list[str] = file.schema_arrow.names
    return names


def _opened(path: Path) -> ParquetFile:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SourceError(
            f"{path} is Parquet, which pyarrow reads: pip install 'eve_ds[parquet]', or pip install pyarrow"
        ) from None
    try:
        return ParquetFile(path, memory_map=True, pre_buffer=False)
    except Exception as error:  # pyarrow has its own exceptions beside OSError and ValueError
        raise _damaged(path, error) from None


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and fields of each row; None for the first row that cannot be read of a damaged row group."""
    start = 1
    with _opened(path) as file:
        for group in range(file.num_row_groups):
            number = start
            try:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(dict.fromkeys(columns))):
                    for row in batch.to_pylist():
                        yield number, row
                        number += 1
            except MemoryError:
                raise
            except Exception:  # pyarrow has its own exceptions beside OSError and ValueError
                yield number, None
            start += file.metadata.row_group(group).num_rows


def _damaged(path: Path, error: Exception) -> SourceError:
    return SourceError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}; get it again")


def _captions(entry: Entry, column: str) -> tuple[str, ...]:
    """Captions of a text, of a list, or of a text that is a list; bytes are UTF-8."""
    value = entry.get(column)
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        return entry.captions(column)
    captions = captions_of(text)
    if captions is None:
        raise entry.error(f"{column} ({shortened(text)}) is a list of other values than texts")
    return tuple(map(clean_caption, captions))


def _image(entry: Entry, column: str) -> tuple[str, bytes | None]:
    """Name of an image, and its bytes if the table holds them; the name is then empty if there is none."""
    value = entry.get(column)
    fields = value if isinstance(value, dict) else {"bytes": value} if isinstance(value, bytes) else {"path": value}
    path, data = fields.get("path"), fields.get("bytes")
    if is_null(data):
        return Entry({column: path}, entry.where).file_name(column), None
    if not isinstance(data, bytes):
        raise entry.error(f"{column} ({shortened(value)}) must be a path or an encoded image")
    return path if isinstance(path, str) else "", data
