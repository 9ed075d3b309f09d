"""Sets of scenes for retrieval, in which each caption is true of one image only."""

from __future__ import annotations

from collections import defaultdict

from eve_ds.config import ConfigError
from eve_ds.data.synthetic.scenes import OPPOSITES, LevelName, Scene, SceneObject, Scenes, Split, relations


def retrieval_set(level: LevelName, size: int, seed: int = 0, split: Split = "test") -> list[Scene]:
    """Return `size` scenes of at least two objects; each caption is true of its own image only.

    Raises:
        ConfigError: unknown level or split, or the split holds too few scenes with distinguishing captions.
    """
    scenes = Scenes(level, seed, split)
    chosen: list[Scene] = []
    captions = _CaptionIndex()
    for index in range(5 * size + 2000):
        if len(chosen) == size:
            break
        scene = scenes[index]
        shown, said = _facts_shown(scene, level), _facts_said(scene, level)
        if len(scene.objects) < 2 or captions.conflict(shown, said):
            continue
        captions.add(shown, said)
        chosen.append(scene)
    if len(chosen) < size:
        raise ConfigError(
            f"retrieval set of {size} scenes: split '{split}' of level '{level}' gave only {len(chosen)} that captions "
            "tell apart; ask for fewer"
        )
    return chosen


_Facts = set[tuple[str, ...]]
"""Facts about a scene: (object, position) at level `easy`, (object, relation, object) at level `hard`."""


class _CaptionIndex:
    """Index of the facts that the chosen scenes show and that their captions state."""

    def __init__(self) -> None:
        self.showing: dict[tuple[str, ...], set[int]] = defaultdict(set)
        self.saying: dict[tuple[str, ...], list[_Facts]] = defaultdict(list)
        self.size = 0

    def add(self, shown: _Facts, said: _Facts) -> None:
        """Add a chosen scene."""
        for fact in shown:
            self.showing[fact].add(self.size)
        self.saying[min(said)].append(said)
        self.size += 1

    def conflict(self, shown: _Facts, said: _Facts) -> bool:
        """Return whether this caption is true of a chosen scene, or a chosen caption of this scene."""
        if set.intersection(*(self.showing[fact] for fact in said)):
            return True
        return any(other <= shown for fact in shown for other in self.saying[fact])


def _facts_shown(scene: Scene, level: LevelName) -> _Facts:
    if level == "easy":
        return {(_phrase(item), item.position) for item in scene.objects}
    return {
        _fact(first, relation, second)
        for first in scene.objects
        for second in scene.objects
        for relation in relations(first, second)
    }


def _facts_said(scene: Scene, level: LevelName) -> _Facts:
    if level == "easy":
        return _facts_shown(scene, level)
    first, *others = scene.objects
    return {
        _fact(first, relation, second)
        for second in others
        for relation in relations(first, second)
        if f"{relation} a {_phrase(second)}" in scene.caption
    }


def _fact(first: SceneObject, relation: str, second: SceneObject) -> tuple[str, ...]:
    """Return one form of the fact: `a right of b` and `b left of a` are the same."""
    if relation in ("right of", "below"):
        first, relation, second = second, OPPOSITES[relation], first
    return _phrase(first), relation, _phrase(second)


def _phrase(item: SceneObject) -> str:
    return f"{item.size} {item.color} {item.shape}"
