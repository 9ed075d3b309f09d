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
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.image_ids import whole_number
from eve_ds.data.formats.unread import refuse_binary, refuse_other_header
from eve_ds.data.image_file import IMAGE_EXTENSIONS
from eve_ds.printable import excerpt

IMAGE_COLUMNS = ("image", "file_name", "image_path", "filepath")
CAPTION_COLUMNS = ("caption", "text", "TEXT")
ADDRESS_COLUMNS = ("url", "URL", "image_url")
MALFORMED = "malformed entry"
NO_CAPTION = "no caption"
_IMAGE_NAME = re.compile(rf"[^\n]*\.({'|'.join(IMAGE_EXTENSIONS)})\"?", re.IGNORECASE)
_ESCAPED = re.compile(r'\\(["\\])')
"""A quote or a backslash behind a backslash."""
_OTHER_DELIMITERS = {"\t": r"\t", ";": ";", ",": ",", "|": "|"}


class Columns(NamedTuple):
    """Names of the columns to read; of several names, the first that the table has."""

    image: str | Sequence[str] = IMAGE_COLUMNS
    """Paths below the image folder, or addresses."""
    caption: str | Sequence[str] = CAPTION_COLUMNS
    image_id: str | None = None
    """None: the table has no column of ids."""

    def of(self, header: Sequence[str], path: Path) -> tuple[str, ...]:
        """Names in a header; raises :class:`SourceError` for one that it lacks or repeats."""
        wanted = (self.image, self.caption, *([self.image_id] if self.image_id else []))
        return tuple(_column(header, _names(names), path) for names in wanted)


DEFAULT_COLUMNS = Columns()


def _column(header: Sequence[str], names: Sequence[str], path: Path) -> str:
    name = next((name for name in names if name in header), None)
    if name is None:
        raise SourceError(f"{path} has no column '{names[0]}'; it has: {_short(header)}{_hint(header, names)}")
    if header.count(name) > 1:
        raise SourceError(f"{path} has {header.count(name)} columns '{name}': rename all but one")
    return name


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
        header: names of the columns of a file without a header row; None: the first row has them.

    Attributes:
        columns: names of the columns of image, caption, and id if there is one.

    Raises:
        SourceError: the file is no text in UTF-8, or has no header row or one that lacks a column or repeats it.
    """

    def __init__(
        self, path: Path, columns: Columns, delimiter: str | None = None, header: Sequence[str] | None = None
    ) -> None:
        self.path, self.delimiter = path, delimiter or default_delimiter(path)
        self._has_header = header is None
        self._header = list(header or _read_header(path, self.delimiter, columns))
        if self._has_header:
            refuse_other_header(path, self._header)
        self.columns = columns.of(self._header, path)
        self._places = [self._header.index(name) for name in self.columns]
        self._too_long = f"more fields than the header (quote captions with {self.delimiter!r} in them)"

    def __iter__(self) -> Iterator[Row]:
        """Rows in the order of the file."""
        with _open(self.path) as file:
            lines = _lines(file)
            if self._has_header:
                next(lines)
            records = _records(lines, self.delimiter, len(self._header), self._places[0])
            for number, fields in enumerate(records, start=1):
                yield self._row(number, fields)

    def records(self) -> Iterator[ImageCaptions | Row]:
        """Records of the rows; the row itself where it cannot be used."""
        return (row if row.problem else ImageCaptions(row.image, (row.caption,), row.image_id) for row in self)

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
            image_id = (whole_number(more[0].strip()) or None) if more else None
            problem = MALFORMED if not image else None if caption else NO_CAPTION
        return Row(number, image, caption, image_id, problem)


def default_delimiter(path: Path) -> str:
    """A tab for `.tsv`, otherwise a comma."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def first_fields(path: Path, delimiter: str) -> list[str] | None:
    """Fields of the first line without the white space around them, None for an empty file.

    Raises:
        SourceError: the file is no text in UTF-8, or cannot be read.
    """
    refuse_binary(path)
    with _open(path) as file:
        line = next(_lines(file), None)
    if line is None:
        return None
    return [name.strip() for name in _quoted(line, delimiter)[0] or _plain(line, delimiter)]


def _read_header(path: Path, delimiter: str, columns: Columns) -> list[str]:
    header = first_fields(path, delimiter)
    if header is None:
        wanted = ", ".join(_names(names)[0] for names in columns if names)
        raise SourceError(f"{path} is empty; expected a header row with the columns {wanted}")
    return header


def _open(path: Path) -> TextIO:
    # A caption that is not UTF-8 keeps its bytes as surrogates; the shard writer finds and counts it.
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _names(names: str | Sequence[str] | None) -> Sequence[str]:
    return [names] if isinstance(names, str) else names or ()


def _hint(header: Sequence[str], missing: Sequence[str]) -> str:
    """What to do about a header that lacks a column."""
    if missing[0] == IMAGE_COLUMNS[0] and {*header} & {*ADDRESS_COLUMNS}:
        return " (a list of addresses? give it to `prepare.py urls`)"
    found = [sign for sign in _OTHER_DELIMITERS if len(header) == 1 and sign in header[0]]
    return f" (another delimiter? --delimiter '{_OTHER_DELIMITERS[found[0]]}')" if found else ""


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
