"""Tasks on scenes: questions, two-image statements, retrieval sets and probes of binding.

Balance: what a question or statement says is drawn first, then it is shown once with every possible answer, and only
then is a scene built that makes the answer true. So no function of the text alone beats chance, exactly. Scenes are
redrawn until they fall in the split, with text and answer kept; drawing the answer again as well would leak it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Literal, NamedTuple, get_args

from eve_ds.config import ConfigError
from eve_ds.data.synthetic.scenes import (
    COLORS,
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

QuestionType = Literal["color", "shape", "count", "existence", "relation"]
ProbeType = Literal["position_to_color", "position_to_shape", "color_to_shape", "shape_to_color"]

QUESTION_TYPES: tuple[QuestionType, ...] = get_args(QuestionType)
NUMBERS = ("zero", "one", "two", "three")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_COLOR_NAMES = tuple(COLORS)
# Streams of random numbers next to the one of plain scenes (0); question types add their number.
_QUESTION_TEXT, _QUESTION_SCENE, _STATEMENT_TEXT, _STATEMENT_SCENE, _PROBE = 10, 20, 30, 40, 50


class Description(NamedTuple):
    """What is said of an object; None leaves it open. `cell` counts row by row."""

    color: str | None = None
    shape: str | None = None
    cell: int | None = None

    def matches(self, item: SceneObject, level: Level) -> bool:
        """Whether all that is said holds of the object."""
        return (
            self.color in (None, item.color)
            and self.shape in (None, item.shape)
            and self.cell in (None, item.row * level.grid + item.column)
        )

    def __str__(self) -> str:
        """`red circle`, `circle`, or `red object`."""
        return f"{self.color} {self.shape or 'object'}" if self.color else f"{self.shape or 'object'}"


class Requirement(NamedTuple):
    """What a scene must show."""

    named: tuple[Description, ...] = ()
    """One object each."""
    no_other: tuple[Description, ...] = ()
    """Matched by no object beyond the named ones."""
    relation: str | None = None
    """Of the first named object to the second."""
    num_objects: int | None = None
    """None: two or more, as the level has them."""


def scene_with(scenes: Scenes, requirement: Requirement, rng: SplitMix64) -> Scene:
    """A random scene of the split that meets the requirement; everything else about it is uniform.

    It searches until it finds one: the split must hold such a scene.
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
    """Objects in random cells and order, and the slots of the named ones among them."""
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


# Questions


@dataclass(frozen=True, eq=False)
class VisualQuestion:
    """A question about a scene; `answer` is one of :func:`answers` of its type."""

    scene: Scene
    question: str
    answer: str
    question_type: QuestionType


def answers(level: LevelName, question_type: QuestionType) -> tuple[str, ...]:
    """Possible answers, equally frequent for every single question text.

    Raises:
        ConfigError: unknown level or question type.
    """
    known = get_level(level)
    by_type = {
        "color": _COLOR_NAMES,
        "shape": known.shapes,
        "count": NUMBERS[: max(known.num_objects) + 1],
        "existence": ("yes", "no"),
        "relation": ("yes", "no"),
    }
    if question_type not in by_type:
        raise ConfigError(f"question type '{question_type}' is unknown; use one of: {', '.join(QUESTION_TYPES)}")
    return by_type[question_type]


def chance(level: LevelName, question_type: QuestionType) -> float:
    """Accuracy of the best answer that looks at the text alone, and of any other."""
    return 1 / len(answers(level, question_type))


def unbound_accuracy(level: LevelName, question_type: Literal["color", "shape"]) -> float:
    """Accuracy of naming the colour (shape) of any one object of the scene: what seeing without binding reaches.

    Easy: .5625 for colours, .625 for shapes. Figures of colour and shape questions mean little without it.
    """
    counts = [count for count in get_level(level).num_objects if count >= 2]
    by_luck = chance(level, question_type)
    return sum(1 / count + (1 - 1 / count) * by_luck for count in counts) / len(counts)


