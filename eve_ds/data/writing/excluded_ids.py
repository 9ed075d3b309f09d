"""Lists of image ids that are left out, such as `ids.txt` of a test set."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from eve_ds import limits
from eve_ds.data.errors import SourceError
from eve_ds.data.formats.image_ids import listed_names
from eve_ds.data.formats.spelling import one_line
from eve_ds.data.formats.unread import refuse_binary
from eve_ds.reading import parse_json, read_file


class ExcludedIds(NamedTuple):
    """Lines of lists, each with the names of one image."""

    lines: frozenset[str]
    """Lines in the form of ids.txt: several names of an image have a tab between them."""
    by_name: dict[str, tuple[str, ...]]
    """Name as :func:`eve_ds.data.formats.image_ids.listed_names` gives it -> lines that can mean it."""

    def matching(self, names: Iterable[str]) -> set[str]:
        """Lines that mean an image with these names."""
        return {line for name in names for line in self.by_name.get(name, ())}


@cache
def read_ids(paths: tuple[str, ...]) -> ExcludedIds:
    """Read the ids of files with one image per line.

    Raises:
        SourceError: a file cannot be read, or is of a kind in which no id would be found: UTF-16, compressed, JSON.
    """
    lines = frozenset(line for path in paths for line in _read_list(path))
    by_name: dict[str, tuple[str, ...]] = {}
    for line in lines:
        for name in listed_names(line):
            by_name[name] = (*by_name.get(name, ()), line)
    return ExcludedIds(lines, by_name)


def _read_list(path: str) -> frozenset[str]:
    try:
        text = read_file(path, limits.ANNOTATION_BYTES).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise SourceError(f"cannot read the ids to exclude from {path}: {error.strerror}") from None
    refuse_binary(Path(path))
    if text.lstrip()[:1] in ("[", "{") and _is_json(text):
        raise SourceError(f"the ids to exclude from {path} are JSON: write one id a line, as in ids.txt")
    return frozenset("\t".join(filter(None, map(one_line, line.split("\t")))) for line in text.split("\n")) - {""}


def _is_json(text: str) -> bool:
    try:
        return isinstance(parse_json(text), list | dict)
    except ValueError:
        return False
