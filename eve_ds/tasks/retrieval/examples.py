"""Captions of images: of the released code, with Karpathy's splits, and of generated scenes."""

from __future__ import annotations

from collections.abc import Iterator

from eve_ds.config import ExamplesConfig
from eve_ds.data.formats import karpathy, released
from eve_ds.data.formats.entries import list_entries
from eve_ds.data.formats.images import image_path
from eve_ds.data.synthetic.retrieval_sets import retrieval_set
from eve_ds.data.synthetic.scenes import Scene, Scenes, Split
from eve_ds.tasks.examples import Example, SceneExamples
from eve_ds.tasks.task import Published


class SceneCaptions(SceneExamples):
    """Generated scenes with their captions; in evaluation no caption is true of a second scene."""

    task = "retrieval"

    def __init__(self, config: ExamplesConfig, split: Split, num_examples: int) -> None:
        super().__init__(config, split, num_examples)
        self._scenes: Scenes | list[Scene] = Scenes(config.level, config.seed, split)
        if split != "train":
            self._scenes = retrieval_set(config.level, num_examples, config.seed, split)

    def make(self, index: int) -> Example:
        """Generate one scene."""
        scene = self._scenes[index]
        return Example(str(index), (scene.image,), scene.caption, scene.caption)


def read_released(source: Published) -> Iterator[Example]:
    """Captions of the released code; the key is the number of the caption."""
    number = 0
    image_of: dict[str, str] = {}
    for item in map(released.captioned_image, list_entries(source.files)):
        if not item.captions or not all(item.captions):
            raise item.entry.error(f"image {item.image} has no caption: give one, or leave the image out")
        group = item.image if item.image_id is None else item.image_id
        if image_of.setdefault(group, item.image) != item.image:
            raise item.entry.error(
                f"image_id {group} of {item.image} is that of {image_of[group]} too: give each image an id of its own"
            )
        for caption in item.captions:
            yield Example(str(number), (image_path(source.images, item.image),), caption, group)
            number += 1


def read_karpathy(source: Published) -> Iterator[Example]:
    """Captions of one of Karpathy's splits; `restval` belongs to `train`; the key is the number of the caption."""
    path, split = source.files[0], source.split or source.section
    entries = karpathy.read_entries(path)
    for entry in entries:
        entry.text("split")  # an entry without a split is an error, and not an image of no split
    number = 0
    for entry in karpathy.of_splits(entries, split, path):
        item = karpathy.captioned_image(entry)
        if not item.captions or not all(item.captions):
            raise entry.error(f"image {item.path} has no sentences or an empty one: give one, or leave the image out")
        for caption in item.captions:
            yield Example(str(number), (image_path(source.images, item.path),), caption, item.path)
            number += 1
