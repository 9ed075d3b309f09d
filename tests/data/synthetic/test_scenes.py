import hashlib
import time
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest

from eve_ds.config import ConfigError
from eve_ds.data.synthetic.scenes import COLORS, LEVELS, SHAPES, SceneObject, Scenes, SplitMix64, split_of, word_class

LEVEL_NAMES = ["easy", "hard"]


def described(scene):
    """Return the contents of a scene without pose, background and order."""
    return frozenset((item.shape, item.color, item.size, item.row, item.column) for item in scene.objects)


def inside(shape, x, y, radius):
    """Independent definition of the shapes, for a pixel center relative to the object's center."""
    if shape == "square":
        return abs(x) <= radius and abs(y) <= radius
    if shape == "triangle":  # apex up, between the two slanted edges
        return abs(y) <= radius and -(y + radius) / 2 <= x <= (y + radius) / 2
    if shape == "cross":
        return (abs(x) <= radius / 3 and abs(y) <= radius) or (abs(y) <= radius / 3 and abs(x) <= radius)
    squared = x * x + y * y
    return squared <= radius * radius and (shape == "circle" or squared > radius * radius / 4)


def test_splitmix64_equals_the_published_sequence():
    rng = SplitMix64()
    # Outputs for seed 0, the test vector that implementations of splitmix64 share.
    assert [rng.below(2**64) for _ in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_sample_is_a_function_of_seed_split_and_index(level):
    forward = Scenes(level, seed=3, split="val")
    backward = Scenes(level, seed=3, split="val")
    backward_samples = [backward[i] for i in reversed(range(50))][::-1]
    for index, other in enumerate(backward_samples):
        scene = forward[index]
        assert scene.caption == other.caption
        assert scene.objects == other.objects
        np.testing.assert_array_equal(scene.image, other.image)
    for different in (Scenes(level, seed=4, split="val"), Scenes(level, seed=3, split="test")):
        assert sum(different[i].caption == forward[i].caption for i in range(50)) < 5


@pytest.mark.parametrize(
    ("level", "digest"),
    [("easy", "6c1b6e38556ff9c8"), ("hard", "f000037e1e658608")],
)
def test_samples_do_not_change_between_versions(level, digest):
    scenes, state = Scenes(level), hashlib.sha256()
    for index in range(64):
        state.update(scenes[index].image.tobytes() + scenes[index].caption.encode())
    assert state.hexdigest()[:16] == digest


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_image_consists_of_the_objects_and_a_flat_background(level):
    scenes = Scenes(level)
    for index in range(40):
        scene = scenes[index]
        assert scene.image.shape == (64, 64, 3)
        assert scene.image.dtype == np.uint8
        background = None
        for row in range(64):
            for column in range(64):
                here = [
                    item.color
                    for item in scene.objects
                    if inside(
                        item.shape,
                        column + 0.5 - (item.box[0] + item.box[2]) / 2,
                        row + 0.5 - (item.box[1] + item.box[3]) / 2,
                        (item.box[2] - item.box[0]) / 2,
                    )
                ]
                pixel = tuple(scene.image[row, column].tolist())
                assert len(here) <= 1
                assert scene.foreground[row, column] == bool(here)
                if here:
                    assert pixel == COLORS[here[0]]
                else:
                    background = background or pixel
                    assert pixel == background
        assert background not in COLORS.values()


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_objects_lie_in_their_own_cells_in_the_poses_of_the_level(level):
    scenes, cell = Scenes(level), 64 / LEVELS[level].grid
    poses = Counter()
    for index in range(3000):
        objects = scenes[index].objects
        assert len({(item.row, item.column) for item in objects}) == len(objects)
        for item in objects:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 64
            assert int((left + right) / 2 // cell) == item.column
            assert int((top + bottom) / 2 // cell) == item.row
            poses[item.size, right - left, item.row, item.column, left, top] += 1
    if level == "easy":  # in each of 4 quadrants: 4 poses of small objects, 24 pixels wide, one of large ones, 30 wide
        assert len(poses) == 4 * (4 + 1)
        assert {(size, width) for size, width, *_ in poses} == {("small", 24), ("large", 30)}
    else:  # 7 x 7 and 3 x 3 shifts in each of 9 cells
        assert len(poses) == 9 * (49 + 9)


def test_easy_caption_gives_size_color_shape_and_position_of_every_object():
    scenes = Scenes("easy")
    for index in range(500):
        scene = scenes[index]
        said = [tuple(phrase.split()) for phrase in scene.caption.split(" and ")]
        rows, columns = ("top", "bottom"), ("left", "right")
        assert said == [("a", o.size, o.color, o.shape, rows[o.row], columns[o.column]) for o in scene.objects]
    assert {len(scenes[index].objects) for index in range(50)} == {1, 2}


def test_hard_caption_states_relations_that_hold_in_the_image():
    scenes = Scenes("hard")
    seen = Counter()
    for index in range(1000):
        scene = scenes[index]
        first, *others = scene.objects
        rest = scene.caption.removeprefix(f"a {first.size} {first.color} {first.shape} ")
        clauses = rest.split(" and ")
        assert len(clauses) == len(others)
        for clause, other in zip(clauses, others, strict=True):
            relation, phrase = clause.split(" a ")
            assert phrase == f"{other.size} {other.color} {other.shape}"
            right = (first.box[0] + first.box[2] - other.box[0] - other.box[2]) / 2
            down = (first.box[1] + first.box[3] - other.box[1] - other.box[3]) / 2
            amount = {"left of": -right, "right of": right, "above": -down, "below": down}[relation]
            assert amount > 10
            seen[relation] += 1
    assert min(seen.values()) > 0.2 * sum(seen.values())


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_attributes_are_uniform(level):
    scenes, counts = Scenes(level), Counter()
    total = 0
    for index in range(8000):
        for item in scenes[index].objects:
            total += 1
            counts.update([item.shape, item.color, item.size, (item.row, item.column)])
    for values, number in (
        (LEVELS[level].shapes, len(LEVELS[level].shapes)),
        (COLORS, 8),
        (("small", "large"), 2),
        ([(r, c) for r in range(LEVELS[level].grid) for c in range(LEVELS[level].grid)], LEVELS[level].grid ** 2),
    ):
        share = 1 / number
        # Five standard errors of a share, and 2 % for the contents that belong to other splits.
        tolerance = 5 * (share * (1 - share) / total) ** 0.5 + 0.02 * share
        for value in values:
            assert abs(counts[value] / total - share) < tolerance, value


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_splits_share_no_scene_under_any_seed(level):
    seen = {split: set() for split in ("train", "val", "test")}
    for split, descriptions in seen.items():
        for seed in (0, 1):
            scenes = Scenes(level, seed, split)
            descriptions.update(described(scenes[index]) for index in range(3000))
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    # Large enough to find an overlap: level `easy` shows a large part of val.
    assert len(seen["train"]) > 2500
    assert len(seen["val"]) > 1200


def test_splits_divide_all_easy_scenes_eight_to_one_to_one():
    kinds = list(product(SHAPES[:4], COLORS, ("small", "large")))
    single = [
        [SceneObject(*kind, row, column, "", (0, 0, 0, 0)) for kind in kinds] for row in range(2) for column in range(2)
    ]
    counts = Counter(split_of([item]) for cell in single for item in cell)
    for one, other in combinations(single, 2):
        counts.update(split_of(pair) for pair in product(one, other))
    assert sum(counts.values()) == 4 * 64 + 6 * 64**2
    for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(counts[split] / sum(counts.values()) - share) < 0.01, split


def test_split_does_not_depend_on_order_pose_or_background():
    scenes = Scenes("easy", split="test")
    for index in range(200):
        objects = scenes[index].objects
        assert split_of(objects) == "test"
        assert split_of(objects[::-1]) == "test"
        assert split_of([item._replace(box=(0, 0, 24, 24)) for item in objects]) == "test"


def test_word_class_of_every_caption_word():
    words = {word for level in LEVEL_NAMES for i in range(500) for word in Scenes(level)[i].caption.split()}
    assert {word for word in words if word_class(word) is None} == {"a", "and", "of"}
    assert {word for word in words if word_class(word) == "color"} == set(COLORS)
    assert {word for word in words if word_class(word) == "shape"} == set(SHAPES)
    assert {word for word in words if word_class(word) == "size"} == {"small", "large"}
    assert {word for word in words if word_class(word) == "position"} == {
        *("top", "bottom", "left", "right", "above", "below")
    }
    assert word_class("middle") == word_class("center") == "position"
    assert word_class("dog") is None


def test_errors_name_the_bad_argument():
    with pytest.raises(ConfigError, match="scenes level 'esay' is unknown; use one of: easy, hard"):
        Scenes("esay")
    with pytest.raises(ConfigError, match="scenes split 'dev' is unknown; use one of: train, val, test"):
        Scenes("easy", split="dev")
    with pytest.raises(IndexError, match=r"scene index \(-1\) must not be negative"):
        Scenes("easy")[-1]


def test_5000_scenes_are_drawn_per_cpu_second():
    """The target is 10,000 pairs per CPU-second (30,000 measured); the threshold is half of it for busy machines."""
    scenes, best = Scenes("easy"), 0.0
    for _ in range(3):
        start = time.process_time()
        for index in range(1500):
            _ = scenes[index].image
        best = max(best, 1500 / (time.process_time() - start))
    assert best > 5000
