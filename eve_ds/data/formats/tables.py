"""CSV and TSV files of image paths and captions, with a header row or as Flickr8k and Flickr30K publish them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eve_ds.data.errors import SourceError
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.cells import (
    captions_of,
    image_name,
    is_absent,
    is_numbered_image,
    is_web_address,
    names_image,
    starts_json,
)
from eve_ds.data.formats.delimited import Layout, first_fields, read_rows
from eve_ds.data.formats.entries import shortened
from eve_ds.data.formats.spelling import whole_number
from eve_ds.data.formats.where import EVERY_ROW, Where
from eve_ds.printable import excerpt

IMAGE_COLUMNS = ("image", "file_name", "image_path", "filepath")
CAPTION_COLUMNS = ("caption", "text", "TEXT")
ADDRESS_COLUMNS = ("url", "URL", "image_url")
NUMBERED_COLUMNS = ("image", "caption")
"""Columns of a file with lines of `NAME.jpg#NUMBER`, a tab and a caption."""
MALFORMED = "malformed entry"
NO_CAPTION = "no caption"
_OTHER_DELIMITERS = {"\t": r"\t", ";": ";", ",": ",", "|": "|"}
_OPTIONS = {
    IMAGE_COLUMNS[0]: "--image_column",
    ADDRESS_COLUMNS[0]: "--url_column",
    "caption": "--caption_column",
    "text": "--caption_column",
}
"""First of several names of a column -> option of `prepare` that gives another one."""


class Columns(NamedTuple):
    """Names of the columns to read, of several names the first that the table has; and which rows to take."""

    image: str | Sequence[str] = IMAGE_COLUMNS
    """Paths below the image folder, or addresses."""
    caption: str | Sequence[str] = CAPTION_COLUMNS
    image_id: str | None = None
    """None: the table has no column of ids."""
    where: Where = EVERY_ROW

    def of(self, header: Sequence[str], path: Path) -> tuple[str, ...]:
        """Names in a header; raises :class:`SourceError` for one that it lacks or repeats."""
        wanted = (self.image, self.caption, *([self.image_id] if self.image_id else []))
        self.where.require_columns(header, path)
        return tuple(_column(header, names, path) for names in wanted)


DEFAULT_COLUMNS = Columns()


def _column(header: Sequence[str], wanted: str | Sequence[str], path: Path) -> str:
    names = _names(wanted)
    name = next((name for name in names if name in header), None)
    if name is None:
        hint = _hint(header, names, is_default=not isinstance(wanted, str))
        raise SourceError(f"{path} has no column '{names[0]}'; it has: {_short(header)}{hint}")
    if header.count(name) > 1:
        raise SourceError(f"{path} has {header.count(name)} columns '{name}': rename all but one")
    return name


class Row(NamedTuple):
    """A row of a table that cannot be used."""

    number: int
    """Number of the row, from 1; the header is not counted."""
    problem: str
    """Why, one of a few fixed texts."""
    detail: str = ""
    """What is wrong with it, where the problem does not say."""


class Table:
    """Rows of one file, read as a stream.

    A cell of captions may hold a list of them, see :func:`eve_ds.data.formats.cells.captions_of`.

    Args:
        path: the file.
        columns: names that the header must have.
        delimiter: None: a tab for `.tsv` and for lines of `NAME.jpg#NUMBER`, otherwise a comma.
        header: names of the columns of a file without a header row; None: the first row has them, unless it begins
            with `NAME.jpg#NUMBER`.

    Attributes:
        columns: names of the columns of image, caption, and id if there is one.

    Raises:
        SourceError: the file is no text in UTF-8, or has no header row or one that lacks a column or repeats it.
    """

    def __init__(
        self, path: Path, columns: Columns, delimiter: str | None = None, header: Sequence[str] | None = None
    ) -> None:
        if header is None and delimiter in (None, "\t") and _is_numbered(path):
            delimiter, header = "\t", NUMBERED_COLUMNS
        self.path, self.delimiter = path, delimiter or default_delimiter(path)
        self._has_header = header is None
        self._header = list(header or _read_header(path, self.delimiter, columns))
        if self._has_header:
            _refuse_other_header(path, self._header)
        self.columns = columns.of(self._header, path)
        self._where = columns.where
        self._places = [self._header.index(name) for name in (*self.columns, *self._where.values)]
        surplus = "more fields than the header" if self._has_header else f"more than {len(self._header)} fields"
        self._too_long = f"{surplus} (quote captions with {self.delimiter!r} in them)"

    def __iter__(self) -> Iterator[ImageCaptions | Row]:
        """Rows in the order of the file that the conditions take; of those that cannot be used, all."""
        for number, fields in self._rows():
            bad = self._bad_form(number, fields)
            if bad is not None:
                yield bad
            elif not self._where.values or self._where.holds(self._named(fields)):
                yield self._record(number, fields)

    def cells(self) -> Iterator[dict[str, str]]:
        """Cells of each row by the names of their columns; rows of another form are left out."""
        return (self._named(fields) for number, fields in self._rows() if self._bad_form(number, fields) is None)

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        layout = Layout(self.delimiter, len(self._header), self._places[0])
        return enumerate(read_rows(self.path, layout, self._has_header), start=1)

    def _named(self, fields: Sequence[str]) -> dict[str, str]:
        return dict(zip(self._header, fields, strict=False))

    def _bad_form(self, number: int, fields: Sequence[str]) -> Row | None:
        """The row where its number of fields is wrong or it is no text."""
        if any(field.strip() for field in fields[len(self._header) :]):
            return Row(number, self._too_long)
        if len(fields) <= max(self._places):
            needed = self._header[max(self._places)]
            return Row(number, MALFORMED, f"it ends before the column {needed}")
        return Row(number, MALFORMED, "it has a NUL byte") if "\0" in "".join(fields) else None

    def _record(self, number: int, fields: Sequence[str]) -> ImageCaptions | Row:
        image, caption, *more = ("" if is_absent(fields[at]) else fields[at] for at in self._places)
        captions = captions_of(caption)
        image_id = whole_number(more[0].strip()) if len(self.columns) > 2 else ""
        if not image:
            return Row(number, MALFORMED, f"{self.columns[0]} is empty")
        if captions is None:
            detail = f"{self.columns[1]} ({shortened(caption)}) is a list of other values than texts"
            return Row(number, MALFORMED, detail)
        return ImageCaptions(image_name(image), captions, image_id or None) if caption else Row(number, NO_CAPTION)


def default_delimiter(path: Path) -> str:
    """A tab for `.tsv`, otherwise a comma."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _is_numbered(path: Path) -> bool:
    fields = first_fields(path, "\t") or [""]
    return len(fields) >= len(NUMBERED_COLUMNS) and is_numbered_image(fields[0])


