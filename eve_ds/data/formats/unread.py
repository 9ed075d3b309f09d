"""Recognizes annotations that are not read, so that a message says what a file is and what to do with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eve_ds import limits
from eve_ds.data.errors import SourceError
from eve_ds.data.failed_download import GIT_LFS, WEB_PAGE, failed_download
from eve_ds.reading import read_file

_LIST = 'write a table of image and caption, or [{"image": path, "caption": text}]'
_DOWNLOAD = "download the images with img2dataset, and give its output to `prepare.py img2dataset`"
_SAVE = "save it as UTF-8"
_FIRST_BYTES = {
    b"PAR1": ("Parquet, as LAION's lists", _DOWNLOAD),
    b"ARROW1": ("Arrow", _LIST),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save the sheet as CSV"),
    b"\x1f\x8b": ("compressed by gzip", "unpack it"),
    b"\xfd7zXZ": ("compressed by xz", "unpack it"),
    b"BZh": ("compressed by bzip2", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it"),
    b"\x89PNG": ("an image", "give the file of annotations"),
    b"\xff\xd8\xff": ("an image", "give the file of annotations"),
    b"\x80\x04": ("a pickle", _LIST),
    b"SQLite format 3": ("an SQLite database", _LIST),
    b"\x89HDF": ("HDF5", _LIST),
    b"\xff\xfe": ("UTF-16", _SAVE),
    b"\xfe\xff": ("UTF-16", _SAVE),
}
_DOWNLOAD_AGAIN = {GIT_LFS: "run `git lfs pull`", WEB_PAGE: "download the file again"}
_NUL = ("binary, or UTF-16 or UTF-32 without a byte order mark: it has NUL bytes", _SAVE)
_OBJECTS = {
    ("image_urls", "captions"): ("SBU captions", _DOWNLOAD),
    ("images", "annotations"): ("COCO annotations", _LIST),
    ("questions",): ("VQAv2 questions", "name it as `task.train.annotations` of a task"),
    ("annotations", "data_subtype"): ("VQAv2 annotations", "name it as `task.train.annotations` of a task"),
    ("image", "caption"): ("a table by columns, as pandas writes it", "write it with `orient='records'`"),
}
"""Keys of a JSON object -> name of the format, what to do."""
_ENTRIES = {
    ("regions",): ("Visual Genome region descriptions", _LIST),
    ("qas",): ("Visual Genome questions", _LIST),
    ("elems",): ("X-VLM region annotations (elems)", _LIST),
    ("conversations",): ("LLaVA conversations", _LIST),
    ("identifier", "sentence"): ("NLVR2", "name it as `task.train.annotations` of a task"),
    ("question", "answer"): ("questions of the released code", "name it as `task.train.annotations` of a task"),
    ("images", "sentence"): ("statements of the released code", "name it as `task.train.annotations` of a task"),
}
"""Keys of the first entry of a JSON list -> name of the format, what to do."""


def refuse_binary(path: Path) -> None:
    """Raise :class:`SourceError` for a file that is no text in UTF-8 by its first bytes, or cannot be read."""
    try:
        start = read_file(path, limits.MIB, size=4096)
    except OSError as error:
        raise SourceError(f"annotation file {path} cannot be read: {error.strerror or error}") from None
    found = binary_kind(start) or (_NUL if b"\0" in start else None)
    if found is not None:
        raise _not_read(path, *found)


def binary_kind(start: bytes) -> tuple[str, str] | None:
    """Name of a format, and what to do with a file of it, by the first bytes; None for those of no known format."""
    failed = failed_download(start)
    if failed is not None:
        return failed, _DOWNLOAD_AGAIN[failed]
    return next((kind for magic, kind in _FIRST_BYTES.items() if start.startswith(magic)), None)


def refuse_document(path: Path, tree: Any) -> None:
    """Raise :class:`SourceError` for a JSON document of a format that `prepare` recognizes and does not read."""
    if isinstance(tree, dict):
        # One entry, {"image": path, "caption": text}, is no table by columns, whose values are lists.
        known = {"image", "caption"} & {key for key, value in tree.items() if not isinstance(value, list | dict)}
        found = next((kind for keys, kind in _OBJECTS.items() if tree.keys() - known >= set(keys)), None)
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        known = {"image", "file_name"} & tree[0].keys() and {"caption", "text"} & tree[0].keys()
        found = None if known else next((kind for keys, kind in _ENTRIES.items() if tree[0].keys() >= set(keys)), None)
    else:
        found = None
    if found is not None:
        raise _not_read(path, *found)


def refuse_list_of_addresses(path: Path, fields: Sequence[str]) -> None:
    """Raise :class:`SourceError` for a table whose first line is data: a caption and the address of an image."""
    if any(field.startswith(("http://", "https://")) for field in fields):
        raise _not_read(path, "a list of captions and addresses without a header, as CC3M and CC12M publish", _DOWNLOAD)


def _not_read(path: Path, name: str, advice: str) -> SourceError:
    return SourceError(f"{path} is {name}; this is not read: {advice}")
