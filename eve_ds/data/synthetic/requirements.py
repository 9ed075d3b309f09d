"""Scenes that must show given objects: descriptions of objects, requirements of scenes, and random draws of both.

Questions and statements draw a text first and build a scene that makes the drawn answer true (:func:`scene_with`).
Scenes are redrawn until they fall in the split, with text and answer kept. If the answer were redrawn too, answers that
are rare in the split would become rare for their texts, and the texts would reveal the answer.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations, product
from typing import NamedTuple

from eve_ds.data.synthetic.scenes import (
    COLORS,
    OPPOSITES,
    RELATIONS,
    SIZES,
    Level,
    LevelName,
    Scene,
    SceneObject,
    Scenes,
    Split,
    SplitMix64,
    draw_distinct,
    draw_object,
    get_level,
    make_scene,
    relations,
    split_of,
)

COLOR_NAMES = tuple(COLORS)


class Description(NamedTuple):
    """Attributes of an object; None leaves an attribute open. `cell` counts row by row."""

    color: str | None = None
    shape: str | None = None
    cell: int | None = None

    def matches(self, item: SceneObject, level: Level) -> bool:
        """Return whether the object has every given attribute."""
        return (
            self.color in (None, item.color)
            and self.shape in (None, item.shape)
            and self.cell in (None, item.row * level.grid + item.column)
        )

    def __str__(self) -> str:
        """`red circle`, `circle`, or `red object`."""
        return f"{self.color} {self.shape or 'object'}" if self.color else f"{self.shape or 'object'}"


class Requirement(NamedTuple):
    """Conditions that a scene must meet."""

    named: tuple[Description, ...] = ()
    """Descriptions of distinct objects of the scene."""
    no_other: tuple[Description, ...] = ()
    """Descriptions that no object matches, except the named ones."""
    relation: str | None = None
    """Relation of the first named object to the second."""
    num_objects: int | None = None
    """Number of objects; None: any number that the level allows, at least two."""


def scene_with(scenes: Scenes, requirement: Requirement, rng: SplitMix64) -> Scene:
    """Draw a scene of the split that meets the requirement and is uniform in everything else.

    The search ends only when it finds a scene, so the split must hold one.
    """
    level = scenes.level
    while True:
        objects, slots = _propose(level, requirement, rng)
        others = [item for slot, item in enumerate(objects) if slot not in slots]
        if any(said.matches(item, level) for said in requirement.no_other for item in others):
            continue
        if requirement.relation and requirement.relation not in relations(objects[slots[0]], objects[slots[1]]):
            continue
        if split_of(objects) == scenes.split:
            return make_scene(level, objects, rng)


def _propose(
    level: Level, requirement: Requirement, rng: SplitMix64
) -> tuple[tuple[SceneObject, ...], tuple[int, ...]]:
    """Draw objects in random cells and order; return them and the indices of the named ones."""
    least = max(2, len(requirement.named))
    choices = [count for count in level.num_objects if count >= least]
    num_objects = requirement.num_objects or choices[rng.below(len(choices))]
    cells = list(draw_distinct(level.grid**2, num_objects, rng))
    slots = draw_distinct(num_objects, len(requirement.named), rng)
    named = dict(zip(slots, requirement.named, strict=True))
    for slot, said in named.items():
        if said.cell in cells:
            cells[cells.index(said.cell)] = cells[slot]
        if said.cell is not None:
            cells[slot] = said.cell
    anything = Description()
    objects = []
    for slot, cell in enumerate(cells):
        said = named.get(slot, anything)
        objects.append(draw_object(level, rng, cell, said.shape, said.color))
    return tuple(objects), slots


def draw_color(rng: SplitMix64) -> str:
    """Draw a color uniformly."""
    return COLOR_NAMES[rng.below(len(COLOR_NAMES))]


def draw_shape(level: Level, rng: SplitMix64) -> str:
    """Draw a shape of the level uniformly."""
    return level.shapes[rng.below(len(level.shapes))]


def draw_kind(level: Level, rng: SplitMix64) -> Description:
    """Draw a color and a shape uniformly."""
    return Description(draw_color(rng), draw_shape(level, rng))


def draw_attribute(level: Level, rng: SplitMix64) -> Description:
    """Draw either a color or a shape, each half of the time."""
    return Description(color=draw_color(rng)) if rng.below(2) else Description(shape=draw_shape(level, rng))


def draw_two_kinds(scenes: Scenes, rng: SplitMix64) -> tuple[Description, Description]:
    """Draw two distinct kinds that occur together in the split."""
    while True:
        first, second = draw_kind(scenes.level, rng), draw_kind(scenes.level, rng)
        if first != second and holds_pair(scenes, first, second):
            return first, second


def draw_relation(scenes: Scenes, rng: SplitMix64) -> tuple[Description, str, Description]:
    """Draw two kinds and a relation; the split shows both the relation and, in other scenes, its opposite."""
    while True:
        relation = RELATIONS[rng.below(len(RELATIONS))]
        first, second = draw_two_kinds(scenes, rng)
        if all(holds_pair(scenes, first, second, held) for held in (relation, OPPOSITES[relation])):
            return first, relation, second


def holds_pair(scenes: Scenes, first: Description, second: Description, relation: str | None = None) -> bool:
    """Return whether the split holds a scene of exactly these two kinds, in the relation if one is given."""
    return _split_holds_pair(scenes.level.name, scenes.split, first, second, relation)


@cache
def _split_holds_pair(
    level_name: LevelName, split: Split, first: Description, second: Description, relation: str | None
) -> bool:
    """Search all scenes of the two kinds; one tenth of the level `easy` has only some of the pairs.

    Texts are checked before an answer is drawn: a text is dropped if the split cannot show one of its answers.
    """
    grid = get_level(level_name).grid
    for cells, sizes in product(permutations(range(grid**2), 2), product(SIZES, SIZES)):
        pair = [
            SceneObject(str(said.shape), str(said.color), size, *divmod(cell, grid), position="", box=(0, 0, 0, 0))
            for said, size, cell in zip((first, second), sizes, cells, strict=True)
        ]
        if (relation is None or relation in relations(*pair)) and split_of(pair) == split:
            return True
    return False
