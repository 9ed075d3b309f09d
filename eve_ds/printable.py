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

_USER = re.compile(r"(?<![a-z0-9+.-])([a-z][a-z0-9+.-]*://)(?:[^\s/?#'\"]*@)?", re.IGNORECASE)
_QUERY = re.compile(r"(?<![a-z0-9+.-])(https?://[^\s?#'\"]*)(?:[?#](?:[^\s'\"]*[^\s'\"),.;:])?)?", re.IGNORECASE)
"""Address in group 1, and its query, which does not end with the punctuation of the sentence around it."""


def without_credentials(text: str) -> str:
    """Return the text with each address in it, such as `https://user:password@host/a.tar?signature`, without the user
    and the password, and without the query, which may be a signature."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text)) if "://" in text else text


def printable(text: str) -> str:
    """Return the text as one line; characters that could move the cursor, hide text or start a line are escaped.

    A line feed becomes the two characters `\\n`, an escape `\\x1b`, a right-to-left override `\\u202e`. Addresses lose
    their credentials.
    """
    text = without_credentials(text)
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
