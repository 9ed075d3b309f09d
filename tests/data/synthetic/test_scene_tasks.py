import re
from collections import Counter, defaultdict

import pytest

from eve_ds.config import ConfigError
from eve_ds.data.synthetic.scene_tasks import (
    QUESTION_TYPES,
    Questions,
    Statements,
    answers,
    binding_probes,
    chance,
    retrieval_set,
    unbound_accuracy,
)
from eve_ds.data.synthetic.scenes import COLORS, SHAPES, Scenes, split_of, word_class

LEVEL_NAMES = ["easy", "hard"]
CASES = [(level, question_type) for level in LEVEL_NAMES for question_type in QUESTION_TYPES]


# An independent reader of the texts: finds objects by words and judges relations by the middles of their boxes.


def matching(scene, words):
    """Objects that fit words such as `red circle`, `object`, `crosses` or `object at the top left`."""
    singular = re.sub(r"\b(circle|square|triangle|ring|object)s\b", r"\1", words).replace("crosses", "cross")
    kind, _, position = singular.partition(" at the ")
    fits = []
    for item in scene.objects:
        known = {item.shape, item.color, "object"}
        if set(kind.split()) <= known and position in ("", where(item)):
            fits.append(item)
    return fits


def middle(item):
    left, top, right, bottom = item.box
    return (left + right) / 2, (top + bottom) / 2


def where(item):
    grid = 2 if item.box[2] - item.box[0] >= 24 else 3  # objects of `hard` are 18 pixels wide at most
    columns = {2: ["left", "right"], 3: ["left", "center", "right"]}[grid]
    rows = {2: ["top", "bottom"], 3: ["top", "middle", "bottom"]}[grid]
    x, y = middle(item)
    return f"{rows[int(y * grid // 64)]} {columns[int(x * grid // 64)]}"


def stand(first, relation, second):
    (x1, y1), (x2, y2) = middle(first), middle(second)
    return {"left of": x2 - x1, "right of": x1 - x2, "above": y2 - y1, "below": y1 - y2}[relation] > 10


def one(items):
    assert len(items) == 1
    return items[0]


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


def truth_of(left, right, text):
    if match := re.fullmatch(r"the (left|right) image contains more objects than the (left|right) image", text):
        assert match[1] != match[2]
        ahead = len(left.objects) - len(right.objects)
        return (ahead if match[1] == "left" else -ahead) > 0
    if match := re.fullmatch(r"the (left|right) image contains a (.+) (left of|right of|above|below) a (.+)", text):
        image = left if match[1] == "left" else right
        pairs = [(a, b) for a in matching(image, match[2]) for b in matching(image, match[4])]
        return any(stand(a, match[3], b) for a, b in pairs)
    if match := re.fullmatch(r"the (left|right) image contains a (.+)", text):
        return bool(matching(left if match[1] == "left" else right, match[2]))
    if match := re.fullmatch(r"one image contains a (.+) and the other a (.+)", text):
        shows = [[bool(matching(image, match[which])) for which in (1, 2)] for image in (left, right)]
        return (shows[0][0] and shows[1][1]) or (shows[1][0] and shows[0][1])
    match = re.fullmatch(r"(both images contain|exactly one image contains) a (.+)", text)
    count = sum(bool(matching(image, match[2])) for image in (left, right))
    return count == (2 if match[1].startswith("both") else 1)


def lookup_accuracy(train, evaluated):
    """Accuracy of the most frequent training answer per key; an unseen key gets the most frequent answer overall."""
    counts, overall = defaultdict(Counter), Counter()
    for key, answer in train:
        counts[key][answer] += 1
        overall[answer] += 1
    right = sum((counts.get(key) or overall).most_common(1)[0][0] == answer for key, answer in evaluated)
    return right / len(evaluated)


# Questions


@pytest.mark.parametrize(("level", "question_type"), CASES)
def test_text_only_lookup_scores_exactly_chance(level, question_type):
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
def test_every_text_is_asked_once_with_every_answer(level, question_type):
    """Stronger than any lookup: within a group the text is constant and the answers are all there."""
    possible = answers(level, question_type)
    questions = Questions(level, 5, "val", (question_type,))
    first_answers = Counter()
    for group in range(60):
        items = [questions[group * len(possible) + turn] for turn in range(len(possible))]
        assert len({item.question for item in items}) == 1
        assert sorted(item.answer for item in items) == sorted(possible)
        first_answers[items[0].answer] += 1
    assert len(first_answers) > 1


def test_lookup_finds_a_leak_when_there_is_one():
    """The check above can fail: with the answer in the text the lookup is right."""
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


def test_question_types_take_turns():
    questions = Questions("easy")
    assert [questions[index].question_type for index in range(10)] == [*QUESTION_TYPES, *QUESTION_TYPES]
    assert questions[7].question == Questions("easy")[7].question
    assert questions[7].scene.caption == Questions("easy")[7].scene.caption


def test_chance_of_every_type():
    assert [chance("easy", kind) for kind in QUESTION_TYPES] == [1 / 8, 1 / 4, 1 / 3, 1 / 2, 1 / 2]
    assert [chance("hard", kind) for kind in QUESTION_TYPES] == [1 / 8, 1 / 5, 1 / 4, 1 / 2, 1 / 2]


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_count_of_objects_does_not_tell_the_answer_of_count_questions(level):
    questions = Questions(level, question_types=("count",))
    assert {len(questions[index].scene.objects) for index in range(100)} == {2 if level == "easy" else 3}


