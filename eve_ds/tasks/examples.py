"""Examples of a task: read from published files, or generated from scenes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from eve_ds import limits
from eve_ds.config import ExamplesConfig
from eve_ds.data.formats.images import probe_step
from eve_ds.data.synthetic.scenes import LevelName, Split, check_split
from eve_ds.reading import read_file

ImageSource = Path | bytes | NDArray[np.uint8]
"""A file, an encoded image, or (H, W, 3) uint8 pixels."""
Section = Literal["train", "val"]
"""`task.train` or `task.val` of the configuration."""
EPOCH, EVALUATION = 1_000_000, 1_000
"""Number of generated examples of an epoch and of an evaluation where `num_examples` is None."""


@dataclass(frozen=True, eq=False)
class Example:
    """A text about one or more images, with the published answer."""

    key: str
    """Unique within the set: question id, identifier, or number of the caption."""
    images: tuple[ImageSource, ...]
    text: str
    """Question, statement or caption."""
    group: str = ""
    """VQA: type of the question. NLVR: statements that count as consistent only if all are judged right. Retrieval: the
    image; captions of one group describe the same image."""
    answers: tuple[str, ...] = ()
    """VQA: one per annotator; empty where answers are not published."""
    label: bool | None = None
    """NLVR: whether the statement is true; None where labels are not published."""


class SceneExamples(Sequence[Example], ABC):
    """Examples that are generated from scenes on access; each task has its own subclass.

    Args:
        config: level, seed and kinds of the examples.
        split: split of the scenes.
        num_examples: length of the set.
    """

    task: ClassVar[str]
    """Name of the task, for the fingerprint."""

    def __init__(self, config: ExamplesConfig, split: Split, num_examples: int) -> None:
        self._size = num_examples
        self.level: LevelName = config.level
        asked = f" {'+'.join(config.question_types)}" if config.question_types else ""
        self.fingerprint = f"scenes {self.task} {config.level} {config.seed} {split} {num_examples}{asked}"

    @classmethod
    def of(cls, config: ExamplesConfig, section: Section) -> Self:
        """Examples of a section of the configuration; raises ConfigError for an unknown split."""
        split = check_split(config.split or section)
        return cls(config, split, config.num_examples or (EPOCH if split == "train" else EVALUATION))

    @abstractmethod
    def make(self, index: int) -> Example:
        """Generate one example; `index` is in range."""

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.make(i) for i in range(*index.indices(self._size))]
        if not 0 <= index < self._size:
            raise IndexError(f"example {index} of {self._size}")
        return self.make(index)

    def __iter__(self) -> Iterator[Example]:
        return (self.make(index) for index in range(self._size))


def fingerprint(examples: Sequence[Example]) -> str:
    """Text that changes with the keys, texts and published answers of a set, or their order."""
    if isinstance(examples, SceneExamples):
        return examples.fingerprint
    digest = hashlib.sha256()
    for item in examples:
        digest.update(repr((item.key, item.text, item.group, item.answers, item.label)).encode())
    return f"{len(examples)} examples {digest.hexdigest()[:16]}"


def image_digests(examples: Sequence[Example]) -> dict[str, str]:
    """Digests of the names of all images, and of some images spread over a set; empty for generated ones.

    An image that cannot be read now has none. Two results belong to the same images if they agree where both have a
    digest; neither a folder that moved nor an image that arrived later changes one.
    """
    if isinstance(examples, SceneExamples):
        return {}
    names = "\n".join(image.name for item in examples for image in item.images if isinstance(image, Path))
    found = {"names": _digest(names.encode(errors="surrogateescape"))}
    for item in examples[:: probe_step(len(examples))]:
        for number, image in enumerate(item.images):
            try:
                found[f"{item.key}/{number}"] = _digest(_stored(image))
            except OSError:
                continue
    return found


def _stored(image: ImageSource) -> bytes:
    if isinstance(image, Path):
        return read_file(image, limits.IMAGE_BYTES)
    return image if isinstance(image, bytes) else image.tobytes()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
