"""What a caption is: text with something to read. Imports no torch, which takes seconds.

`prepare`, training and the readers of published annotations clean captions here only, so that `prepare` writes no
caption that training refuses.
"""

from __future__ import annotations

import html
import re
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
_UNASSIGNED = "Cn"
"""Category of characters that are younger than Python's tables, such as new emoji, and of code points without use."""
_UNUSED = re.compile("[\u2065\ufdd0-\ufdef\ufff0-\ufff8\ufffe\uffff\U000e0000-\U000e0fff]")
"""Unassigned code points that no character will have ink at: noncharacters, and those that Unicode keeps invisible."""
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f\\Z")
"""Flag of a region, such as Scotland, at the end of a text: a black flag, the letters of the region, the cancel tag."""
_LONGEST_FLAG = 32
_JOINERS, _VIRAMA = "\u200c\u200d", 9
"""Joiners, and the combining class of the signs behind which they choose the form of a letter of Indic scripts."""
_BLANK_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols without ink: Hangul fillers and the empty Braille pattern."""


def clean_caption(text: str) -> str:
    """Remove what cannot be seen at both ends of a caption; the empty string if there is nothing to read.

    A joiner or a variation selector inside a caption is a part of its emoji or its script and stays; so do a joiner
    behind a virama and the tags of a flag at the end. Surrogates, which stand for bytes that are not UTF-8, stay until
    :func:`decode_caption` refuses them.
    """
    if not any(_is_readable(char) for char in text):
        return ""
    start, end = 0, len(text)
    while _is_edge(text[start]):
        start += 1
    while _is_edge(text[end - 1]) and not _ends_sign(text[max(end - _LONGEST_FLAG, 0) : end]):
        end -= 1
    return text[start:end]


def _is_readable(char: str) -> bool:
    category = unicodedata.category(char)
    if category[0] in _READABLE:
        return char not in _BLANK_LETTERS
    return category == _SURROGATE or _is_new(char)


def _is_edge(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] in _EDGES and category != _SURROGATE and not _is_new(char)


def _is_new(char: str) -> bool:
    """Whether a character may have ink, but is unknown to this Python, whose version must not change a caption."""
    unassigned = unicodedata.category(char) == _UNASSIGNED
    return unassigned and ord(char) & 0xFFFE != 0xFFFE and _UNUSED.match(char) is None


def _ends_sign(text: str) -> bool:
    """Whether the invisible character at the end of a text belongs to the sign before it."""
    if text[-1] in _JOINERS:
        return len(text) > 1 and unicodedata.combining(text[-2]) == _VIRAMA
    return text[-1] == "\U000e007f" and _FLAG.search(text) is not None


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