class Questions:
    """Endless map-style data set of questions; types take turns, so a multiple of their number is a balanced set.

    Item `index` has type `question_types[index % n]`; the items of one type come in groups, as long as the type has
    answers, that share one text and hold every answer once.

    Args:
        level: `easy` or `hard`.
        seed: Which world of questions.
        split: `train`, `val` or `test`, the splits of :class:`eve_ds.data.synthetic.scenes.Scenes`.
        question_types: Which types to ask.

    Raises:
        ConfigError: unknown level, split or question type.
    """

    def __init__(
        self,
        level: LevelName,
        seed: int = 0,
        split: Split = "train",
        question_types: tuple[QuestionType, ...] = QUESTION_TYPES,
    ) -> None:
        self.scenes = Scenes(level, seed, split)
        self.question_types = question_types
        self.answers = {question_type: answers(level, question_type) for question_type in question_types}

    def __getitem__(self, index: int) -> VisualQuestion:
        """Question number `index`."""
        turn, which = divmod(index, len(self.question_types))
        question_type = self.question_types[which]
        possible = self.answers[question_type]
        group, turn = divmod(turn, len(possible))
        stream = QUESTION_TYPES.index(question_type)
        # Every item of the group draws the same text from the same numbers, the answers start anywhere.
        text_rng = self.scenes.rng(group, _QUESTION_TEXT + stream)
        answer = possible[(text_rng.below(len(possible)) + turn) % len(possible)]
        scene_rng = self.scenes.rng(group * len(possible) + turn, _QUESTION_SCENE + stream)
        text, requirement = _ASK[question_type](self.scenes, answer, text_rng, scene_rng)
        return VisualQuestion(scene_with(self.scenes, requirement, scene_rng), text, answer, question_type)


def _ask_color(scenes: Scenes, answer: str, text_rng: SplitMix64, _: SplitMix64) -> tuple[str, Requirement]:
    if text_rng.below(2):
        position, cell = _any_position(scenes.level, text_rng)
        named = Description(color=answer, cell=cell)
        return f"what color is the object at the {position}?", Requirement((named,))
    clue = Description(shape=_any_shape(scenes.level, text_rng))
    return f"what color is the {clue}?", Requirement((clue._replace(color=answer),), no_other=(clue,))


def _ask_shape(scenes: Scenes, answer: str, text_rng: SplitMix64, _: SplitMix64) -> tuple[str, Requirement]:
    if text_rng.below(2):
        position, cell = _any_position(scenes.level, text_rng)
        named = Description(shape=answer, cell=cell)
        return f"what shape is the object at the {position}?", Requirement((named,))
    clue = Description(color=_any_color(text_rng))
    return f"what shape is the {clue}?", Requirement((clue._replace(shape=answer),), no_other=(clue,))


def _ask_count(scenes: Scenes, answer: str, text_rng: SplitMix64, _: SplitMix64) -> tuple[str, Requirement]:
    """Always the most objects that the level has: their number alone must not tell."""
    counted = _any_attribute(scenes.level, text_rng)
    named = (counted,) * NUMBERS.index(answer)
    return f"how many {_plural(counted)} are there?", Requirement(
        named, (counted,), num_objects=max(scenes.level.num_objects)
    )


def _ask_existence(scenes: Scenes, answer: str, text_rng: SplitMix64, scene_rng: SplitMix64) -> tuple[str, Requirement]:
    form = text_rng.below(3)
    if form == 0:
        position, cell = _any_position(scenes.level, text_rng)
        sought, text = Description(cell=cell), f"is there an object at the {position}?"
    else:
        sought = _any_attribute(scenes.level, text_rng) if form == 1 else _any_kind(scenes.level, text_rng)
        text = f"is there a {sought}?"
    if answer == "yes":
        return text, Requirement((sought,))
    return text, _absent(scenes, sought, scene_rng)


