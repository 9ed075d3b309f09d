"""Values of a large JSON file one by one: entries of a list, of lists in an object, or of JSON lines.

Only one entry is in memory, so that a file may be larger than it. `ijson` does the same, but refuses NaN, which pandas
and Python write, and captions that are not UTF-8, which are kept here for the shard writer to count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from eve_ds import limits
from eve_ds.data.errors import SourceError
from eve_ds.data.formats.unread import refuse_binary
from eve_ds.printable import excerpt
from eve_ds.reading import parse_json_at

LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
"""Suffixes of files with one JSON document a line."""
CHUNK_CHARACTERS = 2**20
"""Characters to read at a time."""
_NO_SPACE = re.compile(r"[^ \t\n\r]")
_ENDS = (*" \t\n\r,:]}",)
"""Characters behind a value."""
_LONGEST_WORD = 16
"""Characters of the longest literal or escape that the end of the read text may cut."""


class Value(NamedTuple):
    """A value of a JSON file; a list whose entries follow, and the outermost object, come first as an empty one.

    Attributes:
        key: key of the outermost object; None where the file is a list, lines, or any other value.
        content: an entry of the list of that key or of the file, or the value of that key if it is no list.
        is_entry: whether the content is an entry of a list, or a line.
    """

    key: str | None
    content: Any
    is_entry: bool


def stream_json(path: Path, keep_undecodable: bool = False) -> Iterator[Value]:
    """Yield the values of a file in their order.

    Args:
        path: a JSON document, or one document a line.
        keep_undecodable: whether bytes that are not UTF-8 become surrogates, instead of an error.

    Raises:
        SourceError: the file cannot be read, is not UTF-8, is not JSON, or exceeds a cap of :mod:`eve_ds.limits`.
    """
    refuse_binary(path)
    window = None
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape" if keep_undecodable else "strict") as file:
            window = _Window(file)
            yield from _lines(window) if _has_lines(path, window) else _document(window)
    except OSError as error:
        raise SourceError(f"annotation file {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"annotation file {path} cannot be read: {error}") from None
    except SourceError:  # one of the errors below
        raise
    except ValueError as error:
        raise SourceError(f"annotation file {path} is not JSON: {_reason(error, window)}") from None


class Outline(NamedTuple):
    """Form of a JSON file.

    Attributes:
        tree: the document with the first entry of each list only.
        counts: number of entries of each list by its key; None: of the list that the file is.
    """

    tree: Any
    counts: dict[str | None, int]


def read_outline(path: Path, keep_undecodable: bool = False) -> Outline:
    """Read a whole file, so that one which is not JSON is refused before its first entry is used.

    Raises:
        SourceError: see :func:`stream_json`.
    """
    tree: Any = None
    counts: dict[str | None, int] = {}
    for value in stream_json(path, keep_undecodable):
        if value.is_entry:
            counts[value.key] = counts.get(value.key, 0) + 1
        if not value.is_entry or counts[value.key] == 1:
            tree = _with(tree, value)
    return Outline(tree, counts)


def read_tree(path: Path, keep_undecodable: bool = False) -> Any:
    """Read a whole file into memory; lines become a list. Raises :class:`SourceError`, see :func:`stream_json`."""
    tree: Any = None
    for value in stream_json(path, keep_undecodable):
        tree = _with(tree, value)
    return tree


def _with(tree: Any, value: Value) -> Any:
    """Add a value to its document."""
    if value.is_entry:
        (tree if value.key is None else tree[value.key]).append(value.content)
    elif value.key is None:
        return value.content
    else:
        tree[value.key] = value.content
    return tree


class _Window:
    """Part of a text file in memory, from the place of reading."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._at, self._ended = "", 0, False
        self._first_line, self._before, self._dropped = 1, 0, 0  # characters before the text in its first line

    def next_sign(self) -> str:
        """The next character that is no white space, where reading goes on; empty at the end of the file."""
        while (found := _NO_SPACE.search(self._text, self._at)) is None:
            if self._ended:
                return ""
            self._at = len(self._text)
            self._read_more()
        self._at = found.start()
        return self._text[self._at]

    def take(self, sign: str) -> None:
        """Go on behind a character that must come next."""
        if self.next_sign() != sign:
            raise json.JSONDecodeError(f"Expecting {sign!r}", self._text, self._at)
        self._at += 1

    def document(self) -> Any:
        """Parse the next value and go on behind it; raises ValueError."""
        self.next_sign()
        while True:
            try:
                tree, end = parse_json_at(self._text, self._at)
                if self._ended or not self._may_go_on(end):
                    self._at = end
                    return tree
            except json.JSONDecodeError as error:
                if self._ended or not self._is_cut(error):
                    raise
            if len(self._text) - self._at > limits.JSON_ENTRY_CHARACTERS:
                raise ValueError(f"an entry has more than {limits.JSON_ENTRY_CHARACTERS:,} characters")
            self._read_more()

    def first_of_lines(self) -> bool:
        """Whether the first line is an object, and another document follows."""
        if self.next_sign() != "{":
            return False
        while self._text.find("\n", self._at) < 0 and not self._ended and len(self._text) < limits.METADATA_BYTES:
            self._read_more()
        line = self._text[self._at :].partition("\n")[0]
        try:
            end = self._at + parse_json_at(line, 0)[1]
        except ValueError:
            return False
        while (found := _NO_SPACE.search(self._text, end)) is None and not self._ended:
            self._read_more()
            end -= self._dropped
        return found is not None and found.start() >= self._at + len(line)

    def end(self) -> None:
        """Raise ValueError unless only white space is left."""
        if self.next_sign():
            raise json.JSONDecodeError("Extra data", self._text, self._at)

    def place(self, at: int | None = None) -> str:
        """Line and character of a place in the read part, from 1, by default that of reading."""
        end = self._at if at is None else at
        end = len(self._text.rstrip()) if not self._text[end:].strip() else end  # of a cut file, its last line
        line = self._first_line + self._text.count("\n", 0, end)
        return f"line {line}, character {self._column(end)}"

    def _column(self, at: int) -> int:
        """Number of the character in its line, from 1."""
        start = self._text.rfind("\n", 0, at)
        return at - start if start >= 0 else self._before + at + 1

    def _may_go_on(self, end: int) -> bool:
        """Whether a document that ends there is the start of another, as -0 is that of -0.5e3."""
        return self._text[end : end + 1] not in _ENDS and end >= len(self._text) - _LONGEST_WORD

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether a document may have failed because the read text ends in it."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_WORD

    def _read_more(self) -> None:
        """Read as many characters as are left, so that the parsing of an entry starts again a few times only."""
        self._first_line += self._text.count("\n", 0, self._at)
        self._before = self._column(self._at) - 1
        rest = self._text[self._at :]
        more = self._file.read(max(CHUNK_CHARACTERS, len(rest)))
        self._text, self._at, self._dropped, self._ended = rest + more, 0, self._at, not more


