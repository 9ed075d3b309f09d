"""Scenes: generated 64x64 images of colored shapes with captions; the default data, without any download.

A sample is a pure function of (level, seed, split, index); its caption also depends on the requested order of objects.
The split of a scene depends on its contents (shape, color, size and cell of every object), never on its index: contents
of one split occur in no other split, under any seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import permutations
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from eve_ds.config import ConfigError

LevelName = Literal["easy", "hard"]
Split = Literal["train", "val", "test"]
WordClass = Literal["color", "shape", "size", "position"]
WORD_CLASSES: tuple[WordClass, ...] = get_args(WordClass)
"""Classes of the words that say something about the image; keys of evaluations on scenes."""

IMAGE_SIZE = 64
"""Height and width in pixels."""
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (40, 170, 70),
    "blue": (50, 85, 235),
    "yellow": (240, 220, 50),
    "orange": (245, 140, 30),
    "purple": (150, 60, 190),
    "cyan": (60, 215, 225),
    "white": (245, 245, 245),
}
SIZES = ("small", "large")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
"""Shapes of the level `hard`; `easy` has the first four."""
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BACKGROUND_VALUES = (40, 52, 64, 76)
"""Values of each channel of the flat background: 64 dark tints, none close to the color of an object."""

# Values of `purpose` in `Scenes.rng`; plain scenes have 0, and a question adds the number of its type.
QUESTION_TEXT_STREAM, QUESTION_SCENE_STREAM, STATEMENT_TEXT_STREAM, STATEMENT_SCENE_STREAM = 10, 20, 30, 40
PROBE_STREAM = 50


class Level(NamedTuple):
    """Possible contents of the scenes of a level; a cell is one of `grid` x `grid` places, counted row by row."""

    name: LevelName
    grid: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    centers: tuple[int, ...]
    """Pixel coordinate of the center of each row and column."""
    shapes: tuple[str, ...]
    num_objects: tuple[int, ...]
    radius: dict[str, int]
    """Size word -> pixels."""
    offsets: dict[str, tuple[int, ...]]
    """Size word -> possible shifts from the center of the cell along each axis, in pixels."""


LEVELS: dict[str, Level] = {
    "easy": Level(
        name="easy",
        grid=2,
        rows=("top", "bottom"),
        columns=("left", "right"),
        centers=(16, 48),
        shapes=SHAPES[:4],
        num_objects=(1, 2),
        radius={"small": 12, "large": 15},
        # Few, fixed poses: with continuous shifts a small model needed far longer to learn shapes.
        offsets={"small": (-4, 4), "large": (0,)},
    ),
    "hard": Level(
        name="hard",
        grid=3,
        rows=("top", "middle", "bottom"),
        columns=("left", "center", "right"),
        centers=(11, 32, 53),
        shapes=SHAPES,
        num_objects=(2, 3),
        radius={"small": 6, "large": 9},
        # Cells are 21 pixels apart, so no two objects can touch.
        offsets={"small": (-3, -2, -1, 0, 1, 2, 3), "large": (-1, 0, 1)},
    ),
}

_COLOR_NAMES = tuple(COLORS)
_COLOR_CODES = {name: code for code, name in enumerate(COLORS)}
_SHAPE_CODES = {name: code for code, name in enumerate(SHAPES)}
_CLASS_OF_WORD: dict[str, WordClass] = {
    **dict.fromkeys(COLORS, "color"),
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(SIZES, "size"),
    **dict.fromkeys(("top", "middle", "bottom", "left", "center", "right", "above", "below"), "position"),
}


def word_class(word: str) -> WordClass | None:
    """Return the class of a caption word; None for words that say nothing about the image (`a`, `and`, `of`)."""
    return _CLASS_OF_WORD.get(word)


_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """Finalizer of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


class SplitMix64:
    """Generator splitmix64, keyed by integers; creating it takes a microsecond, a numpy Generator takes twenty."""

    __slots__ = ("state",)

    def __init__(self, *key: int) -> None:
        state = 0
        for part in key:
            state = _mix((state + _GOLDEN + part) & _MASK64)
        self.state = state

    def below(self, bound: int) -> int:
        """Draw a uniform integer in [0, bound); the bias is below bound / 2**64."""
        self.state = (self.state + _GOLDEN) & _MASK64
        return (_mix(self.state) * bound) >> 64


