"""Questions about scenes.

Each question text appears once with every possible answer, and only then is a scene built that makes the answer true.
No function of the text alone therefore beats chance, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from eve_ds.config import ConfigError
from eve_ds.data.synthetic.requirements import (
    COLOR_NAMES,
    Description,
    Requirement,
    draw_attribute,
    draw_color,
    draw_kind,
    draw_relation,
    draw_shape,
    holds_pair,
    scene_with,
)
from eve_ds.data.synthetic.scenes import (
    OPPOSITES,
    QUESTION_SCENE_STREAM,
    QUESTION_TEXT_STREAM,
    Level,
    LevelName,
    Scene,
    Scenes,
    Split,
    SplitMix64,
    get_level,
)

QuestionType = Literal["color", "shape", "count", "existence", "relation"]

QUESTION_TYPES: tuple[QuestionType, ...] = get_args(QuestionType)
NUMBERS = ("zero", "one", "two", "three")


@dataclass(frozen=True, eq=False)
class VisualQuestion:
    """A question about a scene; `answer` is one of the :func:`answers` of its type."""

    scene: Scene
    question: str
    answer: str
    question_type: QuestionType


def answers(level: LevelName, question_type: QuestionType) -> tuple[str, ...]:
    """Return the possible answers, equally frequent for every single question text.

    Raises:
        ConfigError: unknown level or question type.
    """
    known = get_level(level)
    by_type = {
        "color": COLOR_NAMES,
        "shape": known.shapes,
        "count": NUMBERS[: max(known.num_objects) + 1],
        "existence": ("yes", "no"),
        "relation": ("yes", "no"),
    }
    if question_type not in by_type:
        raise ConfigError(f"question type '{question_type}' is unknown; use one of: {', '.join(QUESTION_TYPES)}")
    return by_type[question_type]


def chance(level: LevelName, question_type: QuestionType) -> float:
    """Return the accuracy of any answer that depends on the text alone."""
    return 1 / len(answers(level, question_type))


def unbound_accuracy(level: LevelName, question_type: Literal["color", "shape"]) -> float:
    """Return the accuracy of naming the color (shape) of a random object of the scene.

    A model reaches it if it knows the attributes in the image but not which object has them: .5625 for colors and .625
    for shapes at level `easy`. Compare accuracies of color and shape questions with it.
    """
    counts = [count for count in get_level(level).num_objects if count >= 2]
    by_luck = chance(level, question_type)
    return sum(1 / count + (1 - 1 / count) * by_luck for count in counts) / len(counts)


class Questions:
    """Endless map-style data set of questions; types alternate, so any multiple of their number is balanced.

    Item `index` has type `question_types[index % n]`. The items of one type come in groups, one item per possible
    answer; all items of a group share one text and have different answers.

    Args:
        level: `easy` or `hard`.
        seed: seed of the generated world.
        split: `train`, `val` or `test`, the splits of :class:`eve_ds.data.synthetic.scenes.Scenes`.
        question_types: types to alternate.

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
        """Return question number `index`."""
        turn, which = divmod(index, len(self.question_types))
        question_type = self.question_types[which]
        possible = self.answers[question_type]
        group, turn = divmod(turn, len(possible))
        stream = QUESTION_TYPES.index(question_type)
        # Every item of the group draws the same text from the same numbers; the first answer of a group is random.
        text_rng = self.scenes.rng(group, QUESTION_TEXT_STREAM + stream)
        answer = possible[(text_rng.below(len(possible)) + turn) % len(possible)]
        scene_rng = self.scenes.rng(group * len(possible) + turn, QUESTION_SCENE_STREAM + stream)
        text, requirement = _ASK[question_type](self.scenes, answer, text_rng, scene_rng)
        return VisualQuestion(scene_with(self.scenes, requirement, scene_rng), text, answer, question_type)


def _ask_color(scenes: Scenes, answer: str, text_rng: SplitMix64, _: SplitMix64) -> tuple[str, Requirement]:
    if text_rng.below(2):
        position, cell = _draw_position(scenes.level, text_rng)
        named = Description(color=answer, cell=cell)
        return f"what color is the object at the {position}?", Requirement((named,))
    clue = Description(shape=draw_shape(scenes.level, text_rng))
    return f"what color is the {clue}?", Requirement((clue._replace(color=answer),), no_other=(clue,))


def _ask_shape(scenes: Scenes, answer: str, text_rng: SplitMix64, _: SplitMix64) -> tuple[str, Requirement]:
    if text_rng.below(2):
        position, cell = _draw_position(scenes.level, text_rng)
        named = Description(shape=answer, cell=cell)
        return f"what shape is the object at the {position}?", Requirement((named,))
    clue = Description(color=draw_color(text_rng))
    return f"what shape is the {clue}?", Requirement((clue._replace(shape=answer),), no_other=(clue,))


def _ask_count(scenes: Scenes, answer: str, text_rng: SplitMix64, _: SplitMix64) -> tuple[str, Requirement]:
    """Ask for a count; scenes have the level's largest number of objects, which then reveals no answer."""
    counted = draw_attribute(scenes.level, text_rng)
    named = (counted,) * NUMBERS.index(answer)
    return f"how many {_plural(counted)} are there?", Requirement(
        named, (counted,), num_objects=max(scenes.level.num_objects)
    )


def _ask_existence(scenes: Scenes, answer: str, text_rng: SplitMix64, scene_rng: SplitMix64) -> tuple[str, Requirement]:
    form = text_rng.below(3)
    if form == 0:
        position, cell = _draw_position(scenes.level, text_rng)
        sought, text = Description(cell=cell), f"is there an object at the {position}?"
    else:
        sought = draw_attribute(scenes.level, text_rng) if form == 1 else draw_kind(scenes.level, text_rng)
        text = f"is there a {sought}?"
    if answer == "yes":
        return text, Requirement((sought,))
    return text, _absent(scenes, sought, scene_rng)


def _absent(scenes: Scenes, sought: Description, rng: SplitMix64) -> Requirement:
    """Exclude the described object; in half of the scenes two other objects have its color and its shape."""
    if not (sought.color and sought.shape and rng.below(2)):
        return Requirement(no_other=(sought,))
    while True:
        other_color = _other(COLOR_NAMES, sought.color, rng)
        other_shape = _other(scenes.level.shapes, sought.shape, rng)
        apart = (Description(sought.color, other_shape), Description(other_color, sought.shape))
        if holds_pair(scenes, *apart):
            return Requirement(apart, no_other=(sought,))


def _ask_relation(scenes: Scenes, answer: str, text_rng: SplitMix64, _: SplitMix64) -> tuple[str, Requirement]:
    first, relation, second = draw_relation(scenes, text_rng)
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


def _draw_position(level: Level, rng: SplitMix64) -> tuple[str, int]:
    """Draw a cell; return its row and column in words, and its number."""
    cell = rng.below(level.grid**2)
    row, column = divmod(cell, level.grid)
    return f"{level.rows[row]} {level.columns[column]}", cell


def _other(words: tuple[str, ...], word: str, rng: SplitMix64) -> str:
    """Draw one of the words other than `word`."""
    return words[(words.index(word) + 1 + rng.below(len(words) - 1)) % len(words)]


def _plural(said: Description) -> str:
    return f"{said}es" if said.shape == "cross" else f"{said}s"
