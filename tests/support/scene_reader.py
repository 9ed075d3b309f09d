"""Independent reader of texts about scenes: finds objects by words and judges relations by the centers of boxes."""

import re
from collections import Counter, defaultdict


def matching(scene, words):
    """Return the objects that fit words such as `red circle`, `object`, `crosses` or `object at the top left`."""
    singular = re.sub(r"\b(circle|square|triangle|ring|object)s\b", r"\1", words).replace("crosses", "cross")
    kind, _, position = singular.partition(" at the ")
    fits = []
    for item in scene.objects:
        known = {item.shape, item.color, "object"}
        if set(kind.split()) <= known and position in ("", where(item)):
            fits.append(item)
    return fits


def center(item):
    """Return the center (x, y) of an object in pixels."""
    left, top, right, bottom = item.box
    return (left + right) / 2, (top + bottom) / 2


def where(item):
    """Return the position of an object in words, such as `top left`."""
    grid = 2 if item.box[2] - item.box[0] >= 24 else 3  # objects of `hard` are 18 pixels wide at most
    columns = {2: ["left", "right"], 3: ["left", "center", "right"]}[grid]
    rows = {2: ["top", "bottom"], 3: ["top", "middle", "bottom"]}[grid]
    x, y = center(item)
    return f"{rows[int(y * grid // 64)]} {columns[int(x * grid // 64)]}"


def stand(first, relation, second):
    """Return whether the first object has the relation to the second."""
    (x1, y1), (x2, y2) = center(first), center(second)
    return {"left of": x2 - x1, "right of": x1 - x2, "above": y2 - y1, "below": y1 - y2}[relation] > 10


def one(items):
    """Return the only item."""
    assert len(items) == 1
    return items[0]


def lookup_accuracy(train, evaluated):
    """Return the accuracy of the most frequent training answer per key; unseen keys get the most frequent overall."""
    counts, overall = defaultdict(Counter), Counter()
    for key, answer in train:
        counts[key][answer] += 1
        overall[answer] += 1
    right = sum((counts.get(key) or overall).most_common(1)[0][0] == answer for key, answer in evaluated)
    return right / len(evaluated)