class SceneObject(NamedTuple):
    """An object of a scene; row and column count cells from the top left."""

    shape: str
    color: str
    size: str
    row: int
    column: int
    position: str
    """Row and column in words, such as `top left`."""
    box: tuple[int, int, int, int]
    """(left, top, right, bottom) in pixels, right and bottom exclusive."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A sample; `image` is (64, 64, 3) uint8, RGB."""

    image: NDArray[np.uint8]
    caption: str
    objects: tuple[SceneObject, ...]
    """Objects in the order of the caption."""

    @cached_property
    def foreground(self) -> NDArray[np.bool_]:
        """Mask of shape (64, 64), bool, True at the pixels of objects."""
        foreground = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.bool_)
        for item in self.objects:
            left, top, right, bottom = item.box
            foreground[top:bottom, left:right] = stencil(item.shape, (right - left) // 2)
        return foreground


class Scenes:
    """Endless map-style data set: every index from 0 on has a sample.

    Args:
        level: `easy` or `hard`.
        seed: seed of the generated world; splits stay disjoint across seeds.
        split: `train` (80 % of all possible contents), `val` or `test` (10 % each).

    Raises:
        ConfigError: unknown level or split.
    """

    def __init__(self, level: LevelName, seed: int = 0, split: Split = "train") -> None:
        self.level = get_level(level)
        self.seed = seed
        self.split = check_split(split)

    def rng(self, index: int, purpose: int = 0) -> SplitMix64:
        """Return the generator of a sample; every `purpose` has an independent one for the same index."""
        if index < 0:
            raise IndexError(f"scene index ({index}) must not be negative; the data set is endless")
        return SplitMix64(self.seed, _SPLIT_CODES[self.split], purpose, index)

    def __getitem__(self, index: int) -> Scene:
        """Return sample number `index`, whose caption names the objects in random order."""
        return self.scene(index)

    def scene(self, index: int, *, reading_order: bool = False) -> Scene:
        """Return sample number `index`; `reading_order` keeps the image and sorts the objects by row, then column.

        At level `easy` the phrases of the caption then name the objects row by row. At level `hard`, where every phrase
        relates an object to the first one, the first object in reading order comes first, and the others follow in
        that order.
        """
        rng = self.rng(index)
        objects = draw_objects(self.level, rng)
        while split_of(objects) != self.split:
            objects = draw_objects(self.level, rng)
        return make_scene(self.level, in_reading_order(objects) if reading_order else objects, rng)


_SPLIT_CODES: dict[str, int] = {name: code for code, name in enumerate(get_args(Split))}


def get_level(name: str) -> Level:
    """Return the level of this name; raises :class:`ConfigError` for an unknown name."""
    if name not in LEVELS:
        raise ConfigError(f"scenes level '{name}' is unknown; use one of: {', '.join(LEVELS)}")
    return LEVELS[name]


def check_split(split: str) -> Split:
    """Return the split itself; raises :class:`ConfigError` for an unknown split."""
    for known in get_args(Split):
        if split == known:
            return known
    raise ConfigError(f"scenes split '{split}' is unknown; use one of: {', '.join(_SPLIT_CODES)}")


def split_of(objects: Sequence[SceneObject]) -> Split:
    """Return the split of a scene: a hash of its contents, independent of order, pose, background and caption."""
    state = 0
    for code in sorted(_object_code(item) for item in objects):
        state = _mix((state + _GOLDEN + code) & _MASK64)
    tenth = (state * 10) >> 64
    return "train" if tenth < 8 else "val" if tenth == 8 else "test"


def _object_code(item: SceneObject) -> int:
    cell = item.row * 3 + item.column
    return ((cell * 5 + _SHAPE_CODES[item.shape]) * 8 + _COLOR_CODES[item.color]) * 2 + (item.size == "large")


def draw_objects(level: Level, rng: SplitMix64) -> tuple[SceneObject, ...]:
    """Draw the number of objects, distinct cells in random order, and every attribute uniformly."""
    num_objects = level.num_objects[rng.below(len(level.num_objects))]
    return tuple(draw_object(level, rng, cell) for cell in draw_distinct(level.grid**2, num_objects, rng))


def in_reading_order(objects: Sequence[SceneObject]) -> tuple[SceneObject, ...]:
    """Return the objects sorted by row, then column."""
    return tuple(sorted(objects, key=lambda item: (item.row, item.column)))


def draw_distinct(bound: int, count: int, rng: SplitMix64) -> tuple[int, ...]:
    """Draw `count` distinct integers of [0, bound) in random order."""
    orders = _orders(bound, count)
    return orders[rng.below(len(orders))]


@cache
def _orders(bound: int, count: int) -> list[tuple[int, ...]]:
    return list(permutations(range(bound), count))


def draw_object(
    level: Level, rng: SplitMix64, cell: int, shape: str | None = None, color: str | None = None
) -> SceneObject:
    """Draw an object in a cell; attributes that are not given are uniform."""
    shape = shape or level.shapes[rng.below(len(level.shapes))]
    color = color or _COLOR_NAMES[rng.below(len(_COLOR_NAMES))]
    size = SIZES[rng.below(2)]
    row, column = divmod(cell, level.grid)
    offsets, radius = level.offsets[size], level.radius[size]
    left = level.centers[column] + offsets[rng.below(len(offsets))] - radius
    top = level.centers[row] + offsets[rng.below(len(offsets))] - radius
    box = (left, top, left + 2 * radius, top + 2 * radius)
    return SceneObject(shape, color, size, row, column, f"{level.rows[row]} {level.columns[column]}", box)


def make_scene(level: Level, objects: tuple[SceneObject, ...], rng: SplitMix64) -> Scene:
    """Draw the background, render the objects and compose the caption."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    tints = _backgrounds()
    image[:] = tints[rng.below(len(tints))]
    for item in objects:
        left, top, right, bottom = item.box
        image[top:bottom, left:right][stencil(item.shape, (right - left) // 2)] = COLORS[item.color]
    caption = _caption_by_position(objects) if level.name == "easy" else _caption_by_relation(objects, rng)
    return Scene(image, caption, objects)


@cache
def _backgrounds() -> NDArray[np.uint8]:
    """Return background rows (64 tints, 64 pixels, 3); broadcasting a row is twice as fast as a pixel."""
    channels = np.array(BACKGROUND_VALUES, dtype=np.uint8)
    tints = np.stack(np.meshgrid(channels, channels, channels, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    return np.repeat(tints, IMAGE_SIZE, axis=1)


@cache
def stencil(shape: str, radius: int) -> NDArray[np.bool_]:
    """Return (2 * radius, 2 * radius) bool: pixels whose center lies inside the shape; every shape fills its box."""
    center = np.arange(2 * radius) + 0.5 - radius
    y, x = center[:, None], center[None, :]
    distance = np.hypot(x, y)
    inside = {
        "circle": distance <= radius,
        "square": np.ones((2 * radius, 2 * radius), dtype=np.bool_),
        "triangle": 2 * np.abs(x) <= y + radius,
        "cross": np.minimum(np.abs(x), np.abs(y)) <= radius / 3,
        "ring": (distance <= radius) & (distance > radius / 2),
    }
    return inside[shape]


def _caption_by_position(objects: Sequence[SceneObject]) -> str:
    return " and ".join(f"a {item.size} {item.color} {item.shape} {item.position}" for item in objects)


def _caption_by_relation(objects: Sequence[SceneObject], rng: SplitMix64) -> str:
    """`a small red circle left of a large blue cross and above a small green ring`, all relative to the first."""
    first, *others = objects
    clauses = []
    for other in others:
        held = relations(first, other)
        clauses.append(f"{held[rng.below(len(held))]} a {other.size} {other.color} {other.shape}")
    return f"a {first.size} {first.color} {first.shape} {' and '.join(clauses)}"


def relations(first: SceneObject, second: SceneObject) -> list[str]:
    """Return the one or two of :data:`RELATIONS` that `first` has to `second`, by their cells."""
    held = []
    if first.column != second.column:
        held.append("left of" if first.column < second.column else "right of")
    if first.row != second.row:
        held.append("above" if first.row < second.row else "below")
    return held
