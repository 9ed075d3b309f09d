"""JSON lists of the released code of ALBEF, X-VLM and EVE: captions, questions, and statements about images.

Captions: `[{image, caption, image_id}]`; `caption` is a text or a list, `image_id` may be absent. The names of Hugging
Face's `metadata.jsonl`, `file_name` and `text`, are read as well.
Questions: `[{image, question, question_id, answer, question_type}]`; `answer` is a text or one text per annotator,
absent in a test set.
Statements: `[{images: [left, right], sentence, label}]`; `label` is absent in a test set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from eve_ds.data.errors import SourceError
from eve_ds.data.formats.entries import Entry, described
from eve_ds.data.formats.unread import refuse_document


class CaptionedImage(NamedTuple):
    """One image with one or more captions; several entries may describe the same image."""

    entry: Entry
    image: str
    """Path below the image folder."""
    captions: tuple[str, ...]
    """Captions; the tuple and each caption may be empty."""
    image_id: str | None
    """Id of the image; None if the entry has none."""


class Question(NamedTuple):
    """One question about one image."""

    question_id: str
    image: str
    """Path below the image folder."""
    question: str
    question_type: str
    """Empty where the entry has none."""
    answers: tuple[str, ...]
    """One per annotator; empty in a test set."""


class Statement(NamedTuple):
    """One statement about images."""

    images: tuple[str, ...]
    """Paths below the image folder, left to right."""
    sentence: str
    label: bool | None
    """Whether the statement is true; None in a test set."""


def captioned_image(entry: Entry) -> CaptionedImage:
    """Record of an entry with captions; raises :class:`SourceError` for a field that is missing or malformed."""
    image = "file_name" if entry.has("file_name") and not entry.has("image") else "image"
    caption = "text" if entry.has("text") and not entry.has("caption") else "caption"
    return CaptionedImage(entry, entry.file_name(image), entry.captions(caption), entry.identity("image_id"))


def question(entry: Entry) -> Question:
    """Record of an entry with a question; raises :class:`SourceError` for a field that is missing or malformed."""
    return Question(
        question_id=entry.text("question_id"),
        image=entry.file_name("image"),
        question=entry.text("question"),
        question_type=str(entry.get("question_type") or ""),
        answers=entry.texts("answer") if entry.get("answer") is not None else (),
    )


def statement(entry: Entry) -> Statement:
    """Record of an entry with a statement; raises :class:`SourceError` for a field that is missing or malformed."""
    return Statement(entry.texts("images"), entry.text("sentence"), entry.label())


def require_captions(tree: Any, path: Path) -> None:
    """Raise :class:`SourceError` unless the document is a list with some entry that has an image and captions."""
    if isinstance(tree, list) and any(_has_captions(Entry(item, str(path))) for item in tree):
        return
    refuse_document(path, tree)
    found = f"a list of {described(tree[0])}" if isinstance(tree, list) and tree else described(tree)
    raise SourceError(
        f'{path} is not a caption JSON: expected [{{"image": path, "caption": text or list, "image_id": id}}] or '
        f'lines of {{"file_name": path, "text": caption}}, found {found}'
    )


def _has_captions(entry: Entry) -> bool:
    try:
        captioned_image(entry)
    except SourceError:
        return False
    return True
