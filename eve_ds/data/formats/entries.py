"""JSON annotation files, and entries that know their file and number, so that each error is one line with its place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from eve_ds.data.errors import SourceError

Undecodable = Literal["refuse", "keep"]
"""Treatment of bytes that are not UTF-8: raise an error, or keep them as surrogates for the shard writer to count."""
MOST_KEYS = 8
"""Number of keys that a message lists."""


class Entry(NamedTuple):
    """One entry of an annotation file.

    Attributes:
        content: parsed JSON; every method raises :class:`SourceError` unless it is an object.
        where: file and number of the entry, which every message begins with.
    """

    content: Any
    where: str

    def error(self, problem: str) -> SourceError:
        """An error that names the place of the entry."""
        return SourceError(f"{self.where}: {problem}")

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a key, or the default."""
        if not isinstance(self.content, dict):
            raise self.error("must be an object")
        return self.content.get(key, default)

    def text(self, key: str) -> str:
        """Value of a key that must be a non-empty string or a whole number, as a string."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.error(f"{key} ({value!r}) must be a non-empty string or a whole number")
        return str(value)

    def file_name(self, key: str) -> str:
        """Value of a key that must be a non-empty string."""
        value = self.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(f"{key} ({value!r}) must be a non-empty string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Value of a key that must be a string or a list of strings; each may be empty."""
        value = self.get(key)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{key} ({value!r}) must be a string or a list of strings")
        return tuple(value)

    def label(self) -> bool | None:
        """Value of `label`, which must be true or false in any case of letters; None where it is absent or null."""
        value = self.get("label")
        known = {"true": True, "false": False}
        if value is None:
            return None
        if str(value).lower() not in known:
            raise self.error(f"label ({value!r}) must be true or false")
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


def read_json(path: Path, undecodable: Undecodable = "refuse") -> Any:
    """A JSON document, or the list of the documents of a file with one document a line.

    Raises:
        SourceError: the file cannot be read, is not UTF-8 (unless `undecodable` is "keep"), or is not JSON.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="strict" if undecodable == "refuse" else "surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"annotation file {path} cannot be read: {error}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as whole:
        try:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except json.JSONDecodeError:
            raise SourceError(f"annotation file {path} is not JSON: {whole}") from None


def described(tree: Any) -> str:
    """Form of a JSON document in words, for messages about one of another form."""
    if isinstance(tree, dict):
        return "an object with the keys " + (", ".join(list(tree)[:MOST_KEYS]) or "(none)")
    if isinstance(tree, list):
        return f"a list of {len(tree)}"
    return {str: "a string", bool: "a boolean", type(None): "null"}.get(type(tree), "a number")