def _read_header(path: Path, delimiter: str, columns: Columns) -> list[str]:
    header = first_fields(path, delimiter)
    if header is None:
        wanted = ", ".join(_names(names)[0] for names in columns[:3] if names)
        raise SourceError(f"{path} is empty; expected a header row with the columns {wanted}")
    return header


def _refuse_other_header(path: Path, fields: Sequence[str]) -> None:
    """Raise :class:`SourceError` for a first line that is no header: JSON, or a caption and the address of an image."""
    if fields and starts_json(fields[0]):
        raise SourceError(f"{path} is JSON, not a table: give it to `prepare.py json`, which knows further commands")
    if any(map(is_web_address, fields)):
        raise SourceError(
            f"{path} is a list of captions and addresses without a header, as CC3M and CC12M publish: give it to "
            "`prepare.py urls`"
        )


def _names(names: Any) -> Sequence[str]:
    return [names] if isinstance(names, str) else names or ()


def _hint(header: Sequence[str], missing: Sequence[str], is_default: bool) -> str:
    """What to do about a header that lacks a column."""
    if missing[0] == IMAGE_COLUMNS[0] and {*header} & {*ADDRESS_COLUMNS}:
        return " (a list of addresses? give it to `prepare.py urls`)"
    found = [sign for sign in _OTHER_DELIMITERS if len(header) == 1 and sign in header[0]]
    hints = [f"another delimiter? --delimiter '{_OTHER_DELIMITERS[sign]}'" for sign in found[:1]]
    if any(names_image(field.strip()) for field in (header[0].split(found[0]) if found else header)):
        hints.append("no header row? put the names of the columns before the first line")
    elif not found and is_default and missing[0] in _OPTIONS:
        hints.append(f"another name? {_OPTIONS[missing[0]]} NAME")
    return f" ({'; '.join(hints)})" if hints else ""


def _short(header: Sequence[str]) -> str:
    return excerpt(", ".join(header))
