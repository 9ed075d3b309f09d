"""Lists of image ids that are left out, such as `ids.txt` of a test set."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path

from eve_ds import limits
from eve_ds.data.errors import SourceError
from eve_ds.data.formats.unread import refuse_binary
from eve_ds.reading import parse_json, read_file

_LONE_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


@cache
def read_ids(paths: tuple[str, ...]) -> frozenset[str]:
    """Read the IDs of files with one per line.

    Raises:
        SourceError: a file cannot be read, or is of a kind in which no ID would be found: UTF-16, compressed, JSON.
    """
    return frozenset(name for path in paths for name in _read_list(path))


def _read_list(path: str) -> frozenset[str]:
    try:
        text = read_file(path, limits.ANNOTATION_BYTES).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise SourceError(f"cannot read the ids to exclude from {path}: {error.strerror}") from None
    refuse_binary(Path(path))
    if text.lstrip()[:1] in ("[", "{") and _is_json(text):
        raise SourceError(f"the ids to exclude from {path} are JSON: write one id a line, as in ids.txt")
    return frozenset(one_line(line) for line in text.split("\n")) - {""}


def _is_json(text: str) -> bool:
    try:
        return isinstance(parse_json(text), list | dict)
    except ValueError:
        return False


def one_line(image_id: str) -> str:
    """Return an image id in the form of ids.txt, in which ids are compared.

    Whitespace becomes single spaces, and a surrogate that stands for no byte the replacement character. Accents are
    parts of their letters (NFC): macOS writes them apart in names of files.
    """
    return _LONE_SURROGATE.sub("\ufffd", unicodedata.normalize("NFC", " ".join(image_id.split())))
