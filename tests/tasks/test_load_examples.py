"""Examples from annotation files, and one-line errors for invalid entries."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from eve_ds.config import ConfigError, parse_config
from eve_ds.data.formats.sniff import sniff
from eve_ds.tasks.load_examples import load_examples


def png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for name in ("a.jpg", "b.jpg", "val2014/COCO_val2014_000000000042.jpg", "dev-1-0-img0.png", "7/dev-1-0-img1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
    return folder


@pytest.fixture
def load(tmp_path, images, task_tree):
    def load(task, *contents, section="val", split=None, **of_task):
        paths = []
        for number, content in enumerate(contents):
            text = content if isinstance(content, str) else json.dumps(content)
            paths.append(tmp_path / f"{number}.json")
            paths[-1].write_text(text, encoding="utf-8")
        source = {"format": "auto", "annotations": [str(p) for p in paths], "images": str(images), "split": split}
        return load_examples(parse_config(task_tree(task, **of_task, **{section: source})), section)

    return load


QUESTION = {"image": "a.jpg", "question": "what?", "question_id": 7, "answer": ["red", "blue"], "dataset": "vqa"}


def test_released_questions_give_key_text_answers_and_image(load, images):
    (example, test) = load("vqa", [QUESTION, {"image": "b.jpg", "question": "who?", "question_id": "8"}])
    assert (example.key, example.text, example.answers) == ("7", "what?", ("red", "blue"))
    assert example.images == (images / "a.jpg",)
    assert test.answers == ()


def test_questions_and_annotations_of_vqav2_in_any_order(load, images):
    questions = {"data_subtype": "val2014", "questions": [{"image_id": 42, "question": "who?", "question_id": 420001}]}
    answers = [{"answer": text, "answer_id": i} for i, text in enumerate(["a man", "woman"])]
    annotations = {"annotations": [{"question_id": 420001, "question_type": "who is", "answers": answers}]}
    for files in ((questions, annotations), (annotations, questions)):
        (example,) = load("vqa", *files)
        assert (example.key, example.group, example.answers) == ("420001", "who is", ("a man", "woman"))
        assert example.images == (images / "val2014/COCO_val2014_000000000042.jpg",)
    assert load("vqa", questions)[0].answers == ()
    with pytest.raises(ConfigError, match="holds no questions: give the file of questions"):
        load("vqa", annotations)
    annotations["annotations"][0]["question_id"] = 5
    with pytest.raises(ConfigError, match=r"0\.json entry 0: question 420001 has no annotation: .*different sets"):
        load("vqa", questions, annotations)


def test_json_lines_of_nlvr2_with_images_in_either_place(load, images):
    lines = [
        {"identifier": "dev-1-0-0", "sentence": "one dog", "label": "True", "directory": 7},
        {"identifier": "dev-1-0-1", "sentence": "two dogs", "label": "False", "directory": 7},
    ]
    examples = load("nlvr", "\n".join(map(json.dumps, lines)))
    assert [(e.key, e.group, e.label) for e in examples] == [
        ("dev-1-0-0", "one dog", True),
        ("dev-1-0-1", "two dogs", False),
    ]
    assert examples[0].images == (images / "dev-1-0-img0.png", images / "7" / "dev-1-0-img1.png")


def test_released_statements_and_captions(load):
    (example,) = load("nlvr", [{"images": ["a.jpg", "b.jpg"], "sentence": "so", "label": "False"}])
    assert (example.label, len(example.images)) == (False, 2)
    train = [{"image": "a.jpg", "caption": f"c{i}", "image_id": "coco_1"} for i in range(2)]
    assert [(e.key, e.text, e.group) for e in load("retrieval", train)] == [
        ("0", "c0", "coco_1"),
        ("1", "c1", "coco_1"),
    ]
    test = [{"image": "a.jpg", "caption": ["x", "y"]}, {"image": "b.jpg", "caption": ["z"]}]
    assert [(e.text, e.group) for e in load("retrieval", test)] == [("x", "a.jpg"), ("y", "a.jpg"), ("z", "b.jpg")]


def test_splits_of_karpathy(load):
    entries = [
        {"filename": "a.jpg", "split": split, "sentences": [{"raw": f"{split} {i}"} for i in range(2)]}
        for split in ("train", "restval", "test")
    ]
    tree = {"images": entries}
    assert [e.text for e in load("retrieval", tree, section="train")] == [
        "train 0",
        "train 1",
        "restval 0",
        "restval 1",
    ]
    assert [e.text for e in load("retrieval", tree, split="test")] == ["test 0", "test 1"]
    with pytest.raises(ConfigError, match=r"has no image of split val; it has: restval \(1\), test \(1\), train \(1\)"):
        load("retrieval", tree)


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("vqa", [QUESTION, QUESTION], "question id or identifier 7 occurs more than once: remove all but one"),
        ("vqa", [{**QUESTION, "question": ""}], r"entry 0: question \(''\) must be a non-empty string"),
        ("vqa", [{**QUESTION, "answer": 3}], r"entry 0: answer \(3\) must be a string or a list of strings"),
        ("vqa", [QUESTION, "x"], "entry 1: must be an object"),
        ("vqa", [{**QUESTION, "image": "c.jpg"}], r"none of 1 probed images exists .*c\.jpg\): set the folder"),
        ("vqa", "{", r"0\.json is not JSON"),
        ("vqa", "[]", "is in no known form"),
        ("vqa", '[{"identifier": "dev-1-0-0"}]', "is of format nlvr2, which has no examples of task 'vqa'"),
        (
            "nlvr",
            [{"images": ["a.jpg"], "sentence": "s", "label": "True"}],
            r"has 1 images where task\.num_images is 2: set task\.num_images to 1, or give other data",
        ),
        (
            "nlvr",
            [{"images": ["a.jpg"] * 2, "sentence": "s", "label": "maybe"}],
            r"label \('maybe'\) must be true or fal",
        ),
        ("nlvr", [{"images": ["a.jpg"] * 2, "sentence": "s", "label": 1}], r"label \(1\) must be true or false"),
        ("retrieval", [{"image": "a.jpg", "caption": []}], r"entry 0: image a\.jpg has no caption: give one, or leave"),
        ("retrieval", {"images": [{"filename": "a.jpg", "split": "val", "sentences": []}]}, r"a\.jpg has no sentences"),
        (
            "retrieval",
            [{"image": "a.jpg", "caption": "x", "image_id": 1}, {"image": "b.jpg", "caption": "y", "image_id": "1"}],
            r"entry 1: image_id 1 of b\.jpg is that of a\.jpg too: give each image an id of its own",
        ),
        (
            "retrieval",
            {"images": [{"file_name": "a.jpg", "id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]},
            "is COCO annotations: give it to `prepare.py coco`",
        ),
        ("vqa", [{**QUESTION, "image": "x" * 300}], r"none of 1 probed images exists .*x( \.\.\.)?\): set the folder"),
        ("vqa", [{**QUESTION, "question": "a \ud83d b"}], r"example 7 has a text that is no Unicode \('a .ud83d b'\)"),
        ("vqa", [{**QUESTION, "answer": ["\udc00"]}], r"example 7 has a text that is no Unicode"),
        ("retrieval", [{"image": "a.jpg", "caption": "\ud800"}], r"example 0 has a text that is no Unicode"),
        (
            "nlvr",
            [{"images": ["a.jpg"] * 2, "sentence": "\udfff", "label": "true"}],
            r"example 0 has a text that is no Unicode",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 10 else None,
)
def test_an_invalid_entry_is_a_one_line_error(load, task, content, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(task, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../0.json", "/etc/passwd", "x/../../secret.png", "val2014/../../images2/a.jpg"])
@pytest.mark.parametrize("task", ["vqa", "nlvr", "nlvr2", "vqav2", "retrieval", "karpathy"])
def test_an_image_outside_the_folder_is_refused(load, name, task):
    content = {
        "vqa": [QUESTION | {"image": name}],
        "nlvr": [{"images": ["a.jpg", name], "sentence": "s", "label": True}],
        "nlvr2": [{"identifier": "dev-1-0-0", "sentence": "s", "label": True, "directory": name}] * 2,
        "vqav2": {"data_subtype": name, "questions": [{"image_id": 42, "question": "who?", "question_id": 1}]},
        "retrieval": [{"image": name, "caption": "x"}],
        "karpathy": {"images": [{"filename": name, "split": "val", "sentences": [{"raw": "x"}]}]},
    }[task]
    with pytest.raises(ConfigError, match=r"image .* lies outside the image folder .*/images: name a folder") as caught:
        load({"nlvr2": "nlvr", "vqav2": "vqa", "karpathy": "retrieval"}.get(task, task), content)
    assert "\n" not in str(caught.value)


def test_a_path_inside_the_folder_is_read_in_any_form(load, images):
    names = [str(images / "a.jpg"), "./a.jpg", "val2014/../a.jpg"]
    questions = [QUESTION | {"image": name, "question_id": number} for number, name in enumerate(names)]
    assert [example.images[0].resolve() for example in load("vqa", questions)] == [images / "a.jpg"] * 3


def test_an_image_that_no_file_can_be_named_after_is_found_missing_later(load):
    """The image is counted where it is read, like any that is missing."""
    long = {"identifier": "dev-1-0-1", "sentence": "s", "label": True, "directory": "x" * 5000}
    good = {"identifier": "dev-1-0-0", "sentence": "s", "label": True, "directory": 7}
    assert len(load("nlvr", "\n".join(map(json.dumps, (good, long))))) == 2


def test_missing_file_and_scenes_of_one_image(tmp_path, task_tree):
    with pytest.raises(ConfigError, match=r"gone\.json cannot be read"):
        sniff(tmp_path / "gone.json")
    with pytest.raises(ConfigError, match=r"scenes need two images: set task\.num_images to 2"):
        load_examples(parse_config(task_tree("nlvr", num_images=1)), "val")


def write_nlvr(folder, splits=("dev",)):
    for split in splits:
        (folder / split / "images" / "0").mkdir(parents=True)
        entry = {"sentence": "there is a box", "label": "true", "identifier": "12-1", "directory": "0"}
        (folder / split / f"{split}.json").write_text(json.dumps(entry) + "\n")
        for k in range(6):
            (folder / split / "images" / "0" / f"{split}-12-1-{k}.png").write_bytes(png())


@pytest.mark.parametrize("packed", [False, True])
def test_published_nlvr_has_six_images_per_statement(tmp_path, task_tree, packed):
    write_nlvr(tmp_path / "nlvr", ("dev", "test"))
    path = tmp_path / "nlvr"
    if packed:
        path = tmp_path / "nlvr.tar.xz"
        with tarfile.open(path, "w:xz") as archive:
            archive.add(tmp_path / "nlvr", "nlvr")
    source = {"format": "auto", "annotations": [str(path)], "split": "dev"}
    examples = load_examples(parse_config(task_tree("nlvr", num_images=1, val=source)), "val")
    assert [e.key for e in examples] == [f"dev-12-1-{k}" for k in range(6)]
    assert {(e.group, e.label, e.text) for e in examples} == {("12", True, "there is a box")}
    assert all(isinstance(e.images[0], bytes if packed else Path) for e in examples)
    with pytest.raises(ConfigError, match=r"has 1 images where task\.num_images is 2"):
        load_examples(parse_config(task_tree("nlvr", val=source)), "val")


def test_examples_with_a_text_of_the_training_set_can_be_left_out(tmp_path, task_tree):
    write_nlvr(tmp_path / "nlvr", ("dev", "test"))
    entry = {"sentence": "there is a tower", "label": "false", "identifier": "13-0", "directory": "0"}
    with (tmp_path / "nlvr" / "dev" / "dev.json").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    train, val = ({"format": "nlvr", "annotations": [str(tmp_path / "nlvr")], "split": s} for s in ("test", "dev"))
    tree = task_tree("nlvr", num_images=1, train=train, val=val | {"unseen_texts": True})
    assert [e.key for e in load_examples(parse_config(tree), "val")] == [f"dev-13-0-{k}" for k in range(6)]
    assert len(load_examples(parse_config(tree), "train")) == 6
    tree["task"]["val"]["split"] = "test"
    with pytest.raises(ConfigError, match=r"task\.val\.unseen_texts leaves no example"):
        load_examples(parse_config(tree), "val")


@pytest.mark.skipif("EVE_DS_TEST_DATA" not in os.environ, reason="EVE_DS_TEST_DATA does not name a folder")
def test_the_real_corpus_has_989_examples(task_tree):
    path = Path(os.environ["EVE_DS_TEST_DATA"]) / "nlvr-dev.tar.xz"
    source = {"format": "auto", "annotations": [str(path)]}
    examples = load_examples(parse_config(task_tree("nlvr", num_images=1, val=source)), "val")
    assert len(examples) == 5934
    assert sum(e.label for e in examples) / len(examples) == pytest.approx(0.553, abs=1e-3)
    assert len({e.group for e in examples}) < 989
