"""JSON lists of the released code of ALBEF, X-VLM and EVE: captions, questions, and statements about images.

Captions: `[{image, caption, image_id}]`; `caption` is a text or a list, `image_id` may be absent. The names of Hugging
Face's `metadata.jsonl`, `file_name` and `text`, are read as well.
Regions of X-VLM: `[{image, caption, elems: [{caption, bb: [x, y, width, height], attributes}]}]`; the image may have no
`caption`, that of an element is a text or a list, and each of its attributes is put before it.
Questions: `[{image, question, question_id, answer, question_type}]`; `answer` is a text or one text per annotator,
absent in a test set.
Statements: `[{images: [left, right], sentence, label}]`; `label` is absent in a test set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from eve_ds.data.errors import SourceError
from eve_ds.data.formats.captioned import Box, ImageCaptions, box, by_box
from eve_ds.data.formats.entries import Entry, described, shortened
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


def read_captions(entries: Iterable[Entry], boxes: bool = False) -> Iterator[ImageCaptions | Entry]:
    """Captions of each image, or of each box in it if `boxes`; entries and elements themselves that are malformed."""
    for entry in entries:
        try:
            has_elements = entry.has("elems")
            item = captioned_image(_without_caption(entry) if has_elements else entry)
            elements = _elements(entry) if has_elements else []
        except SourceError as error:
            yield entry.malformed(error)
            continue
        phrases: list[tuple[Box | None, str]] = [(None, caption) for caption in item.captions]
        for element in elements:
            try:
                place = box(element, element.get("bb")) if boxes else None
                phrases += [(place, caption) for caption in _element_captions(element)]
            except SourceError as error:
                yield element.malformed(error)
        if not elements:
            yield ImageCaptions(item.image, item.captions, item.image_id)
        for box_, texts in by_box(phrases) if elements else ():
            yield ImageCaptions(item.image, texts, item.image_id, box=box_)


def _without_caption(entry: Entry) -> Entry:
    """The entry, with an empty list of captions if it has none."""
    has_caption = entry.has("caption") or entry.has("text")
    return entry if has_caption else Entry({**entry.content, "caption": []}, entry.where)


def _elements(entry: Entry) -> list[Entry]:
    elements = entry.get("elems")
    if not isinstance(elements, list):
        raise entry.error(f"elems ({shortened(elements)}) must be a list")
    return [Entry(element, f"{entry.where} element {number}") for number, element in enumerate(elements)]


def _element_captions(element: Entry) -> tuple[str, ...]:
    """Captions of an element of X-VLM, each behind each of its attributes if it has some."""
    captions = element.captions("caption")
    attributes = element.captions("attributes") if element.has("attributes") else ()
    described = tuple(f"{attribute} {caption}" for attribute in attributes if attribute for caption in captions)
    return described or captions


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


def require_captions(tree: Any, entries: Iterable[Entry], path: Path) -> None:
    """Raise :class:`SourceError` unless the document is a list with some entry that has an image and captions.

    Args:
        tree: the document with at least the first entry of each list.
        entries: entries of the list.
        path: the file, for the message.
    """
    problems: list[str] = []
    for found in read_captions(entries) if isinstance(tree, list) else ():
        if isinstance(found, ImageCaptions):
            return
        problems = problems or [f"; {PurePosixPath(found.where).name}: {found.problem}"]
    refuse_document(path, tree, "json")
    if isinstance(tree, dict) and tree.keys() & {"image", "file_name"}:
        problems = ["; put the object into a list, or name the file .jsonl"]
    raise SourceError(
        f'{path} is not a caption JSON: expected [{{"image": path, "caption": text or list, "image_id": id}}] or '
        f'lines of {{"file_name": path, "text": caption}}, found {described(tree)}{"".join(problems)}'
    )
