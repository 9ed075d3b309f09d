"""Columns of the metadata of Hugging Face's image folders: `metadata.jsonl`, `metadata.csv`, `metadata.parquet`.

`file_name` holds the path of an image, or a column `NAME_file_name`, which `datasets` loads as the image NAME. Columns
of lists (`file_names`, `NAME_file_names`) are refused. https://huggingface.co/docs/datasets/image_dataset
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from eve_ds.data.errors import SourceError
from eve_ds.data.formats.delimited import first_fields
from eve_ds.data.formats.entries import stream_entries
from eve_ds.data.formats.parquet import SUFFIX, column_names
from eve_ds.data.formats.tables import Columns, default_delimiter
from eve_ds.data.formats.where import EVERY_ROW, Where
from eve_ds.printable import excerpt

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE, IMAGE_FILE, CAPTIONS = "file_name", "image_file_name", ("text", "caption")
READ_LINES = 1000
"""Lines of JSON whose keys are the columns."""


def metadata_columns(
    path: Path, caption_column: str | None = None, image_column: str | None = None, where: Where = EVERY_ROW
) -> Columns:
    """Columns of the image and the caption, and which rows to take.

    Args:
        path: a file with one of NAMES.
        caption_column: name of the column of captions; None: `text`, or `caption`.
        image_column: name of the column of paths; None: `file_name` or `NAME_file_name`.
        where: which rows to take.

    Raises:
        SourceError: the file cannot be read, lacks a column, or has several of images; an empty file passes.
    """
    captions = CAPTIONS if caption_column is None else (caption_column,)
    header = _header(path)
    if not header:
        return Columns(image_column or FILE, captions, where=where)
    image = image_column or _file_column(header, path)
    if image not in header:
        raise SourceError(f"{path} has no column '{image}'; it has: {excerpt(', '.join(header))}")
    if not {*captions} & {*header}:
        names = " or ".join(f"'{name}'" for name in captions)
        raise SourceError(
            f"{path} has no column {names}; it has: {excerpt(', '.join(header))}: name the column of the captions with "
            "--caption_column"
        )
    where.require_columns(header, path)
    return Columns(image, captions, where=where)


def _header(path: Path) -> list[str]:
    if path.suffix == SUFFIX:
        return column_names(path)
    if path.suffix == ".csv":
        return first_fields(path, default_delimiter(path)) or []
    entries = (entry.content for entry in islice(stream_entries(path), READ_LINES))
    return list(dict.fromkeys(key for content in entries if isinstance(content, dict) for key in content))


def _file_column(header: Sequence[str], path: Path) -> str:
    files = [name for name in header if name == FILE or name.endswith(f"_{FILE}")]
    lists = [name for name in header if name == f"{FILE}s" or name.endswith(f"_{FILE}s")]
    known = next((name for name in (FILE, IMAGE_FILE) if name in files), None)
    if known is not None or len(files) == 1:
        return known or files[0]
    if files:
        raise SourceError(
            f"{path} has several columns of files ({excerpt(', '.join(files))}): choose one with --image_column"
        )
    if lists:
        raise SourceError(
            f"{path} has lists of files ({excerpt(', '.join(lists))}), and a caption of several images is not read: "
            f"write a row with {FILE} for each image"
        )
    raise SourceError(f"{path} has no column '{FILE}' or 'NAME_{FILE}'; it has: {excerpt(', '.join(header))}")