def _absent(scenes: Scenes, sought: Description, rng: SplitMix64) -> Requirement:
    """No such object; every other time both its colour and its shape are there, on two objects."""
    if not (sought.color and sought.shape and rng.below(2)):
        return Requirement(no_other=(sought,))
    while True:
        other_color = _other(_COLOR_NAMES, sought.color, rng)
        other_shape = _other(scenes.level.shapes, sought.shape, rng)
        apart = (Description(sought.color, other_shape), Description(other_color, sought.shape))
        if _holds_pair(scenes, *apart):
            return Requirement(apart, no_other=(sought,))


def _ask_relation(scenes: Scenes, answer: str, text_rng: SplitMix64, _: SplitMix64) -> tuple[str, Requirement]:
    first, relation, second = _any_relation(scenes, text_rng)
    held = relation if answer == "yes" else OPPOSITES[relation]
    text = f"is the {first} {relation} the {second}?"
    return text, Requirement((first, second), no_other=(first, second), relation=held)


_ASK = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "existence": _ask_existence,
    "relation": _ask_relation,
}


def _any_position(level: Level, rng: SplitMix64) -> tuple[str, int]:
    cell = rng.below(level.grid**2)
    row, column = divmod(cell, level.grid)
    return f"{level.rows[row]} {level.columns[column]}", cell


def _any_color(rng: SplitMix64) -> str:
    return _COLOR_NAMES[rng.below(len(_COLOR_NAMES))]


def _any_shape(level: Level, rng: SplitMix64) -> str:
    return level.shapes[rng.below(len(level.shapes))]


def _any_kind(level: Level, rng: SplitMix64) -> Description:
    return Description(_any_color(rng), _any_shape(level, rng))


def _any_attribute(level: Level, rng: SplitMix64) -> Description:
    return Description(color=_any_color(rng)) if rng.below(2) else Description(shape=_any_shape(level, rng))


def _two_kinds(scenes: Scenes, rng: SplitMix64) -> tuple[Description, Description]:
    """Two kinds that occur together in the split."""
    while True:
        first, second = _any_kind(scenes.level, rng), _any_kind(scenes.level, rng)
        if first != second and _holds_pair(scenes, first, second):
            return first, second


def _any_relation(scenes: Scenes, rng: SplitMix64) -> tuple[Description, str, Description]:
    """Two kinds that the split shows in the relation and, elsewhere, in the opposite one."""
    while True:
        relation = RELATIONS[rng.below(len(RELATIONS))]
        first, second = _two_kinds(scenes, rng)
        if all(_holds_pair(scenes, first, second, held) for held in (relation, OPPOSITES[relation])):
            return first, relation, second


def _holds_pair(scenes: Scenes, first: Description, second: Description, relation: str | None = None) -> bool:
    return _split_holds_pair(scenes.level.name, scenes.split, first, second, relation)


