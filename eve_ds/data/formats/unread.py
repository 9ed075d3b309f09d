"""Recognizes annotations that a reader does not take, so that a message says what a file is and what to do with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eve_ds import limits
from eve_ds.data.errors import SourceError
from eve_ds.data.failed_download import GIT_LFS, WEB_PAGE, failed_download
from eve_ds.reading import read_file

_LIST = 'write a table of image and caption, or [{"image": path, "caption": text}]'
_Kinds = Mapping[tuple[str, ...], tuple[str, str]]
_LEADING = ("image", "caption")
"""Keys of an entry with one image and one caption."""
_SAVE = "save it as UTF-8"
_FIRST_BYTES = {
    b"PAR1": ("Parquet", "give it to `prepare.py table`, or a list of addresses to `prepare.py urls`"),
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
    ("questions",): ("VQAv2 questions", "name it as `task.train.annotations` of a task"),
    ("annotations", "data_subtype"): ("VQAv2 annotations", "name it as `task.train.annotations` of a task"),
    ("image", "caption"): ("a table by columns, as pandas writes it", "write it with `orient='records'`"),
}
"""Keys of a JSON object -> name of the format, what to do."""
_OBJECTS_READ = {
    ("image_urls", "captions"): ("SBU captions", "urls"),
    ("images", "annotations"): ("COCO annotations", "coco"),
    ("images",): ("a list of images with splits, as Karpathy's", "karpathy"),
}
"""Keys of a JSON object -> name of the format, command of `prepare` that reads it."""
_ENTRIES = {
    ("identifier", "structured_rep"): ("NLVR 1.0", "give the folder that holds it and images/ to `prepare.py nlvr`"),
    ("qas",): ("Visual Genome questions", _LIST),
    ("conversations",): ("LLaVA conversations", _LIST),
    ("identifier", "sentence"): ("NLVR2", "name it as `task.train.annotations` of a task"),
    ("question", "answer"): ("questions of the released code", "name it as `task.train.annotations` of a task"),
    ("images", "sentence"): ("statements of the released code", "name it as `task.train.annotations` of a task"),
}
"""Keys of the first entry of a JSON list -> name of the format, what to do."""
_ENTRIES_READ = {
    ("regions",): ("Visual Genome region descriptions", "visual_genome"),
    ("url", "caption"): ("a list of addresses and captions", "urls"),
    ("image", "caption"): ("a list of images and captions", "json"),
    ("image", "elems"): ("X-VLM region annotations (elems)", "json"),
}
"""Keys of the first entry of a JSON list -> name of the format, command of `prepare` that reads it."""


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


def refuse_document(path: Path, tree: Any, command: str) -> None:
    """Raise :class:`SourceError` for a JSON document of a known format that a command of `prepare` does not read."""
    kind = _kind(tree)
    if kind is not None:
        raise _not_read(path, *kind)
    other = _first_match(tree, _OBJECTS_READ, _ENTRIES_READ)
    if other is not None and other[1] != command:
        raise SourceError(f"{path} is {other[0]}: give it to `prepare.py {other[1]}`")


def _kind(tree: Any) -> tuple[str, str] | None:
    if isinstance(tree, dict):
        # One entry, {"image": path, "caption": text}, is no table by columns, whose values are lists.
        tree = {key: value for key, value in tree.items() if isinstance(value, list | dict) or key not in _LEADING}
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        known = {"image", "file_name"} & tree[0].keys() and {"caption", "text"} & tree[0].keys()
        tree = None if known else tree
    return _first_match(tree, _OBJECTS, _ENTRIES)


def _first_match(tree: Any, objects: _Kinds, entries: _Kinds) -> tuple[str, str] | None:
    """Kind of a JSON object by its keys, or of a list by those of its first entry."""
    first = tree[0] if isinstance(tree, list) and tree else tree
    if not isinstance(first, dict):
        return None
    kinds = objects if first is tree else entries
    return next((kind for keys, kind in kinds.items() if first.keys() >= set(keys)), None)


def _not_read(path: Path, name: str, advice: str) -> SourceError:
    return SourceError(f"{path} is {name}; this is not read: {advice}")
