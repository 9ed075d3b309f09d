"""Meaning of one cell of a table: no value, captions, the name or the address of an image."""

from __future__ import annotations

import re
from typing import Any

from eve_ds.data.caption_text import ABSENT_CELLS, clean_caption
from eve_ds.data.formats.entries import is_null
from eve_ds.data.image_file import IMAGE_EXTENSIONS
from eve_ds.reading import parse_json

_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_NAME = re.compile(rf"(?P<name>[^\r\n]*\.(?:{'|'.join(IMAGE_EXTENSIONS)}))(?P<number>(?:#\w+)*)", re.IGNORECASE)
_ESCAPE = r"""\\(?:[\\'"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4})"""
"""Escape that Python and numpy write in a text."""
_SIGNS = {"n": "\n", "r": "\r", "t": "\t"}
_TEXT = rf"""(?:'(?:[^'\\]|{_ESCAPE})*+'|"(?:[^"\\]|{_ESCAPE})*+")"""
_ITEM = re.compile(rf"{_TEXT}|None|nan", re.DOTALL)
_LIST = re.compile(rf"\[\s*(?:(?:{_TEXT}|None|nan)\s*+(?:,\s*+)?)++\]", re.DOTALL)
"""List of texts as Python writes it, and as numpy does, which puts no commas."""
_JSON_START = re.compile(r'\s*(?:\{\s*(?:["}]|\Z)|\[\s*(?:[{\["\]]|\Z))')
_OBJECTS = re.compile(r"\[\s*\{.*\}\s*\]", re.DOTALL)


def is_absent(cell: str) -> bool:
    """Whether a cell means "none"; see :data:`eve_ds.data.caption_text.ABSENT_CELLS`."""
    return cell.strip() in ABSENT_CELLS


def is_web_address(cell: str) -> bool:
    """Whether a cell is an address of HTTP."""
    return _ADDRESS.match(cell.lstrip()) is not None


def starts_json(cell: str) -> bool:
    """Whether the first cell of a file begins a JSON list or object; a caption may begin with a bracket too."""
    return _JSON_START.match(cell) is not None


def names_image(cell: str) -> bool:
    """Whether a cell looks like the file or the address of an image."""
    return is_web_address(cell) or _NAME.fullmatch(cell) is not None


def image_name(cell: str) -> str:
    """Path of an image without white space around it, and without the number of a caption: `1.jpg#0` is 1.jpg.

    Flickr8k and Flickr30K write the number. Addresses keep what stands behind `#`.
    """
    cell = cell.strip()
    numbered = None if is_web_address(cell) else _NAME.fullmatch(cell)
    return cell if numbered is None else numbered["name"]


def is_numbered_image(cell: str) -> bool:
    """Whether a cell is the file of an image with the number of a caption: `1.jpg#0`."""
    found = _NAME.fullmatch(cell)
    return found is not None and found["number"] != "" and not is_web_address(cell)


def captions_of(cell: str) -> tuple[str, ...] | None:
    """Captions of a cell: those of a list of texts, as JSON or as Python writes it, or the text itself.

    As in JSON, a null in a list is the caption "". None for a list of numbers or objects, which is no caption.
    """
    text = cell.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return (cell,)
    items = _json_items(text)
    items = _python_texts(text) if items is None else items
    if items is None:
        return None if _OBJECTS.fullmatch(text) else (cell,)
    texts = ["" if is_null(item) else item for item in items]
    return tuple(map(clean_caption, texts)) if all(isinstance(text, str) for text in texts) else None


def _json_items(text: str) -> list[Any] | None:
    try:
        return list(parse_json(text))
    except ValueError:
        return None


def _python_texts(text: str) -> list[Any] | None:
    if _LIST.fullmatch(text) is None:
        return None
    items = _ITEM.findall(text[1:-1])
    return [None if item in ("None", "nan") else re.sub(_ESCAPE, _unescaped, item[1:-1]) for item in items]


def _unescaped(found: re.Match[str]) -> str:
    sign, digits = found[0][1], found[0][2:]
    return chr(int(digits, 16)) if digits else _SIGNS.get(sign, sign)