def _has_lines(path: Path, window: _Window) -> bool:
    return path.suffix.lower() in LINE_SUFFIXES or window.first_of_lines()


def _lines(window: _Window) -> Iterator[Value]:
    yield Value(None, [], False)
    while window.next_sign():
        yield Value(None, window.document(), True)


def _document(window: _Window) -> Iterator[Value]:
    sign = window.next_sign()
    if sign == "[":
        yield from _entries(window, None)
    elif sign == "{":
        yield from _object(window)
    else:
        yield Value(None, window.document(), False)
    window.end()


def _object(window: _Window) -> Iterator[Value]:
    window.take("{")
    yield Value(None, {}, False)
    more = window.next_sign() != "}"
    while more:
        key = window.document()
        if not isinstance(key, str):
            raise ValueError(f"{excerpt(repr(key))} stands where a key should be")
        window.take(":")
        if window.next_sign() == "[":
            yield from _entries(window, key)
        else:
            yield Value(key, window.document(), False)
        more = window.next_sign() == ","
        if more:
            window.take(",")
    window.take("}")


def _entries(window: _Window, key: str | None) -> Iterator[Value]:
    window.take("[")
    yield Value(key, [], False)
    more = window.next_sign() != "]"
    while more:
        yield Value(key, window.document(), True)
        more = window.next_sign() == ","
        if more:
            window.take(",")
    window.take("]")


def _reason(error: ValueError, window: _Window | None) -> str:
    """Text of an error with the line and the character."""
    text, at = (error.msg, error.pos) if isinstance(error, json.JSONDecodeError) else (str(error), None)
    return text if window is None else f"{text}: {window.place(at)}"
