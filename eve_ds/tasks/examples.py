"""Examples of a task, and those that are generated from scenes; files become examples in `formats.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from eve_ds.config import ExamplesConfig
from eve_ds.data.synthetic.scene_tasks import QUESTION_TYPES, Questions, Statements, answers, retrieval_set
from eve_ds.data.synthetic.scenes import LevelName, Scene, Scenes, Split, check_split

ImageSource = Path | bytes | NDArray[np.uint8]
"""A file, an encoded image, or (H, W, 3) uint8 pixels."""
EPOCH, EVALUATION = 1_000_000, 1_000
"""Scenes of an epoch and of an evaluation where `num_examples` does not say."""


@dataclass(frozen=True, eq=False)
class Example:
    """A text about one or two images, and what is to be said of them."""

    key: str
    """Unique in its set: question id, identifier, number of the caption."""
    images: tuple[ImageSource, ...]
    text: str
    """Question, statement or caption."""
    group: str = ""
    """VQA: type of the question. NLVR: what is consistent if all examples of the group are right. Retrieval: the image;
    captions of one group describe the same image."""
    answers: tuple[str, ...] = ()
    """VQA: one per annotator; empty where they are not published."""
    label: bool | None = None
    """NLVR: whether the statement is true; None where that is not published."""


class SceneExamples(Sequence[Example]):
    """A set of examples generated when they are asked for; `task` is one of the names of :class:`TaskConfig`."""

    def __init__(self, task: str, config: ExamplesConfig, split: Split, num_examples: int) -> None:
        self._make = {"vqa": self._question, "nlvr": self._statement, "retrieval": self._caption}[task]
        types = tuple(config.question_types) or QUESTION_TYPES
        self._questions = Questions(config.level, config.seed, split, types)
        self._statements = Statements(config.level, config.seed, split)
        self._scenes: Scenes | list[Scene] = Scenes(config.level, config.seed, split)
        if task == "retrieval" and split != "train":  # in training, a caption may be true of a second scene
            self._scenes = retrieval_set(config.level, num_examples, config.seed, split)
        self._size = num_examples
        self.level: LevelName = config.level
        asked = f" {'+'.join(config.question_types)}" if config.question_types else ""
        self.fingerprint = f"scenes {task} {config.level} {config.seed} {split} {num_examples}{asked}"

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._size))]
        if not 0 <= index < self._size:
            raise IndexError(f"example {index} of {self._size}")
        return self._make(index)

    def __iter__(self) -> Iterator[Example]:
        return (self._make(index) for index in range(self._size))

    def _question(self, index: int) -> Example:
        item = self._questions[index]
        return Example(str(index), (item.scene.image,), item.question, item.question_type, (item.answer,))

    def _statement(self, index: int) -> Example:
        item = self._statements[index]
        return Example(str(index), (item.left.image, item.right.image), item.text, item.text, label=item.label)

    def _caption(self, index: int) -> Example:
        scene = self._scenes[index]
        return Example(str(index), (scene.image,), scene.caption, scene.caption)


def scene_examples(task: str, config: ExamplesConfig, section: str) -> SceneExamples:
    """Generated examples of the section `train` or `val` of a task; raises ConfigError for an unknown split."""
    split = check_split(config.split or section)
    return SceneExamples(task, config, split, config.num_examples or (EPOCH if split == "train" else EVALUATION))


def all_scene_answers(examples: SceneExamples) -> list[str]:
    """Every answer that questions about scenes of that level can have, sorted."""
    return sorted({answer for kind in QUESTION_TYPES for answer in answers(examples.level, kind)})


def fingerprint(examples: Sequence[Example]) -> str:
    """Changes when the set does: its keys, texts and what is true of them, in order."""
    if isinstance(examples, SceneExamples):
        return examples.fingerprint
    digest = hashlib.sha256()
    for item in examples:
        digest.update(repr((item.key, item.text, item.group, item.answers, item.label)).encode())
    return f"{len(examples)} examples {digest.hexdigest()[:16]}"
