"""Text of unknown origin, such as keys and names of files, made safe for a terminal and a log."""

from __future__ import annotations

import re
import unicodedata

from eve_ds import limits

_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories: controls (escape sequences, line feeds), formats (writing direction, invisible marks), surrogates
(bytes of a file name that are no UTF-8), separators of lines and paragraphs."""
_MARKUP = re.compile(r"[\\`*{}\[\]<>#|!&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""Characters with a meaning in Markdown; an underscore within a word has none."""


def printable(text: str) -> str:
    """Return the text as one line; characters that could move the cursor, hide text or start a line are escaped.

    A line feed becomes the two characters `\\n`, an escape `\\x1b`, a right-to-left override `\\u202e`.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(char) if unicodedata.category(char) in _ESCAPED else char for char in text)


def _escape(char: str) -> str:
    return repr(char)[1:-1]


def markdown(text: str) -> str:
    """Return the text as one line of Markdown that shows it as it is: no markup, link, HTML or end of a table cell."""
    return _MARKUP.sub(r"\\\g<0>", printable(text))


def excerpt(text: str) -> str:
    """Return the text, cut to `limits.MESSAGE_CHARACTERS` for a message."""
    return text if len(text) <= limits.MESSAGE_CHARACTERS else f"{text[: limits.MESSAGE_CHARACTERS]} ..."
