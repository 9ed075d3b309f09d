"""Rows of a delimited text file (CSV, TSV) as lists of fields.

A field in double quotes may hold delimiters, line ends and doubled quotes (RFC 4180), as `csv` and pandas write it, or
quotes behind a backslash, as Spark and MySQL write them. White space may stand around the quotes. A quote that opens no
such field is text: captions have inches and quotations, and TSV files are written without quoting.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from eve_ds import limits
from eve_ds.data.formats.cells import names_image
from eve_ds.data.formats.unread import refuse_binary

_ESCAPED = re.compile(r'\\(["\\])')
"""A quote or a backslash behind a backslash."""
_QUOTED_TEXT = re.compile(r'"[^"]*(?:"|\Z)')
_PADDING = re.compile(r'[ \t]"|"[ \t]')
_HIDDEN = {ord("\r"): 0xD800, ord("\n"): 0xD801}
"""Line ends as surrogates that no decoded file has: `csv` refuses line ends outside quotes."""
_SHOWN = {code: end for end, code in _HIDDEN.items()}


class Layout(NamedTuple):
    """What the rows of a file have in common."""

    delimiter: str
    width: int
    """Number of fields."""
    image_at: int
    """Place of the field that names the image."""

    def is_row(self, line: str) -> bool:
        """Whether a line may be a row without quoting; with commas, it must name an image, as a text has commas too."""
        return len(_plain(line, self.delimiter)) == self.width and (self.delimiter == "\t" or self.is_named_row(line))

    def is_named_row(self, line: str) -> bool:
        """Whether a line without quoting is a row that names an image."""
        return self.is_named(_plain(line, self.delimiter))

    def is_named(self, fields: list[str]) -> bool:
        """Whether fields are those of a row that names an image."""
        return len(fields) == self.width and names_image(fields[self.image_at].strip(' \t"'))


def first_fields(path: Path, delimiter: str) -> list[str] | None:
    """Fields of the first row without the white space around them, None for an empty file.

    Raises:
        SourceError: the file is no text in UTF-8, or cannot be read.
    """
    return next(first_rows(path, delimiter), None)


def first_rows(path: Path, delimiter: str) -> Iterator[list[str]]:
    """Yield the fields of rows as :func:`first_fields`; where a quote is text, rows behind it may be left out."""
    refuse_binary(path)
    lines = _lines(path)
    for line in lines:
        joined = line
        fields, is_open = _quoted(line, delimiter)
        for following in islice(lines, limits.ROW_LINES) if is_open else ():
            joined += following
            fields, is_open = _quoted(joined, delimiter)
            if not is_open or len(joined) >= limits.ROW_CHARACTERS:
                break
        yield [field.strip() for field in fields or _plain(line, delimiter)]


def read_rows(path: Path, layout: Layout, has_header: bool) -> Iterator[list[str]]:
    """Yield the fields of each row behind the header; empty lines are no rows.

    A field in quotes goes on at the next line, unless the lines are rows of their own: the quote then was text, as it
    is where the field has no end within `limits.ROW_LINES`.
    """
    lines = _lines(path)
    if has_header:
        next(lines)
    ahead: deque[str] = deque()
    while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
        if not line.strip("\r\n"):
            continue
        joined = [line]
        fields, is_open = _quoted(line, layout.delimiter)
        while is_open and len(joined) < limits.ROW_LINES and sum(map(len, joined)) < limits.ROW_CHARACTERS:
            following = ahead.popleft() if ahead else next(lines, None)
            if following is None:
                break
            joined.append(following)
            if layout.is_named_row(line) and layout.is_named_row(following):
                break
            fields, is_open = _quoted("".join(joined), layout.delimiter)
        if fields is None or (len(joined) > 1 and not _is_one_row(fields, joined, layout)):
            ahead.extendleft(reversed(joined[1:]))
            fields = _plain(line, layout.delimiter)
        yield fields


def _is_one_row(fields: list[str], lines: list[str], layout: Layout) -> bool:
    """Whether lines are one row with a quoted field, by the fields of all; otherwise each is a row of its own."""
    if layout.is_named(fields) or (len(fields) == layout.width and not layout.is_row(lines[0])):
        return True
    return not any(map(layout.is_row, lines[1:]))


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines; one above `limits.ROW_CHARACTERS` is cut there, and its caption exceeds the cap of captions."""
    end = _line_end(path)
    # A caption that is not UTF-8 keeps its bytes as surrogates; the shard writer finds and counts it.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=end) as file:
        while line := file.readline(limits.ROW_CHARACTERS):
            rest = line
            while len(rest) == limits.ROW_CHARACTERS and not rest.endswith(end):
                rest = file.readline(limits.ROW_CHARACTERS)
            yield line


def _line_end(path: Path) -> str:
    r"""`\r` for a file that has no `\n` outside quotes, as old programs write it; elsewhere a lone `\r` is text."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        unquoted = _QUOTED_TEXT.sub("", file.read(limits.ROW_CHARACTERS))
    return "\r" if "\r" in unquoted and "\n" not in unquoted else "\n"


def _quoted(text: str, delimiter: str) -> tuple[list[str] | None, bool]:
    """Fields of one row by the rules of quoting, None where it breaks them; and whether a quoted field has no end."""
    text = text.rstrip("\r\n")
    if '"' not in text:
        return text.split(delimiter), False
    doubled = _ESCAPED.sub(lambda found: '""' if found[1] == '"' else found[1], text)
    fields, is_open = _parsed(text, delimiter)
    return _parsed(doubled, delimiter) if fields is None and not is_open and doubled != text else (fields, is_open)


def _parsed(text: str, delimiter: str) -> tuple[list[str] | None, bool]:
    has_ends = "\r" in text or "\n" in text
    text = _without_padding(text.translate(_HIDDEN) if has_ends else text, delimiter)
    try:
        fields = next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        return None, "unexpected end of data" in str(error)
    return [field.translate(_SHOWN) for field in fields] if has_ends else fields, False


def _without_padding(text: str, delimiter: str) -> str:
    """The text without white space around the quotes of its quoted fields; white space in quotes stays."""
    if _PADDING.search(text) is None:
        return text
    space, end = rf"(?:(?!{re.escape(delimiter)})[ \t])*+", rf"(?={re.escape(delimiter)}|\Z)"
    return re.sub(rf'(\A|{re.escape(delimiter)}){space}("(?:[^"]|"")*+(?:\Z|"{space}{end}))', _trimmed, text)


def _trimmed(found: re.Match[str]) -> str:
    return found[1] + (found[2].rstrip(" \t") if found[2].count('"') % 2 == 0 else found[2])


def _plain(line: str, delimiter: str) -> list[str]:
    """Fields of one line, in which quotes are text unless they enclose a whole field without further quotes."""
    return [re.sub(r'\A[ \t]*"([^"]*)"[ \t]*\Z', r"\1", field) for field in line.rstrip("\r\n").split(delimiter)]