@cache
def _split_holds_pair(
    level_name: LevelName, split: Split, first: Description, second: Description, relation: str | None
) -> bool:
    """Whether a split holds a scene of just these two kinds; of `easy` a tenth has only some of the pairs.

    It is asked of texts, before and whatever the answer: a text that one answer could not be shown for is not used.
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


def _other(words: tuple[str, ...], word: str, rng: SplitMix64) -> str:
    return words[(words.index(word) + 1 + rng.below(len(words) - 1)) % len(words)]


def _plural(said: Description) -> str:
    return f"{said}es" if said.shape == "cross" else f"{said}s"


# Two-image statements


@dataclass(frozen=True, eq=False)
class Statement:
    """A sentence about two images and whether it is true of them."""

    left: Scene
    right: Scene
    text: str
    label: bool


class _Claim(NamedTuple):
    text: str
    true_pairs: tuple[tuple[Requirement, Requirement], ...]
    false_pairs: tuple[tuple[Requirement, Requirement], ...]


class Statements:
    """Endless map-style data set of statements; items 2k and 2k + 1 share a text, one of them is true.

    Args:
        level: `easy` or `hard`.
        seed: Which world of statements.
        split: `train`, `val` or `test`; both images are of the split.

    Raises:
        ConfigError: unknown level or split.
    """

    def __init__(self, level: LevelName, seed: int = 0, split: Split = "train") -> None:
        self.scenes = Scenes(level, seed, split)

    def __getitem__(self, index: int) -> Statement:
        """Statement number `index`."""
        group, turn = divmod(index, 2)
        text_rng = self.scenes.rng(group, _STATEMENT_TEXT)
        label = bool(text_rng.below(2)) == bool(turn)
        claim = _CLAIMS[text_rng.below(len(_CLAIMS))](self.scenes, text_rng)
        rng = self.scenes.rng(index, _STATEMENT_SCENE)
        pairs = claim.true_pairs if label else claim.false_pairs
        left, right = (scene_with(self.scenes, requirement, rng) for requirement in pairs[rng.below(len(pairs))])
        return Statement(left, right, claim.text, label)


def _with(*said: Description, but: tuple[Description, ...] = ()) -> Requirement:
    return Requirement(said, no_other=but)


def _claim_one_side(scenes: Scenes, rng: SplitMix64) -> _Claim:
    """The other image shows the object in half of the pairs, whatever is true."""
    said = _any_kind(scenes.level, rng)
    shown, absent = _with(said), _with(but=(said,))
    side = rng.below(2)
    true, false = ((shown, shown), (shown, absent)), ((absent, shown), (absent, absent))
    text = f"the {('left', 'right')[side]} image contains a {said}"
    return _Claim(text, _on_side(true, side), _on_side(false, side))


def _on_side(
    pairs: tuple[tuple[Requirement, Requirement], ...], side: int
) -> tuple[tuple[Requirement, Requirement], ...]:
    return tuple((second, first) for first, second in pairs) if side else pairs


def _claim_both(scenes: Scenes, rng: SplitMix64) -> _Claim:
    said = _any_attribute(scenes.level, rng)
    shown, absent = _with(said), _with(but=(said,))
    false = ((shown, absent), (absent, shown), (absent, absent))
    return _Claim(f"both images contain a {said}", ((shown, shown),), false)


def _claim_exactly_one(scenes: Scenes, rng: SplitMix64) -> _Claim:
    said = _any_attribute(scenes.level, rng)
    shown, absent = _with(said), _with(but=(said,))
    text = f"exactly one image contains a {said}"
    return _Claim(text, ((shown, absent), (absent, shown)), ((shown, shown), (absent, absent)))


def _claim_one_and_other(scenes: Scenes, rng: SplitMix64) -> _Claim:
    first, second = _two_kinds(scenes, rng)
    only_first, only_second = _with(first, but=(second,)), _with(second, but=(first,))
    both, neither = _with(first, second), _with(but=(first, second))
    text = f"one image contains a {first} and the other a {second}"
    true = ((only_first, only_second), (only_second, only_first))
    false = ((only_first, only_first), (only_second, only_second), (both, neither), (neither, both))
    return _Claim(text, true, false)


def _claim_relation(scenes: Scenes, rng: SplitMix64) -> _Claim:
    first, relation, second = _any_relation(scenes, rng)
    holds = Requirement((first, second), (first, second), relation)
    fails = holds._replace(relation=OPPOSITES[relation])
    side = rng.below(2)
    text = f"the {('left', 'right')[side]} image contains a {first} {relation} a {second}"
    return _Claim(
        text, _on_side(((holds, holds), (holds, fails)), side), _on_side(((fails, holds), (fails, fails)), side)
    )


def _claim_number(scenes: Scenes, rng: SplitMix64) -> _Claim:
    fewest, most = (Requirement(num_objects=count) for count in scenes.level.num_objects)
    side = rng.below(2)
    text = f"the {('left', 'right')[side]} image contains more objects than the {('right', 'left')[side]} image"
    false = ((fewest, most), (fewest, fewest), (most, most))
    return _Claim(text, _on_side(((most, fewest),), side), _on_side(false, side))


_CLAIMS = (_claim_one_side, _claim_both, _claim_exactly_one, _claim_one_and_other, _claim_relation, _claim_number)


# Retrieval


def retrieval_set(level: LevelName, size: int, seed: int = 0, split: Split = "test") -> list[Scene]:
    """`size` scenes of two or more objects; each caption is true of its own image only.

    Raises:
        ConfigError: the split holds too few scenes that captions tell apart, or an unknown level or split.
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


