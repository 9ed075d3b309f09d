"""JSON annotation files, and entries that know their file and number, so that each error is one line with its place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from eve_ds import limits
from eve_ds.data.caption_text import clean_caption
from eve_ds.data.errors import SourceError
from eve_ds.data.formats.json_stream import read_tree, stream_json
from eve_ds.printable import excerpt

Undecodable = Literal["refuse", "keep"]
"""Treatment of bytes that are not UTF-8: raise an error, or keep them as surrogates for the shard writer to count."""
MOST_KEYS = 8
"""Number of keys that a message lists."""


class Entry(NamedTuple):
    """One entry of an annotation file.

    Attributes:
        content: parsed JSON; every method raises :class:`SourceError` unless it is an object.
        where: file and number of the entry, which every message begins with.
        problem: what is wrong with it, where a reader found something; empty otherwise.
    """

    content: Any
    where: str
    problem: str = ""

    def error(self, problem: str) -> SourceError:
        """An error that names the place of the entry."""
        return SourceError(f"{self.where}: {problem}")

    def malformed(self, error: SourceError) -> Entry:
        """The entry with the problem of an error of its own, or of a part of it."""
        return self._replace(problem=str(error).removeprefix(f"{self.where}: "))

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a key, or the default."""
        if not isinstance(self.content, dict):
            raise self.error("must be an object")
        return self.content.get(key, default)

    def has(self, key: str) -> bool:
        """Whether the entry has a key, also with null."""
        if not isinstance(self.content, dict):
            raise self.error("must be an object")
        return key in self.content

    def text(self, key: str) -> str:
        """Value of a key that must be a non-empty string or a whole number, as a string."""
        value = self.get(key)
        text = as_text(value)
        if not text:
            raise self.error(f"{key} ({shortened(value)}) must be a non-empty string or a whole number")
        return text

    def identity(self, key: str) -> str | None:
        """Value of a key with an id, as :meth:`text`; None where it is absent, null, NaN or empty."""
        value = self.get(key)
        return None if is_null(value) or value == "" else self.text(key)

    def file_name(self, key: str) -> str:
        """Value of a key that must be a non-empty string."""
        value = self.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(f"{key} ({shortened(value)}) must be a non-empty string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Value of a key that must be a string or a list of strings; each may be empty."""
        value = self.get(key)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{key} ({shortened(value)}) must be a string or a list of strings")
        return tuple(value)

    def captions(self, key: str) -> tuple[str, ...]:
        """Clean captions of a key that must be a string, null, or a list of these; "" for null and what is not seen.

        Empty for null in place of a list. NaN, which pandas writes for none, counts as null.
        """
        if not self.has(key):
            raise self.error(f"{key} is missing")
        value = self.get(key)
        values = () if is_null(value) else value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) or is_null(item) for item in values):
            raise self.error(f"{key} ({shortened(value)}) must be a string or a list of strings")
        return tuple("" if is_null(item) else clean_caption(item) for item in values)

    def label(self) -> bool | None:
        """Value of `label`, which must be true or false in any case of letters; None where it is absent or null."""
        value = self.get("label")
        known = {"true": True, "false": False}
        if value is None:
            return None
        if str(value).lower() not in known:
            raise self.error(f"label ({shortened(value)}) must be true or false")
        return known[str(value).lower()]


def numbered(contents: Iterable[Any], path: Path) -> list[Entry]:
    """Entries of one file, numbered from 0."""
    return [Entry(content, f"{path} entry {number}") for number, content in enumerate(contents)]


def list_entries(files: Iterable[Path]) -> Iterator[Entry]:
    """Entries of JSON lists or JSON lines, file by file; raises :class:`SourceError` for a file of another form."""
    for path in files:
        tree = read_json(path)
        if not isinstance(tree, list):
            raise SourceError(f"{path} must be a list of entries, not {described(tree)}")
        yield from numbered(tree, path)


def stream_entries(path: Path, key: str | None = None) -> Iterator[Entry]:
    """Entries of a list of any size, which the file is, or which is the value of a key of its outermost object.

    Bytes that are not UTF-8 are kept as surrogates for the shard writer to count.

    Raises:
        SourceError: see :func:`eve_ds.data.formats.json_stream.stream_json`.
    """
    values = (value for value in stream_json(path, keep_undecodable=True) if value.is_entry and value.key == key)
    return (Entry(value.content, f"{path} entry {number}") for number, value in enumerate(values))


def read_json(path: Path, undecodable: Undecodable = "refuse") -> Any:
    """A JSON document, or the list of the documents of a file with one document a line (always in `.jsonl`).

    Raises:
        SourceError: the file cannot be read, is not UTF-8 (unless `undecodable` is "keep"), is not JSON, or exceeds a
            cap of :mod:`eve_ds.limits`.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size > limits.ANNOTATION_BYTES:
        raise SourceError(
            f"annotation file {path} cannot be read: {size:,} bytes, more than the "
            f"{limits.ANNOTATION_BYTES:,} that are read"
        )
    return read_tree(path, undecodable == "keep")


def as_text(value: Any) -> str | None:
    """A string or a whole number as a string, None for anything else; 5.0 is 5, as pandas writes it beside a NaN."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def is_null(value: Any) -> bool:
    """Whether a value means "none": null, or NaN as pandas writes it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def shortened(value: Any) -> str:
    """A value of a file for a message, cut to `limits.MESSAGE_CHARACTERS`."""
    return excerpt(repr(value))


def described(tree: Any) -> str:
    """Form of a JSON document in words, for messages about one of another form; of a list, its first entry counts."""
    if isinstance(tree, dict):
        return "an object with the keys " + (", ".join(list(tree)[:MOST_KEYS]) or "(none)")
    if isinstance(tree, list):
        return f"a list of {described(tree[0])}" if tree else "an empty list"
    return {str: "a string", bool: "a boolean", type(None): "null"}.get(type(tree), "a number")
