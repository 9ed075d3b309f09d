"""What a caption is: text with something to read. Imports no torch, which takes seconds.

`prepare`, training and the readers of published annotations clean captions here only, so that `prepare` writes no
caption that training refuses.
"""

from __future__ import annotations

import html
import unicodedata

from eve_ds import limits
from eve_ds.data.errors import BadSample

ABSENT_CELLS = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"]
) | {"NULL", "NaN", "None", "n/a", "nan", "null", "NaT"}
"""Cells of a CSV or TSV table that mean "none": those that `pandas.read_csv` reads as missing, and its missing time."""
_READABLE = "LNPS"
"""Unicode categories of characters to read: letters, numbers, punctuation, symbols."""
_EDGES = "CZ"
"""Unicode categories that are removed at both ends: control and format characters, among them the byte order mark and
zero-width spaces, and white space."""
_SURROGATE = "Cs"
_BLANK_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols without ink: Hangul fillers and the empty Braille pattern."""


def clean_caption(text: str) -> str:
    """Remove what cannot be seen at both ends of a caption; the empty string if there is nothing to read.

    A joiner or a variation selector inside a caption is a part of its emoji or its script and stays. So do surrogates,
    which stand for bytes that are not UTF-8, until :func:`decode_caption` refuses them.
    """
    if not any(_is_readable(char) for char in text):
        return ""
    start, end = 0, len(text)
    while _is_edge(text[start]):
        start += 1
    while _is_edge(text[end - 1]):
        end -= 1
    return text[start:end]


def _is_readable(char: str) -> bool:
    category = unicodedata.category(char)
    return (category[0] in _READABLE and char not in _BLANK_LETTERS) or category == _SURROGATE


def _is_edge(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] in _EDGES and category != _SURROGATE


def decode_caption(caption: str | bytes, unescape_html: bool = False) -> str:
    """Clean a caption of a source, as `prepare` writes it.

    Args:
        caption: text, in which surrogates stand for bytes that are not UTF-8, or bytes.
        unescape_html: whether to replace HTML entities, such as `&amp;`, by their characters.

    Raises:
        BadSample: the caption is not UTF-8, empty, or longer than `limits.CAPTION_CHARACTERS`.
    """
    try:
        text = caption.decode("utf-8") if isinstance(caption, bytes) else caption
        text.encode("utf-8")
    except UnicodeError:
        raise BadSample("caption is not UTF-8") from None
    text = clean_caption(html.unescape(text) if unescape_html else text)
    if not text:
        raise BadSample("empty caption")
    if len(text) > limits.CAPTION_CHARACTERS:
        raise BadSample(f"caption longer than {limits.CAPTION_CHARACTERS:,} characters")
    return text
