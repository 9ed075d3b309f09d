"""Spelling of ids, paths and addresses of images, so that those of one thing are equal."""

from __future__ import annotations

import re
import unicodedata

from eve_ds.data.image_file import IMAGE_EXTENSIONS

_LONE_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_HOST = re.compile(r"https?://(?P<host>[^/?#]*)", re.IGNORECASE)
_IMAGE_SUFFIX = re.compile(rf"\.(?:{'|'.join(IMAGE_EXTENSIONS)})\Z", re.IGNORECASE)
_WHOLE = re.compile(r"(?P<number>-?[0-9]+)\.0+")
_NUMBER = re.compile(r"[0-9]+")


def one_line(text: str) -> str:
    """Return an id, path or address in the form of ids.txt, in which they are compared.

    Whitespace becomes single spaces, and a surrogate that stands for no byte the replacement character. Accents are
    parts of their letters (NFC): macOS writes them apart in names of files.
    """
    return _LONE_SURROGATE.sub("\ufffd", unicodedata.normalize("NFC", " ".join(text.split())))


def whole_number(text: str) -> str:
    """A number such as `9.0`, which pandas writes for 9 beside a missing one, as `9`; any other text as it is."""
    found = _WHOLE.fullmatch(text)
    return found["number"] if found else text


def is_number(text: str) -> bool:
    """Whether an id is a number, which says nothing without the data set that it is of."""
    return _NUMBER.fullmatch(text) is not None


def is_plain_number(text: str) -> bool:
    """Whether a text is a number without zeros in front, as data sets number their images."""
    return is_number(text) and without_zeros(text) == text


def is_address(text: str) -> bool:
    """Whether a text starts as an address does."""
    return _ADDRESS.match(text) is not None


def normal_path(path: str) -> str:
    """The one spelling of a path: slashes, no empty part, no `.` beside others, no `..` behind a folder.

    A path of Windows has backslashes. Addresses stay as they are.
    """
    if is_address(path):
        return path
    path = path.replace("\\", "/")
    parts: list[str] = []
    for part in path.split("/"):
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/" * path.startswith("/") + "/".join(parts) or "."


def is_image_name(path: str) -> bool:
    """Whether a path ends with the suffix of an image."""
    return _IMAGE_SUFFIX.search(path) is not None


def without_suffix(path: str) -> str:
    """A path without the suffix of an image."""
    return _IMAGE_SUFFIX.sub("", path)


def normal_address(address: str) -> str:
    """The one spelling of an address: host in lower case, no fragment; http and https are one."""
    found = _HOST.match(address)
    return f"http://{found['host'].lower()}{address[found.end() :]}".partition("#")[0] if found else address


def without_zeros(number: str) -> str:
    """A number without zeros in front."""
    return number.lstrip("0") or "0"
