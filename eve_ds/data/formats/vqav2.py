"""VQAv2 (Goyal et al., CVPR 2017; https://visualqa.org): a file of questions and, for all but a test set, annotations.

Questions: `{"data_subtype", "questions": [{image_id, question, question_id}]}`.
Annotations: `{"annotations": [{question_id, question_type, answers: [{answer}]}]}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eve_ds.data.errors import SourceError
from eve_ds.data.formats.entries import Entry, as_text, described, numbered, read_json, shortened


class Question(NamedTuple):
    """One question with the answers of its annotators."""

    question_id: str
    images: tuple[str, str]
    """Paths below the image folder where the COCO image may lie: there, or in the folder of its subset."""
    question: str
    question_type: str
    """Empty without annotations."""
    answers: tuple[str, ...]
    """One per annotator; empty without annotations."""


def read_questions(files: Sequence[Path]) -> Iterator[Question]:
    """Questions of all files, which may be in any order.

    Raises:
        SourceError: a file of another form, no questions, a malformed entry, or a question that the annotations lack.
    """
    questions, annotations = _read_entries(files)
    if not questions:
        raise SourceError(f"{files[0]} holds no questions: give the file of questions beside that of annotations")
    for entry, subtype in questions:
        key = entry.text("question_id")
        annotation = annotations.get(key)
        if annotations and annotation is None:
            raise entry.error(f"question {key} has no annotation: the two files are of different sets")
        name = f"COCO_{subtype}_{_image_number(entry):012d}.jpg"
        yield Question(
            question_id=key,
            images=(name, f"{subtype}/{name}"),
            question=entry.text("question"),
            question_type="" if annotation is None else str(annotation.get("question_type") or ""),
            answers=() if annotation is None else _answers(annotation),
        )


def _read_entries(files: Sequence[Path]) -> tuple[list[tuple[Entry, str]], dict[str, Entry]]:
    """Questions with their `data_subtype`, and annotations by question id."""
    questions: list[tuple[Entry, str]] = []
    annotations: dict[str, Entry] = {}
    for path in files:
        tree = read_json(path)
        if not isinstance(tree, dict) or not _has_lists(tree):
            raise SourceError(
                f"{path} must be an object with a list of `questions` or `annotations`, not {described(tree)}"
            )
        subtype = str(tree.get("data_subtype", ""))
        questions += [(entry, subtype) for entry in numbered(tree.get("questions", []), path)]
        for entry in numbered(tree.get("annotations", []), path):
            key = entry.text("question_id")
            if key in annotations:
                raise entry.error(f"question {key} has another annotation at {annotations[key].where}: remove one")
            annotations[key] = entry
    return questions, annotations


def _has_lists(tree: dict[str, Any]) -> bool:
    return all(isinstance(tree.get(key, []), list) for key in ("questions", "annotations"))


def _image_number(entry: Entry) -> int:
    text = entry.text("image_id")
    if not text.isdecimal():
        raise entry.error(f"image_id ({text!r}) must be the number of a COCO image")
    return int(text)


def _answers(annotation: Entry) -> tuple[str, ...]:
    answers = annotation.get("answers")
    if not isinstance(answers, list) or not all(isinstance(item, dict) and "answer" in item for item in answers):
        raise annotation.error("answers must be a list of objects with `answer`")
    texts = [as_text(item["answer"]) for item in answers]
    if None in texts:
        wrong = shortened(answers[texts.index(None)]["answer"])
        raise annotation.error(f"an answer ({wrong}) must be a string or a whole number")
    return tuple(text for text in texts if text is not None)
