"""Questions about images: of the released code, of VQAv2, and about generated scenes."""

from __future__ import annotations

from collections.abc import Iterator

from eve_ds.config import ExamplesConfig
from eve_ds.data.formats import released, vqav2
from eve_ds.data.formats.entries import list_entries
from eve_ds.data.formats.images import first_existing, image_path
from eve_ds.data.synthetic.questions import QUESTION_TYPES, Questions, answers
from eve_ds.data.synthetic.scenes import Split
from eve_ds.tasks.examples import Example, SceneExamples
from eve_ds.tasks.task import Published


class SceneQuestions(SceneExamples):
    """Questions about generated scenes."""

    task = "vqa"

    def __init__(self, config: ExamplesConfig, split: Split, num_examples: int) -> None:
        super().__init__(config, split, num_examples)
        types = tuple(config.question_types) or QUESTION_TYPES
        self._questions = Questions(config.level, config.seed, split, types)

    def make(self, index: int) -> Example:
        """Generate one question."""
        item = self._questions[index]
        return Example(str(index), (item.scene.image,), item.question, item.question_type, (item.answer,))

    def all_answers(self) -> list[str]:
        """All answers of questions of any type about scenes of this level, sorted."""
        return sorted({answer for kind in QUESTION_TYPES for answer in answers(self.level, kind)})


def read_released(source: Published) -> Iterator[Example]:
    """Questions of the released code."""
    for item in map(released.question, list_entries(source.files)):
        image = image_path(source.images, item.image)
        yield Example(item.question_id, (image,), item.question, item.question_type, item.answers)


def read_vqav2(source: Published) -> Iterator[Example]:
    """Questions of VQAv2, with answers if a file of annotations is given."""
    for item in vqav2.read_questions(source.files):
        image = first_existing(source.images, item.images)
        yield Example(item.question_id, (image,), item.question, item.question_type, item.answers)
