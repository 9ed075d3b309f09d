"""Boxes: images and truth against the real corpus if EVE_DS_TEST_DATA names it, predicates against plain loops."""

import io
import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import boxes as boxes_module
import numpy as np
import pytest
from boxes import (
    BOX_SIDE,
    COLORS,
    MAX_BLOCKS,
    MAX_ITEMS,
    SHAPES,
    SIZES,
    Boxes,
    BoxStatements,
    Item,
    boxes_corpus,
    draw_boxes,
    draw_caption,
    kind_of,
    rearrange,
    render,
    split_of,
    statement,
    statements,
    truth,
    vocabulary,
)
from PIL import Image
from write import BoxSource, write_statements

from eve_ds.config import ConfigError, load_config, parse_config
from eve_ds.data.order import Place
from eve_ds.data.shard_writer import WriterOptions, write_shards
from eve_ds.data.sources import open_sources
from eve_ds.data.synthetic.scenes import SplitMix64
from eve_ds.data.tokenizer import load_tokenizer, train_tokenizer
from eve_ds.tasks.load_examples import load_examples

HERE = Path(__file__).parent
TEST_DATA = os.environ.get("EVE_DS_TEST_DATA")
needs_corpus = pytest.mark.skipif(not TEST_DATA, reason="EVE_DS_TEST_DATA names no folder with the NLVR corpus")
KINDS = ["tower", "scatter"]
SPLITS = ["train", "val", "test"]
NUMBERS = {word: n for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"])}
NUMBERS |= {str(n): n for n in range(9)} | {"a": 1, "an": 1, "no": 0}


def same(boxes):
    """Return the contents of an image, independent of the order."""
    return tuple(sorted(tuple(sorted(box)) for box in boxes))


def number_fits(words, count):
    """Return whether a count agrees with `two`, `exactly 2`, `at least two`, `no` and the like."""
    *bound, number = words
    number = NUMBERS[number]
    if bound in (["exactly"], ["only"]) or words == ["no"]:
        return count == number
    assert bound in ([], ["at", "least"]), words
    return count >= number


# ------------------------------------------------------------------------------------------------- the corpus


def boxes_of(structured):
    colors = {"Yellow": "yellow", "Black": "black", "#0099ff": "blue"}
    return tuple(
        tuple(Item(i["type"], colors[i["color"]], i["size"], i["x_loc"], i["y_loc"]) for i in box) for box in structured
    )


@pytest.fixture(scope="module")
def corpus():
    """Return the examples of the hidden split, and 150 images with the boxes in their first order."""
    examples, images = [], {}
    with tarfile.open(Path(TEST_DATA) / "nlvr-hidden.tar.xz") as archive:
        for member in archive:
            if member.name.endswith(".json"):
                examples = [json.loads(line) for line in archive.extractfile(member)]
            elif member.name.endswith("-0.png") and len(images) < 150:
                with Image.open(io.BytesIO(archive.extractfile(member).read())) as image:
                    identifier = Path(member.name).stem.removeprefix("hidden-").removesuffix("-0")
                    images[identifier] = np.asarray(image.convert("RGB"))
    return examples, images


@needs_corpus
def test_images_equal_those_of_the_corpus(corpus):
    examples, images = corpus
    pictures = {example["identifier"]: boxes_of(example["structured_rep"]) for example in examples}
    assert len(images) == 150
    assert {kind_of(pictures[identifier]) for identifier in images} == set(KINDS)
    for identifier, real in images.items():
        difference = np.abs(render(pictures[identifier]).astype(int) - real)
        assert difference.mean() < 0.3, identifier
        assert (difference.max(axis=2) > 32).mean() < 0.002, identifier


@needs_corpus
def test_truth_agrees_with_the_labels_of_the_corpus(corpus):
    """The labels that disagree are contradicted by other examples of the same sentence."""
    examples, _ = corpus
    agree, sentences = [], set()
    for example in examples:
        text = " ".join(example["sentence"].lower().rstrip(" .").split())
        answer = truth(text, boxes_of(example["structured_rep"]))
        if answer is not None:
            agree.append(answer == (example["label"] == "true"))
            sentences.add(text)
    assert len(sentences) >= 220
    assert len(agree) >= 880
    assert np.mean(agree) >= 0.98


# ------------------------------------------------------------------------------------------------- images


def test_items_are_drawn_in_their_color_on_gray_boxes():
    (yellow, black, blue), gray = COLORS.values(), (211, 211, 211)
    image = render(((Item("square", "blue", 20, 0, 80),), (Item("circle", "black", 30, 70, 0),), ()))
    assert (image.shape, image.dtype) == ((100, 400, 3), np.uint8)
    np.testing.assert_array_equal(image[80:, :20], np.broadcast_to(blue, (20, 20, 3)))
    assert tuple(image[79, 0]) == tuple(image[80, 20]) == tuple(image[50, 350]) == gray
    assert tuple(image[15, 235]) == black
    assert tuple(image[0, 220]) == gray, "the corners of a circle's square are gray"
    assert {tuple(image[50, x]) for x in (100, 149, 250, 299)} == {(128, 128, 128)}
    triangle = render(((Item("triangle", "yellow", 10, 5, 5),), (), ()))
    wide = [(triangle[y, :BOX_SIDE] == yellow).all(axis=1).sum() for y in range(5, 15)]
    assert wide == sorted(wide), "the apex is up"
    assert wide[-1] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_hold_the_items_of_the_corpus(kind):
    seen = defaultdict(set)
    for index in range(400):
        boxes = draw_boxes(kind, SplitMix64(index))
        assert len(boxes) == 3
        for box in boxes:
            seen["number"].add(len(box))
            for item in box:
                seen["looks"].add((item.shape, item.color, item.size))
                seen["touching"].add((item.x == 0, item.x + item.size == 100, item.y == 0, item.y + item.size == 100))
                assert 0 <= item.x <= 100 - item.size
                assert 0 <= item.y <= 100 - item.size
            for first in range(len(box)):
                for second in range(first):
                    a, b = box[first], box[second]
                    apart = max(a.x - b.x - b.size, b.x - a.x - a.size, a.y - b.y - b.size, b.y - a.y - a.size)
                    assert apart >= 1, (a, b)
        if kind == "tower":
            assert all([item.y for item in box] == [80, 59, 38, 17][: len(box)] for box in boxes)
    assert seen["number"] == set(range(1, (MAX_BLOCKS if kind == "tower" else MAX_ITEMS) + 1))
    if kind == "tower":
        assert seen["looks"] == {("square", color, 20) for color in COLORS}
    else:
        assert seen["looks"] == {(shape, color, size) for shape in SHAPES for color in COLORS for size in SIZES}
        assert all(any(edges) for edges in zip(*seen["touching"], strict=True)), "every edge"
        assert (False,) * 4 in seen["touching"]
        assert (False, True, False, True) in seen["touching"], "a corner"


# ------------------------------------------------------------------------------------------------- samples


def test_sample_is_a_function_of_seed_split_and_index():
    forward, backward = Boxes(3, "val"), Boxes(3, "val")
    others = [backward[i] for i in reversed(range(60))][::-1]
    for index, other in enumerate(others):
        scene = forward[index]
        assert (scene.caption, scene.boxes) == (other.caption, other.boxes)
        np.testing.assert_array_equal(scene.image, other.image)
    for different in (Boxes(4, "val"), Boxes(3, "test")):
        assert sum(different[i].boxes == forward[i].boxes for i in range(60)) < 3
    pairs = BoxStatements(3, "val")
    assert [(pairs[i].text, pairs[i].boxes) for i in (5, 4)] == [(pairs[i].text, pairs[i].boxes) for i in (4, 5)][::-1]


def test_bad_index_and_bad_split_are_refused():
    with pytest.raises(IndexError, match="must not be negative"):
        Boxes()[-1]
    with pytest.raises(IndexError, match="must not be negative"):
        BoxStatements()[-1]
    with pytest.raises(ConfigError, match="split 'dev' is unknown; use one of: train, val, test"):
        Boxes(split="dev")


def test_two_thirds_of_the_images_show_towers_and_captions_vary():
    scenes = [Boxes()[i] for i in range(600)]
    assert np.mean([kind_of(scene.boxes) == "tower" for scene in scenes]) == pytest.approx(2 / 3, abs=0.05)
    assert len({scene.caption for scene in scenes}) > 540
    assert all(scene.caption == scene.caption.lower().strip(". ") for scene in scenes)


def test_splits_are_disjoint_for_every_order_and_seed():
    shown = {split: {same(Boxes(seed, split)[i].boxes) for seed in (0, 1) for i in range(150)} for split in SPLITS}
    for split, pictures in shown.items():
        assert all(split_of(boxes) == split for boxes in pictures)
        assert all(split_of(boxes[::-1]) == split for boxes in pictures)
    assert len(set.union(*shown.values())) == sum(map(len, shown.values()))
    share = [split_of(draw_boxes(kind, SplitMix64(i))) for kind in KINDS for i in range(1000)]
    assert [share.count(split) / 2000 for split in SPLITS] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


def test_accuracy_by_text_alone_is_exactly_one_half():
    data = BoxStatements(1)
    labels = defaultdict(list)
    for index in range(400):
        sample = data[index]
        labels[sample.text].append(sample.label)
        assert split_of(sample.boxes) == "train"
        np.testing.assert_array_equal(sample.image, render(sample.boxes))
        if index % 2:
            assert sample.text == data[index - 1].text
    assert all(len(found) == 2 * sum(found) for found in labels.values())
    first = [data[index].label for index in range(0, 400, 2)]
    assert 0.4 < np.mean(first) < 0.6, "the true item of a pair is the first in half of the pairs"


def test_labels_equal_the_truth():
    data = BoxStatements(2, "val")
    for index in range(60):
        sample = data[index]
        assert truth(sample.text, sample.boxes) is sample.label
    boxes = draw_boxes("scatter", SplitMix64(5))
    drawn = [statement(boxes, SplitMix64(index)) for index in range(200)]
    assert {label for _, label in drawn} == {True, False}
    assert all(truth(text, boxes) is label for text, label in drawn)
    assert truth("there is a green dog", boxes) is None


# ------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_true(kind):
    for index in range(1500):
        boxes = draw_boxes(kind, SplitMix64(index))
        assert truth(draw_caption(kind, boxes, SplitMix64(index, 1)), boxes) is True


def split_words(text):
    """Split `there is/are NUMBER REST` into the words of number and rest."""
    words = text.split()[2:]
    cut = 3 if words[:2] == ["at", "least"] else 2 if words[0] in ("exactly", "only") else 1
    return words[:cut], words[cut:]


def singular(noun):
    return {"boxes": "box"}.get(noun, noun.removesuffix("s"))


def slow_item(words, item):
    *color, noun = words
    return color in ([], [item.color]) and singular(noun) in ("item", "object", "block", item.shape)


def slow_number_of_items(text, boxes):
    """`there are exactly two blue circles`."""
    number, thing = split_words(text)
    count = 0
    for box in boxes:
        for item in box:
            if slow_item(thing, item):
                count += 1
    return number_fits(number, count)


def slow_touching(text, boxes):
    """`there is no yellow square touching the bottom of a box`."""
    number, rest = split_words(text)
    at = rest.index("touching")
    side = " ".join(rest[at + 1 :])
    thing = [word for word in rest[:at] if word not in ("not", "closely")]
    count = 0
    for box in boxes:
        for item in box:
            left, right = item.x == 0, item.x == 100 - item.size
            top, bottom = item.y == 0, item.y == 100 - item.size
            if "corner" in side:
                touches = (left or right) and (top or bottom)
            elif "left" in side:
                touches = left
            elif "right" in side:
                touches = right
            elif "bottom" in side or "base" in side:
                touches = bottom
            elif "top" in side:
                touches = top
            else:
                touches = left or right or top or bottom
            if slow_item(thing, item) and touches != ("not" in rest[:at]):
                count += 1
    return number_fits(number, count)


def slow_end_of_tower(text, boxes):
    """`there is exactly one tower with a blue block at the base`."""
    number, rest = split_words(text)
    color, place = next(word for word in rest if word in COLORS), rest[-1]
    count = 0
    for box in boxes:
        lowest, highest = max(box, key=lambda item: item.y), min(box, key=lambda item: item.y)
        end = highest if place == "top" else lowest
        if end.color == color:
            count += 1
    return number_fits(number, count)


def slow_stack(text, boxes):
    """`there are two yellow blocks on a black block`."""
    number, (first, _, *where, _, second, _) = split_words(text)
    count = 0
    for box in boxes:
        for upper in box:
            for lower in box:
                if lower.y - upper.y != 21:
                    continue
                said, other = (upper, lower) if where[0] in ("above", "on", "over") else (lower, upper)
                if said.color == first and other.color == second:
                    count += 1
    return number_fits(number, count)


def slow_block_as(text, boxes):
    """`there is a blue block as the top of a tower with exactly three blocks`."""
    number, rest = split_words(text)
    color, end, height = rest[0], rest[4], rest[9:-1]
    count = 0
    for box in boxes:
        least = NUMBERS[height[-1]]
        high = least <= len(box) if height[0] == "at" else least == len(box)
        ordered = sorted(box, key=lambda item: item.y)
        if high and ordered[0 if end == "top" else -1].color == color:
            count += 1
    return number_fits(number, count)


NUMBER = r"there (?:is|are) (?:(?:exactly |only |at least )?\w+) "
COLOR = "(?:yellow|black|blue)"
NOUN = f"(?:{COLOR} )?(?:item|object|square|triangle|circle)s?"
EVALUATORS = {
    "number": ("scatter", NUMBER + NOUN, slow_number_of_items),
    "touching": ("scatter", NUMBER + NOUN + " (?:not |closely )?touching .*", slow_touching),
    "end": ("tower", NUMBER + f"towers? with a {COLOR} block at the (?:top|base|bottom)", slow_end_of_tower),
    "stack": (
        "tower",
        NUMBER + f"{COLOR} blocks? (?:above|on|over|on top of|below|under|beneath) (?:a|the) {COLOR} block",
        slow_stack,
    ),
    "block as": (
        "tower",
        NUMBER + f"{COLOR} blocks? as the (?:top|base) of a tower with (?:(?:exactly |only |at least )?\\w+) blocks?",
        slow_block_as,
    ),
}


@pytest.mark.parametrize("family", EVALUATORS)
def test_truth_equals_counting_in_loops(family):
    kind, pattern, slow = EVALUATORS[family]
    claims = [claim for claim in statements(kind) if re.fullmatch(pattern, claim.text)]
    assert len(claims) > 100
    found = {True: 0, False: 0}
    rng = SplitMix64(8)
    for index in range(1500):
        boxes = draw_boxes(kind, SplitMix64(index, 2))
        text, holds = claims[rng.below(len(claims))]
        assert holds(boxes) == slow(text, boxes), (text, boxes)
        found[holds(boxes)] += 1
    assert min(found.values()) > 50


def test_families_agree_on_shared_texts():
    from boxes import _FAMILIES

    pictures = {kind: [draw_boxes(kind, SplitMix64(i, 3)) for i in range(40)] for kind in KINDS}
    for kind in KINDS:
        known = dict(statements(kind))
        for make, *weights in _FAMILIES:
            if not weights[KINDS.index(kind)]:
                continue
            for index, claim in enumerate(make()):
                if index % 50 == 0 and claim.holds is not known[claim.text]:
                    assert all(claim.holds(p) == known[claim.text](p) for p in pictures[kind][:4]), claim.text


def test_image_equal_to_the_one_for_comparison_has_a_caption(monkeypatch):
    picture = Boxes()[0].boxes
    monkeypatch.setattr(boxes_module, "_others", lambda kind: (picture,) * 256)
    for index in range(20):
        assert truth(draw_caption(kind_of(picture), picture, SplitMix64(index)), picture)


def test_half_of_the_texts_have_two_images_of_the_same_items():
    data = BoxStatements(5)
    pairs = [(data[i].boxes, data[i + 1].boxes) for i in range(0, 400, 2)]
    pairs = [pair for pair in pairs if kind_of(pair[0]) == "tower"]
    looks = [[sorted(item[:3] for box in boxes for item in box) for boxes in pair] for pair in pairs]
    # Few images drawn independently have equal counts of every color; some texts are true of every arrangement.
    assert 0.25 < np.mean([one == other for one, other in looks]) < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_rearranging_gives_valid_boxes_of_every_arrangement(kind):
    start = next(boxes for boxes in (draw_boxes(kind, SplitMix64(i)) for i in range(99)) if sum(map(len, boxes)) > 6)
    seen = set()
    for index in range(300):
        boxes = rearrange(start, SplitMix64(2, index))
        assert kind_of(boxes) == kind
        assert all(boxes)
        looks = [Counter(item[:3] for box in shown for item in box) for shown in (boxes, start)]
        # Items may be left out for lack of place, but none are added.
        assert looks[0] == looks[1] if kind == "tower" else looks[0] <= looks[1]
        if kind == "tower":
            for box in boxes:
                assert 1 <= len(box) <= MAX_BLOCKS
                assert [(item.x, item.y) for item in box] == [(40, y) for y in (80, 59, 38, 17)[: len(box)]]
        seen.add(tuple(map(len, boxes)))
    assert len(seen) > 3


def test_most_captions_describe_every_box_in_five_words():
    scenes = [Boxes(3)[index] for index in range(400)]
    described = [(scene.caption.split(), scene.boxes) for scene in scenes if scene.caption.startswith("left ")]
    assert 0.7 < len(described) / len(scenes) < 0.8
    for words, boxes in described:
        assert len(words) == 15
        for number, (side, box) in enumerate(zip(["left", "middle", "right"], boxes, strict=True)):
            assert words[5 * number] == side
            said = words[5 * number + 1 : 5 * number + 5]
            if kind_of(boxes) == "tower":
                for level, word in enumerate(said):
                    assert word == (box[level].color if level < len(box) else "none")
            else:
                for color, word in zip(["yellow", "black", "blue"], said, strict=False):
                    assert int(word) == len([item for item in box if item.color == color])
                assert int(said[3]) == len(box)
    assert {kind_of(boxes) for _, boxes in described} == set(KINDS)


def test_shards_and_statements_are_read_as_written(tmp_path):
    write_shards(BoxSource(3, 5), tmp_path / "shards", WriterOptions())
    write_statements(tmp_path / "val", 2, "val", 4)
    sources = [{"kind": "shards", "shards": str(tmp_path / "shards")}]
    config = parse_config(
        {
            "data": {"sources": sources},
            "task": {"name": "nlvr", "num_images": 1, "val": {"format": "auto", "annotations": [tmp_path / "val"]}},
        }
    )
    source = open_sources(config)[0]
    captions = [source.read(Place(source=0, epoch=0, shard=0, number=i, slot=i)).caption for i in range(5)]
    assert captions == [Boxes(3)[i].caption for i in range(5)]
    examples = load_examples(config, "val")
    assert len(examples) == 4 * 6
    for index, expected in enumerate(BoxStatements(2, "val")[i] for i in range(4)):
        orders = examples[6 * index : 6 * index + 6]
        assert {(example.text, example.label) for example in orders} == {(expected.text, expected.label)}
        with Image.open(orders[0].images[0]) as image:
            np.testing.assert_array_equal(np.asarray(image), expected.image)
        assert len({Path(example.images[0]).read_bytes() for example in orders}) > 1, (
            "images differ in the order of the boxes"
        )
    assert examples[0].group == examples[6].group != examples[12].group


def test_tokenizer_has_one_token_per_word_and_letters_for_others():
    tokenizer = load_tokenizer(HERE / "boxes_tokenizer.json")
    assert all(tokenizer.tokenize(word) == [word] for word in vocabulary())
    typed = tokenizer("There are attleast 2 towers, which's bigg.")["input_ids"]
    assert tokenizer.unk_token_id not in typed


def test_tokenizer_equals_one_trained_on_its_corpus():
    trained = train_tokenizer(boxes_corpus(), 512)
    written = (HERE / "boxes_tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(trained.backend_tokenizer.to_str()) == json.loads(written)


@pytest.mark.parametrize("recipe", ["eve_boxes.yaml", "boxes_nlvr.yaml"])
def test_recipes_are_valid(recipe):
    load_config(str(HERE / recipe))


def test_vocabulary_has_every_word_of_every_statement():
    words = vocabulary()
    assert list(words) == sorted(set(words))
    said = {word for kind in KINDS for claim in statements(kind) for word in claim.text.replace(",", "").split()}
    assert set(words) == said
    assert all(word.isalpha() or word.isdigit() for word in words)
