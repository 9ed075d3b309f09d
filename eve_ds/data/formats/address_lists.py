"""Lists of addresses and captions, whose images are downloaded by another program.

- SBU: `{"image_urls": [...], "captions": [...]}`, two lists of the same length
- CC3M, CC12M: TSV of caption and address, or address and caption, without a header row; also with one
- LAION, DataComp, COYO: Parquet with the columns URL and TEXT, or url and text
- JSON lists or lines of `{"url", "caption"}`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from eve_ds.data.errors import SourceError
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.cells import is_web_address, starts_json
from eve_ds.data.formats.delimited import first_fields, first_rows
from eve_ds.data.formats.entries import Entry, described, stream_entries
from eve_ds.data.formats.json_stream import Outline, read_outline
from eve_ds.data.formats.parquet import ParquetTable, is_parquet
from eve_ds.data.formats.tables import ADDRESS_COLUMNS, CAPTION_COLUMNS, Columns, Row, Table
from eve_ds.data.formats.unread import refuse_document

ADDRESSES, CAPTIONS = "image_urls", "captions"
"""Keys of SBU."""
_PROBED_ROWS = 100
ADDRESSED = Columns(ADDRESS_COLUMNS, CAPTION_COLUMNS)
"""Names of the columns, or keys, by default."""


class AddressList:
    """One file.

    Args:
        path: the file.
        columns: names of the columns, or keys, of addresses and captions.

    Attributes:
        num_rows: number of addresses, None where it is not known before they are read.

    Raises:
        SourceError: the file is of another form or damaged.
    """

    def __init__(self, path: Path, columns: Columns = ADDRESSED) -> None:
        self._path, self._columns = path, columns
        self._table: Table | ParquetTable | None = None
        self._is_sbu = False
        self.num_rows: int | None = None
        if is_parquet(path):
            self._table = ParquetTable(path, columns)
            self.num_rows = self._table.num_rows
        elif not _is_json(path):
            self._table = _table(path, columns)
        else:
            self._check_json(read_outline(path, keep_undecodable=True))

    def __iter__(self) -> Iterator[ImageCaptions | Row | Entry]:
        """Each address with its captions; the row or entry itself where it is malformed."""
        if self._table is not None:
            return iter(self._table)
        return map(self._of_entry, self._columns.where.taken(self._entries()))

    def cells(self) -> Iterator[Mapping[str, Any]]:
        """Values of each address by the names of their columns or keys."""
        if self._table is not None:
            return self._table.cells()
        return (entry.content for entry in self._entries() if isinstance(entry.content, dict))

    def _check_json(self, outline: Outline) -> None:
        tree = outline.tree
        if isinstance(tree, dict) and {ADDRESSES, CAPTIONS} <= outline.counts.keys():
            counts = outline.counts[ADDRESSES], outline.counts[CAPTIONS]
            if counts[0] != counts[1]:
                raise SourceError(
                    f"{self._path} has {counts[0]:,} {ADDRESSES} and {counts[1]:,} {CAPTIONS}: there must be as many"
                )
            self._is_sbu, self.num_rows = True, counts[0]
            return
        problem = ""
        if isinstance(tree, list):
            first = list(map(self._of_entry, islice(stream_entries(self._path), 1000)))
            if any(isinstance(found, ImageCaptions) for found in first):
                self.num_rows = outline.counts[None]
                return
            problem = next((f"; {PurePosixPath(e.where).name}: {e.problem}" for e in first if isinstance(e, Entry)), "")
        refuse_document(self._path, tree, "urls")
        raise SourceError(
            f'{self._path} is no list of addresses: expected {{"{ADDRESSES}": [...], "{CAPTIONS}": [...]}} or '
            f'[{{"url": address, "caption": text}}], found {described(tree)}{problem}'
        )

    def _entries(self) -> Iterator[Entry]:
        if not self._is_sbu:
            yield from stream_entries(self._path)
            return
        lists = zip(stream_entries(self._path, ADDRESSES), stream_entries(self._path, CAPTIONS), strict=True)
        for address, caption in lists:
            yield Entry({"url": address.content, "caption": caption.content}, address.where)

    def _of_entry(self, entry: Entry) -> ImageCaptions | Entry:
        try:
            address, caption = (_key(entry, names) for names in self._columns[:2])
            return ImageCaptions(entry.file_name(address), entry.captions(caption))
        except SourceError as error:
            return entry.malformed(error)


def _key(entry: Entry, names: str | Sequence[str] | None) -> str:
    wanted = [names] if isinstance(names, str) else names or ()
    return next((name for name in wanted if entry.has(name)), wanted[0])


def _is_json(path: Path) -> bool:
    fields = first_fields(path, "\t")
    return bool(fields and starts_json(fields[0]))


def _table(path: Path, columns: Columns) -> Table:
    """Table with or without a header row: a file whose first row has an address has none."""
    by_tab = first_fields(path, "\t") or []
    delimiter = "\t" if len(by_tab) > 1 or path.suffix.lower() == ".tsv" else ","
    fields = by_tab if delimiter == "\t" else first_fields(path, delimiter) or []
    if not any(map(is_web_address, fields)):
        return Table(path, columns, delimiter)
    if len(fields) < 2:
        raise SourceError(f"{path} has one column: expected an address and a caption, with a tab between them")
    return Table(path, Columns("url", "caption", where=columns.where), delimiter, _columns(path, delimiter))


def _columns(path: Path, delimiter: str) -> list[str]:
    """Names of the columns of a file without a header row, by the first rows that have an address.

    A caption may have commas, so these separate two fields only. Tabs separate as many as most of the rows have.
    """
    rows = [fields for fields in islice(first_rows(path, delimiter), _PROBED_ROWS) if any(map(is_web_address, fields))]
    if delimiter == ",":
        return ["url", "caption"] if is_web_address(rows[0][0]) else ["caption", "url"]
    width = Counter(map(len, rows)).most_common(1)[0][0]
    fields = next(fields for fields in rows if len(fields) == width)
    at = next(number for number, field in enumerate(fields) if is_web_address(field))
    names = [f"column {number}" for number in range(width)]
    names[at], names[0 if at else 1] = "url", "caption"
    return names
