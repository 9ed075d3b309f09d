"""Statements about images: of the released code, of NLVR2 and NLVR, and about generated scenes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from eve_ds.config import ExamplesConfig
from eve_ds.data.formats import nlvr, nlvr2, released
from eve_ds.data.formats.entries import list_entries
from eve_ds.data.formats.images import first_existing, image_path
from eve_ds.data.synthetic.scenes import Split
from eve_ds.data.synthetic.statements import Statements
from eve_ds.tasks.examples import Example, SceneExamples
from eve_ds.tasks.task import Published


class SceneStatements(SceneExamples):
    """Statements about pairs of generated scenes."""

    task = "nlvr"

    def __init__(self, config: ExamplesConfig, split: Split, num_examples: int) -> None:
        super().__init__(config, split, num_examples)
        self._statements = Statements(config.level, config.seed, split)

    def make(self, index: int) -> Example:
        """Generate one statement."""
        item = self._statements[index]
        return Example(str(index), (item.left.image, item.right.image), item.text, item.text, label=item.label)


def read_released(source: Published) -> Iterator[Example]:
    """Statements of the released code; the key is the number of the statement."""
    for number, item in enumerate(map(released.statement, list_entries(source.files))):
        images = tuple(image_path(source.images, name) for name in item.images)
        yield Example(str(number), images, item.sentence, item.sentence, label=item.label)


def read_nlvr2(source: Published) -> Iterator[Example]:
    """Statements of NLVR2; those with the same sentence are one group."""
    for item in map(nlvr2.statement, list_entries(source.files)):
        images = tuple(first_existing(source.images, names) for names in item.images)
        yield Example(item.identifier, images, item.sentence, item.sentence, label=item.label)


def read_nlvr(source: Published) -> Iterator[Example]:
    """Statements of NLVR 1.0, one example for each of the six images; those with the same sentence are one group."""
    for path in source.files:
        corpus = nlvr.read_corpus(path, source.split)
        for item in corpus.statements:
            for key in item.image_names:
                image = corpus.images.get(key, Path(f"{key}.png"))  # a missing image is reported when it is read
                yield Example(key, (image,), item.sentence, item.identifier.partition("-")[0], label=item.label)
