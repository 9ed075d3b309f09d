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

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_NEXT_ADDRESS = re.compile(r"::(?=[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
"""What separates the addresses of one list; other double colons are parts of a host or a query."""
_IN_TEXT = r"(?:[^\s?#'\"]|['\"](?![\s'\"),.;:\]}]|$))"
"""Character of an address within a text: a quotation mark is one unless it ends a quotation."""
_USER_IN_TEXT = re.compile(rf"(?<![a-z0-9+.-])([a-z][a-z0-9+.-]*://)(?:(?:(?!/){_IN_TEXT})*@)?", re.IGNORECASE)
_QUERY_IN_TEXT = re.compile(
    rf"(?<![a-z0-9+.-])(https?://{_IN_TEXT}*)(?:[?#](?:(?:{_IN_TEXT}|[?#])*(?<![),.;:]))?)?", re.IGNORECASE
)
"""Address in group 1, and its query, which does not end with the punctuation of the sentence around it."""


def without_credentials(spec: str) -> str:
    """Return what names shards, a path, an address or a list `ADDRESS::ADDRESS`, without credentials.

    Each address loses its user and password; one of HTTP also its query, which may be a signature. Any character may
    stand in them, such as a space or a quotation mark. For addresses within a text see :func:`printable`.
    """
    return "::".join(map(_address_without_credentials, _NEXT_ADDRESS.split(spec)))


def _address_without_credentials(address: str) -> str:
    scheme = _SCHEME.match(address.lstrip())
    if scheme is None:
        return _redacted(address)
    rest = address.lstrip()[scheme.end() :]
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in host:
        rest = rest[host.rindex("@") + 1 :]
    elif "@" in rest and not re.fullmatch(r"[^:]*(:\d+)?|\[.*", host):  # a password with a slash, which must be encoded
        return f"{scheme[0]}..."
    is_http = scheme[1].lower() in ("http", "https")
    return scheme[0] + (re.split(r"[?#]", rest, maxsplit=1)[0] if is_http else rest)


def _redacted(text: str) -> str:
    """Text whose addresses have lost their credentials, as far as an address in a text has an end."""
    return _QUERY_IN_TEXT.sub(r"\1", _USER_IN_TEXT.sub(r"\1", text)) if "://" in text else text


def printable(text: str) -> str:
    """Return the text as one line; characters that could move the cursor, hide text or start a line are escaped.

    A line feed becomes the two characters `\\n`, an escape `\\x1b`, a right-to-left override `\\u202e`. Addresses lose
    their credentials.
    """
    text = _redacted(text)
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