class _CaptionIndex:
    """Which facts the chosen scenes show, and which their captions say."""

    def __init__(self) -> None:
        self.showing: dict[tuple[str, ...], set[int]] = defaultdict(set)
        self.saying: dict[tuple[str, ...], list[set[tuple[str, ...]]]] = defaultdict(list)
        self.size = 0

    def add(self, shown: set[tuple[str, ...]], said: set[tuple[str, ...]]) -> None:
        for fact in shown:
            self.showing[fact].add(self.size)
        self.saying[min(said)].append(said)
        self.size += 1

    def conflict(self, shown: set[tuple[str, ...]], said: set[tuple[str, ...]]) -> bool:
        """Whether a chosen scene makes this caption true, or this scene the caption of a chosen one."""
        if set.intersection(*(self.showing[fact] for fact in said)):
            return True
        return any(other <= shown for fact in shown for other in self.saying[fact])


def _facts_shown(scene: Scene, level: LevelName) -> set[tuple[str, ...]]:
    if level == "easy":
        return {(_phrase(item), item.position) for item in scene.objects}
    return {
        _fact(first, relation, second)
        for first in scene.objects
        for second in scene.objects
        for relation in relations(first, second)
    }


def _facts_said(scene: Scene, level: LevelName) -> set[tuple[str, ...]]:
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
    """`a right of b` and `b left of a` are one fact."""
    if relation in ("right of", "below"):
        first, relation, second = second, OPPOSITES[relation], first
    return _phrase(first), relation, _phrase(second)


def _phrase(item: SceneObject) -> str:
    return f"{item.size} {item.color} {item.shape}"


# Binding


@dataclass(frozen=True, eq=False)
class BindingProbe:
    """A caption of two objects in which one clue names an object and one masked word is asked of it."""

    probe_type: ProbeType
    scene: Scene
    words: tuple[str, ...]
    """Of the caption."""
    masked: frozenset[int]
    """Indices of `words` to mask: everything but the clue, `a` and `and`."""
    asked: int
    """Index of `words` to predict, one of `masked`."""
    target: str
    """The named object's word, `words[asked]`."""
    distractor: str
    """The other object's word of the same class."""


_CLUES: dict[ProbeType, tuple[tuple[int, ...], int]] = {
    # Words of "a large red circle top left": which stay visible, which is asked.
    "position_to_color": ((4, 5), 2),
    "position_to_shape": ((4, 5), 3),
    "color_to_shape": ((2,), 3),
    "shape_to_color": ((3,), 2),
}
_PHRASE_WORDS = 6


def binding_probes(scenes: Scenes, num_scenes: int) -> Iterator[BindingProbe]:
    """Probes of every type on the first `num_scenes` scenes with two objects of different colours and shapes.

    A model that knows what is in the image but not what belongs together answers target and distractor alike.
    The named object is the first of the caption in half of the probes.

    Raises:
        ConfigError: level `hard`, whose captions do not give positions.
    """
    if scenes.level.name != "easy":
        raise ConfigError(f"binding probes need scenes of level 'easy', not '{scenes.level.name}'")
    index = found = 0
    while found < num_scenes:
        scene = scenes[index]
        if _tells_apart(scene.objects):
            rng = scenes.rng(index, _PROBE)
            for probe_type in _CLUES:
                yield _probe(scene, probe_type, named=rng.below(2))
            found += 1
        index += 1


def _tells_apart(objects: tuple[SceneObject, ...]) -> bool:
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
