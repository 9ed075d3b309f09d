import re

import pytest
from scene_reader import lookup_accuracy, matching, stand

from eve_ds.data.synthetic.scenes import split_of
from eve_ds.data.synthetic.statements import Statements

LEVEL_NAMES = ["easy", "hard"]


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


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_every_statement_occurs_once_true_and_once_false(level):
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
def test_labels_are_correct_and_images_belong_to_the_split(level, split):
    statements = Statements(level, 1, split)
    for index in range(400):
        item = statements[index]
        assert truth_of(item.left, item.right, item.text) == item.label, item.text
        assert {split_of(item.left.objects), split_of(item.right.objects)} == {split}
