"""Which rows of a table, or entries of JSON, are taken: those whose columns have one of the named values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eve_ds.data.errors import SourceError
from eve_ds.data.formats.entries import Entry, as_text, is_null
from eve_ds.printable import excerpt

_MOST_VALUES = 1000
"""Number of different values of a column that are counted for a message."""


class Where(NamedTuple):
    """Conditions of `--where COLUMN=VALUE`: every column must have one of its values. Without any, all rows hold."""

    values: Mapping[str, frozenset[str]] = {}

    @classmethod
    def of(cls, conditions: Iterable[tuple[str, str]]) -> Where:
        """Conditions from pairs of column and value; values of one column are alternatives."""
        found: dict[str, frozenset[str]] = {}
        for column, value in conditions:
            found[column] = found.get(column, frozenset()) | {value.strip()}
        return cls(found)

    def description(self) -> dict[str, Any]:
        """The conditions for JSON; empty without any, so that earlier descriptions stay equal."""
        return {"where": {column: sorted(values) for column, values in self.values.items()}} if self.values else {}

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the values; numbers and booleans count as their text, null as the empty text."""
        return all(not wanted.isdisjoint(_texts(row.get(column))) for column, wanted in self.values.items())

    def taken(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Entries that have the values, and those that are no objects, which the reader of records judges."""
        return (entry for entry in entries if not isinstance(entry.content, dict) or self.holds(entry.content))

    def require_columns(self, header: Sequence[str], path: Path) -> None:
        """Raise :class:`SourceError` for a column that a table lacks."""
        for column in self.values:
            if column not in header:
                raise SourceError(f"{path} has no column '{column}' for --where; it has: {excerpt(', '.join(header))}")

    def require_values(self, rows: Iterable[Mapping[str, Any]], path: Path) -> None:
        """Raise :class:`SourceError` for a value that no row has, with the values of the column.

        Args:
            rows: rows of all files; no more are read than it takes to find each value.
            path: the first file, for the message.
        """
        if not self.values:
            return
        found: dict[str, Counter[str]] = {column: Counter() for column in self.values}
        missing = {(column, value) for column, values in self.values.items() for value in values}
        for row in rows:
            for column, counter in found.items():
                texts = _texts(row.get(column))
                missing -= {(column, text) for text in texts}
                if len(counter) < _MOST_VALUES:
                    counter[texts[0]] += 1
            if not missing:
                return
        column, value = min(missing)
        have = ", ".join(f"{text or '(nothing)'} ({count:,})" for text, count in found[column].most_common())
        raise SourceError(f"{path} has no row with {column}={value}; it has: {excerpt(have) or 'no rows'}")


EVERY_ROW = Where()


def _texts(value: Any) -> tuple[str, ...]:
    """Texts by which a condition may call a value, the usual one first."""
    if is_null(value):
        return ("",)
    if isinstance(value, bool):
        return str(value).lower(), str(value)
    text = (as_text(value) or str(value)).strip()
    return (text, text[:-2]) if re.fullmatch(r"-?[0-9]+\.0", text) else (text,)