@pytest.mark.parametrize("level", LEVEL_NAMES)
@pytest.mark.parametrize("question_type", ["color", "shape"])
def test_unbound_accuracy_is_what_a_random_object_scores(level, question_type):
    questions = Questions(level, 2, question_types=(question_type,))
    count, expected = 1600, 0.0
    for index in range(count):
        item = questions[index]
        named = [getattr(thing, question_type) == item.answer for thing in item.scene.objects]
        expected += sum(named) / len(named) / count
    assert unbound_accuracy(level, question_type) == pytest.approx(expected, abs=0.03)
    if level == "easy":
        assert unbound_accuracy(level, question_type) == {"color": 0.5625, "shape": 0.625}[question_type]


def test_half_of_the_absent_kinds_have_their_color_and_shape_on_two_objects():
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


# Statements


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_statement_is_shown_once_true_and_once_false(level):
    train = [(item.text, item.label) for item in map(Statements(level, 0, "train").__getitem__, range(600))]
    for split in ("val", "test"):
        statements = Statements(level, 0, split)
        items = [statements[index] for index in range(300)]
        first_true = 0
        for first, second in zip(items[::2], items[1::2], strict=True):
            assert first.text == second.text
            assert first.label != second.label
            first_true += first.label
        assert 45 < first_true < 105
        assert lookup_accuracy(train, [(item.text, item.label) for item in items]) == 0.5


@pytest.mark.parametrize("level", LEVEL_NAMES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_statement_label_is_right_and_images_are_of_the_split(level, split):
    statements = Statements(level, 1, split)
    for index in range(400):
        item = statements[index]
        assert truth_of(item.left, item.right, item.text) == item.label, item.text
        assert {split_of(item.left.objects), split_of(item.right.objects)} == {split}


# Retrieval


@pytest.mark.parametrize(("level", "split"), [("easy", "test"), ("hard", "val")])
def test_retrieval_captions_are_true_of_one_image_only(level, split):
    def says(caption, scene):
        things = [f"{item.size} {item.color} {item.shape}" for item in scene.objects]
        if level == "easy":
            there = {f"a {thing} {where(item)}" for thing, item in zip(things, scene.objects, strict=True)}
            return set(caption.split(" and ")) == there
        first, *clauses = re.split(r" (?=left of|right of|above|below)", caption.replace(" and ", " "))
        firsts = [item for thing, item in zip(things, scene.objects, strict=True) if f"a {thing}" == first]
        parts = [clause.split(" a ") for clause in clauses]
        return any(
            all(
                any(
                    said == thing and stand(base, held, item) for thing, item in zip(things, scene.objects, strict=True)
                )
                for held, said in parts
            )
            for base in firsts
        )

    scenes = retrieval_set(level, 150, seed=1, split=split)
    assert len({scene.caption for scene in scenes}) == 150
    for wanted, scene in enumerate(scenes):
        assert split_of(scene.objects) == split
        assert len(scene.objects) >= 2
        assert [index for index, other in enumerate(scenes) if says(scene.caption, other)] == [wanted]


def test_too_large_a_retrieval_set_is_refused():
    with pytest.raises(ConfigError, match="retrieval set of 2600 scenes: split 'val' of level 'easy' gave only 2"):
        retrieval_set("easy", 2600, split="val")


# Binding


def test_binding_probe_shows_one_clue_and_nothing_of_the_other_object():
    probes = list(binding_probes(Scenes("easy", split="val"), 40))
    assert Counter(probe.probe_type for probe in probes) == dict.fromkeys(
        ["position_to_color", "position_to_shape", "color_to_shape", "shape_to_color"], 40
    )
    named_first = 0
    for probe in probes:
        clue_class, _, asked_class = probe.probe_type.partition("_to_")
        assert " ".join(probe.words) == probe.scene.caption
        visible = [word for i, word in enumerate(probe.words) if i not in probe.masked]
        clue = [word for word in visible if word not in ("a", "and")]
        assert {word_class(word) for word in clue} == {clue_class}
        assert len(clue) == (2 if clue_class == "position" else 1)
        named = one(
            [item for item in probe.scene.objects if {*clue} <= {item.color, item.shape, *item.position.split()}]
        )
        other = one([item for item in probe.scene.objects if item is not named])
        assert probe.asked in probe.masked
        assert probe.words[probe.asked] == probe.target == getattr(named, asked_class)
        assert probe.distractor == getattr(other, asked_class) != probe.target
        # The asked word is in the phrase of the named object, where the clue is.
        first_phrase = probe.asked < probe.words.index("and")
        assert first_phrase == (named is probe.scene.objects[0])
        named_first += first_phrase
    assert 55 < named_first < 105


def test_what_a_task_shows_names_objects_in_random_order():
    """Reading order is for captions of training alone: here a place in the caption must say nothing of the image."""
    easy = Scenes("easy", split="val")
    shown = {
        "probes": [probe.scene for probe in binding_probes(easy, 400)][::4],
        "questions": [Questions("easy", split="val")[index].scene for index in range(800)],
        "statements": [Statements("easy", split="val")[index].left for index in range(800)],
        "retrieval": retrieval_set("easy", 400, split="val"),
    }
    for name, scenes in shown.items():
        pairs = [scene.objects for scene in scenes if len(scene.objects) == 2]
        in_order = sum((first.row, first.column) < (second.row, second.column) for first, second in pairs)
        assert len(pairs) > 300
        assert abs(in_order / len(pairs) - 0.5) < 2.5 / len(pairs) ** 0.5, name  # five standard deviations


def test_binding_probes_need_positions_in_the_caption():
    with pytest.raises(ConfigError, match="binding probes need scenes of level 'easy', not 'hard'"):
        next(binding_probes(Scenes("hard"), 1))


def test_answers_are_caption_words():
    assert answers("easy", "color") == tuple(COLORS)
    assert answers("hard", "shape") == SHAPES
