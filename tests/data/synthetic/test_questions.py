import re
from collections import Counter

import pytest
from scene_reader import lookup_accuracy, matching, one, stand

from eve_ds.config import ConfigError
from eve_ds.data.synthetic.questions import QUESTION_TYPES, Questions, answers, chance, unbound_accuracy
from eve_ds.data.synthetic.scenes import COLORS, SHAPES, split_of

LEVEL_NAMES = ["easy", "hard"]
CASES = [(level, question_type) for level in LEVEL_NAMES for question_type in QUESTION_TYPES]


def answer_of(scene, question):
    text = question.removesuffix("?")
    if match := re.fullmatch(r"what (color|shape) is the (.+)", text):
        return getattr(one(matching(scene, match[2])), match[1])
    if match := re.fullmatch(r"how many (.+) are there", text):
        return ["zero", "one", "two", "three"][len(matching(scene, match[1]))]
    if match := re.fullmatch(r"is there an? (.+)", text):
        return "yes" if matching(scene, match[1]) else "no"
    match = re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)", text)
    first, second = one(matching(scene, match[1])), one(matching(scene, match[3]))
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[match[2]]
    holds = stand(first, match[2], second)
    assert holds or stand(first, opposite, second)
    return "yes" if holds else "no"


@pytest.mark.parametrize(("level", "question_type"), CASES)
def test_accuracy_of_a_lookup_by_text_equals_chance(level, question_type):
    size = 60 * len(answers(level, question_type))
    items = {
        split: [Questions(level, 0, split, (question_type,))[index] for index in range(size)]
        for split in ("train", "val", "test")
    }
    for split in ("val", "test"):
        for key in (lambda item: item.question, lambda item: item.question_type, lambda item: item.question[:12]):
            train, evaluated = ([(key(item), item.answer) for item in items[name]] for name in ("train", split))
            assert lookup_accuracy(train, evaluated) == pytest.approx(chance(level, question_type))


@pytest.mark.parametrize(("level", "question_type"), CASES)
def test_every_text_occurs_once_with_every_answer(level, question_type):
    """Stronger than any lookup: all items of a group share one text, and each answer occurs once."""
    possible = answers(level, question_type)
    questions = Questions(level, 5, "val", (question_type,))
    first_answers = Counter()
    for group in range(60):
        items = [questions[group * len(possible) + turn] for turn in range(len(possible))]
        assert len({item.question for item in items}) == 1
        assert sorted(item.answer for item in items) == sorted(possible)
        first_answers[items[0].answer] += 1
    assert len(first_answers) > 1


def test_lookup_detects_a_leak():
    """The checks above can fail: if the text contains the answer, the lookup is always right."""
    items = [Questions("easy", 0, "train", ("existence",))[index] for index in range(200)]
    assert lookup_accuracy([(i.answer, i.answer) for i in items], [(i.answer, i.answer) for i in items]) == 1


@pytest.mark.parametrize(("level", "question_type"), CASES)
@pytest.mark.parametrize("split", ["train", "val"])
def test_answers_are_true_of_scenes_of_the_split(level, question_type, split):
    questions = Questions(level, 1, split, (question_type,))
    texts = set()
    for index in range(160):
        item = questions[index]
        assert item.question_type == question_type
        assert split_of(item.scene.objects) == split
        assert answer_of(item.scene, item.question) == item.answer, (item.question, item.scene.objects)
        texts.add(item.question)
    assert len(texts) >= 6


def test_question_types_alternate():
    questions = Questions("easy")
    assert [questions[index].question_type for index in range(10)] == [*QUESTION_TYPES, *QUESTION_TYPES]
    assert questions[7].question == Questions("easy")[7].question
    assert questions[7].scene.caption == Questions("easy")[7].scene.caption


def test_chance_of_every_type():
    assert [chance("easy", kind) for kind in QUESTION_TYPES] == [1 / 8, 1 / 4, 1 / 3, 1 / 2, 1 / 2]
    assert [chance("hard", kind) for kind in QUESTION_TYPES] == [1 / 8, 1 / 5, 1 / 4, 1 / 2, 1 / 2]


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_scenes_of_count_questions_all_have_the_same_number_of_objects(level):
    questions = Questions(level, question_types=("count",))
    assert {len(questions[index].scene.objects) for index in range(100)} == {2 if level == "easy" else 3}


@pytest.mark.parametrize("level", LEVEL_NAMES)
@pytest.mark.parametrize("question_type", ["color", "shape"])
def test_unbound_accuracy_equals_the_accuracy_of_naming_a_random_object(level, question_type):
    questions = Questions(level, 2, question_types=(question_type,))
    count, expected = 1600, 0.0
    for index in range(count):
        item = questions[index]
        named = [getattr(thing, question_type) == item.answer for thing in item.scene.objects]
        expected += sum(named) / len(named) / count
    assert unbound_accuracy(level, question_type) == pytest.approx(expected, abs=0.03)
    if level == "easy":
        assert unbound_accuracy(level, question_type) == {"color": 0.5625, "shape": 0.625}[question_type]


def test_half_of_the_scenes_without_a_kind_show_its_color_and_its_shape_on_two_objects():
    questions, apart = Questions("easy", question_types=("existence",)), []
    for index in range(1200):
        item = questions[index]
        match = re.fullmatch(r"is there a (\w+) (\w+)\?", item.question)
        if match and match[2] in SHAPES and item.answer == "no":
            apart.append(bool(matching(item.scene, match[1]) and matching(item.scene, match[2])))
    assert 0.4 < sum(apart) / len(apart) < 0.75


def test_unknown_question_type_is_named():
    with pytest.raises(ConfigError, match="question type 'why' is unknown; use one of: color, shape, count"):
        Questions("easy", question_types=("why",))


def test_answers_are_caption_words():
    assert answers("easy", "color") == tuple(COLORS)
    assert answers("hard", "shape") == SHAPES
