"""CSV and TSV files of image paths and captions with a header row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from eve_ds.data.errors import SourceError


class Columns(NamedTuple):
    """Names of the columns to read."""

    image: str
    caption: str
    image_id: str | None
    """None: the table has no column of ids."""


class Row(NamedTuple):
    """One row of a table; a field is None where the row is too short for it."""

    number: int
    """Number of the row, from 1; the header is not counted."""
    image: str | None
    """Path below the image folder."""
    caption: str | None
    image_id: str | None


class Table:
    """Rows of one file, read as a stream.

    Args:
        path: the file.
        columns: names that the header must have.
        delimiter: None: a tab for `.tsv`, otherwise a comma.

    Raises:
        SourceError: no header row, or one that lacks a column.
    """

    def __init__(self, path: Path, columns: Columns, delimiter: str | None = None) -> None:
        self.path, self.columns = path, columns
        self.delimiter = delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
        header = self._read_header()
        for column in self._named():
            if column not in header:
                raise SourceError(f"{path} has no column '{column}'; it has: {', '.join(header)}")

    def __iter__(self) -> Iterator[Row]:
        """Rows in the order of the file; raises :class:`SourceError` for a line that is not CSV."""
        image, caption, image_id = self.columns
        with self._open() as file:
            rows = csv.DictReader(file, delimiter=self.delimiter)
            try:
                for number, row in enumerate(rows, start=1):
                    yield Row(number, row[image], row[caption], row[image_id] if image_id else None)
            except csv.Error as error:
                raise SourceError(f"{self.path} line {rows.line_num}: {error}") from None

    def _open(self) -> io.TextIOWrapper:
        # A caption that is not UTF-8 keeps its bytes as surrogates; the shard writer finds and counts it.
        return self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")

    def _read_header(self) -> list[str]:
        with self._open() as file:
            try:
                return next(csv.reader(file, delimiter=self.delimiter))
            except StopIteration:
                columns = ", ".join(self._named())
                raise SourceError(f"{self.path} is empty; expected a header row with the columns {columns}") from None
            except csv.Error as error:
                raise SourceError(f"{self.path} is not a table: {error}") from None

    def _named(self) -> list[str]:
        return [column for column in self.columns if column is not None]
