"""CSV and TSV files of image paths and captions with a header row.

A field in double quotes may hold delimiters, line ends and doubled quotes (RFC 4180), as `csv` and pandas write it, or
quotes behind a backslash, as Spark and MySQL write them. A quote that opens no such field is text: captions have inches
and quotations, and TSV files are written without quoting.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from eve_ds import limits
from eve_ds.data.caption_text import ABSENT_CELLS
from eve_ds.data.errors import SourceError
from eve_ds.data.formats.unread import refuse_binary, refuse_list_of_addresses
from eve_ds.data.image_file import IMAGE_EXTENSIONS
from eve_ds.printable import excerpt

MALFORMED = "malformed entry"
NO_CAPTION = "no caption"
_IMAGE_NAME = re.compile(rf"[^\n]*\.({'|'.join(IMAGE_EXTENSIONS)})\"?", re.IGNORECASE)
_ESCAPED = re.compile(r'\\(["\\])')
"""A quote or a backslash behind a backslash."""
_OTHER_DELIMITERS = {"\t": r"\t", ";": ";", ",": ",", "|": "|"}


class Columns(NamedTuple):
    """Names of the columns to read."""

    image: str
    caption: str
    image_id: str | None
    """None: the table has no column of ids."""


class Row(NamedTuple):
    """One row of a table."""

    number: int
    """Number of the row, from 1; the header is not counted."""
    image: str
    """Path below the image folder."""
    caption: str
    image_id: str | None
    problem: str | None
    """Why the row cannot be used, one of a few fixed texts; the other fields are then empty."""


class Table:
    """Rows of one file, read as a stream.

    Args:
        path: the file.
        columns: names that the header must have.
        delimiter: None: a tab for `.tsv`, otherwise a comma.

    Raises:
        SourceError: the file is no text in UTF-8, or has no header row or one that lacks a column or repeats it.
    """

    def __init__(self, path: Path, columns: Columns, delimiter: str | None = None) -> None:
        self.path, self.columns = path, columns
        self.delimiter = delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
        refuse_binary(path)
        with self._open() as file:
            self._header = self._check_header(next(_lines(file), None))
        self._places = [self._header.index(name) for name in self._named()]
        self._too_long = f"more fields than the header (quote captions with {self.delimiter!r} in them)"

    def __iter__(self) -> Iterator[Row]:
        """Rows in the order of the file."""
        with self._open() as file:
            lines = _lines(file)
            next(lines)
            records = _records(lines, self.delimiter, len(self._header), self._places[0])
            for number, fields in enumerate(records, start=1):
                yield self._row(number, fields)

    def _row(self, number: int, fields: Sequence[str]) -> Row:
        problem = None
        image = caption = ""
        image_id = None
        if any(fields[len(self._header) :]):
            problem = self._too_long
        elif len(fields) <= max(self._places) or "\0" in "".join(fields):
            problem = MALFORMED
        else:
            image, caption, *more = ("" if fields[at].strip() in ABSENT_CELLS else fields[at] for at in self._places)
            image_id = (more[0] or None) if more else None
            problem = MALFORMED if not image else None if caption else NO_CAPTION
        return Row(number, image, caption, image_id, problem)

    def _open(self) -> TextIO:
        # A caption that is not UTF-8 keeps its bytes as surrogates; the shard writer finds and counts it.
        return self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")

    def _check_header(self, line: str | None) -> list[str]:
        if line is None:
            columns = ", ".join(self._named())
            raise SourceError(f"{self.path} is empty; expected a header row with the columns {columns}")
        header = [name.strip() for name in _quoted(line, self.delimiter)[0] or _plain(line, self.delimiter)]
        for column in self._named():
            if column not in header:
                refuse_list_of_addresses(self.path, header)
                raise SourceError(f"{self.path} has no column '{column}'; it has: {_short(header)}{self._hint(header)}")
            if header.count(column) > 1:
                raise SourceError(f"{self.path} has {header.count(column)} columns '{column}': rename all but one")
        return header

    def _hint(self, header: Sequence[str]) -> str:
        found = [sign for sign in _OTHER_DELIMITERS if len(header) == 1 and sign in header[0]]
        return f" (another delimiter? --delimiter '{_OTHER_DELIMITERS[found[0]]}')" if found else ""

    def _named(self) -> list[str]:
        return [column for column in self.columns if column is not None]


def _short(header: Sequence[str]) -> str:
    return excerpt(", ".join(header))


def _lines(file: TextIO) -> Iterator[str]:
    """Yield the lines; one above `limits.ROW_CHARACTERS` is cut there, and its caption exceeds the cap of captions."""
    while line := file.readline(limits.ROW_CHARACTERS):
        rest = line
        while len(rest) == limits.ROW_CHARACTERS and not rest.endswith(("\n", "\r")):
            rest = file.readline(limits.ROW_CHARACTERS)
        yield line


def _records(lines: Iterator[str], delimiter: str, width: int, image_at: int) -> Iterator[list[str]]:
    """Yield the fields of each row.

    A field in quotes goes on at the next line, unless that line is a row of its own: `width` fields, and where the
    delimiter is no tab, the name of an image at `image_at`. The quote then was text, as it is where the field has no
    end within `limits.ROW_LINES`.
    """
    ahead: deque[str] = deque()
    while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
        if not line.strip("\r\n"):
            continue
        joined = [line]
        fields, is_open = _quoted(line, delimiter)
        while is_open and len(joined) < limits.ROW_LINES and sum(map(len, joined)) < limits.ROW_CHARACTERS:
            following = ahead.popleft() if ahead else next(lines, None)
            if following is None:
                break
            joined.append(following)
            if _is_row(following, delimiter, width, image_at):
                break
            fields, is_open = _quoted("".join(joined), delimiter)
        if fields is None:
            ahead.extendleft(reversed(joined[1:]))
            fields = _plain(line, delimiter)
        yield fields


def _quoted(text: str, delimiter: str) -> tuple[list[str] | None, bool]:
    """Fields of one row by the rules of quoting, None where it breaks them; and whether a quoted field has no end."""
    if '"' not in text:
        return text.rstrip("\r\n").split(delimiter), False
    doubled = _ESCAPED.sub(lambda found: '""' if found[1] == '"' else found[1], text)
    fields, is_open = _parsed(text, delimiter)
    return _parsed(doubled, delimiter) if fields is None and not is_open and doubled != text else (fields, is_open)


def _parsed(text: str, delimiter: str) -> tuple[list[str] | None, bool]:
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True)), False
    except csv.Error as error:
        return None, "unexpected end of data" in str(error)


def _is_row(line: str, delimiter: str, width: int, image_at: int) -> bool:
    fields = _plain(line, delimiter)
    # A text with commas can look like a row, so its first field must look like an image; one with tabs hardly can.
    return len(fields) == width and (delimiter == "\t" or _IMAGE_NAME.fullmatch(fields[image_at]) is not None)


def _plain(line: str, delimiter: str) -> list[str]:
    """Fields of one line, in which quotes are text unless they enclose a whole field without further quotes."""
    return [field[1:-1] if re.fullmatch(r'"[^"]*"', field) else field for field in line.rstrip("\r\n").split(delimiter)]
