"""Probes of binding: does a model know which object of an image has which attribute?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from eve_ds.config import ConfigError
from eve_ds.data.synthetic.scenes import PROBE_STREAM, Scene, SceneObject, Scenes

ProbeType = Literal["position_to_color", "position_to_shape", "color_to_shape", "shape_to_color"]


@dataclass(frozen=True, eq=False)
class BindingProbe:
    """A caption of two objects; one clue identifies an object, and one of its masked words is to be predicted."""

    probe_type: ProbeType
    scene: Scene
    words: tuple[str, ...]
    """Words of the caption."""
    masked: frozenset[int]
    """Indices of `words` to mask: all except the clue, `a` and `and`."""
    asked: int
    """Index of `words` to predict, one of `masked`."""
    target: str
    """The identified object's word, `words[asked]`."""
    distractor: str
    """The other object's word of the same class."""


_CLUES: dict[ProbeType, tuple[tuple[int, ...], int]] = {
    # In the phrase "a large red circle top left": indices of the words that stay visible, index of the word to predict.
    "position_to_color": ((4, 5), 2),
    "position_to_shape": ((4, 5), 3),
    "color_to_shape": ((2,), 3),
    "shape_to_color": ((3,), 2),
}
_PHRASE_WORDS = 6


def binding_probes(scenes: Scenes, num_scenes: int) -> Iterator[BindingProbe]:
    """Yield one probe of every type for the first `num_scenes` scenes with two objects of different color and shape.

    A model that knows the attributes in the image but not their objects predicts target and distractor equally often.
    The identified object comes first in the caption in half of the probes.

    Raises:
        ConfigError: level `hard`, whose captions do not give positions.
    """
    if scenes.level.name != "easy":
        raise ConfigError(f"binding probes need scenes of level 'easy', not '{scenes.level.name}'")
    index = found = 0
    while found < num_scenes:
        scene = scenes[index]
        if _differ(scene.objects):
            rng = scenes.rng(index, PROBE_STREAM)
            for probe_type in _CLUES:
                yield _probe(scene, probe_type, named=rng.below(2))
            found += 1
        index += 1


def _differ(objects: tuple[SceneObject, ...]) -> bool:
    """Return whether the objects are two that differ in color and in shape."""
    if len(objects) != 2:
        return False
    first, second = objects
    return first.color != second.color and first.shape != second.shape


def _probe(scene: Scene, probe_type: ProbeType, named: int) -> BindingProbe:
    words = tuple(scene.caption.split())
    # Phrases are joined by one "and".
    start, other_start = (named * (_PHRASE_WORDS + 1), (1 - named) * (_PHRASE_WORDS + 1))
    clue, asked = _CLUES[probe_type]
    visible = {start + offset for offset in clue}
    masked = frozenset(i for i, word in enumerate(words) if word not in ("a", "and") and i not in visible)
    return BindingProbe(
        probe_type, scene, words, masked, start + asked, words[start + asked], words[other_start + asked]
    )
