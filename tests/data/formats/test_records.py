"""Records of each published format, and the one-line errors of files and entries of another form."""

import json
import tarfile

import pytest

from eve_ds.config import parse_config
from eve_ds.data.errors import SourceError
from eve_ds.data.formats import karpathy, nlvr, nlvr2, released, tables, vqav2
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.entries import Entry
from eve_ds.data.importers import CaptionJson, Karpathy
from eve_ds.tasks.load_examples import load_examples


def entry(**content):
    return Entry(content, "a.json entry 0")


def write_json(path, tree):
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


# --- Karpathy ---------------------------------------------------------------------------------------------------------


def test_karpathy_record_has_path_captions_and_image_id():
    coco = entry(filepath="val2014", filename="1.jpg", cocoid=1, sentences=[{"raw": "one"}, {"raw": ""}])
    assert karpathy.captioned_image(coco)[1:] == ("val2014/1.jpg", ("one", ""), "1")
    flickr = entry(filename="2.jpg", sentences=[])
    assert karpathy.captioned_image(flickr)[1:] == ("2.jpg", (), None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sentences": []}, r"filename \(None\) must be a non-empty string"),
        ({"filename": "a", "filepath": 3, "sentences": []}, r"filepath \(3\) must be a string"),
        ({"filename": "a"}, "image a has no sentences but None: give a list of objects with `raw`"),
        ({"filename": "a", "sentences": ["x"]}, r"image a has no sentences but \['x'\]"),
        ({"filename": "a", "sentences": [{"raw": 3}]}, "raw of a sentence of image a must be a string"),
    ],
)
def test_malformed_karpathy_entries_are_refused(content, message):
    with pytest.raises(SourceError, match=rf"^a\.json entry 0: {message}"):
        karpathy.captioned_image(entry(**content))


def test_entries_of_the_chosen_karpathy_splits_are_read(tmp_path):
    images = [{"split": "train"}, 7, {"split": "val"}, {}]
    path = write_json(tmp_path / "a.json", {"images": images})
    entries = karpathy.read_entries(path)
    chosen = karpathy.of_splits(entries, "train", path)
    assert [item.content for item in chosen] == [{"split": "train"}, 7]
    with pytest.raises(SourceError, match=r"no image of split test; it has: train \(1\), val \(1\), None \(1\)"):
        karpathy.of_splits(entries, "test", path)


@pytest.mark.parametrize(
    ("splits", "number"),
    [(None, 1), (["train"], 1), (["val", "train", "val"], 3)],
)
def test_the_images_of_the_splits_are_counted(tmp_path, splits, number):
    assert karpathy.require_splits(of_train_and_val(tmp_path), splits, tmp_path) == number


@pytest.mark.parametrize(
    ("splits", "lacking"),
    [
        (["train", "restvall"], "restvall"),
        (["restval", "train"], "restval"),
        (["dev", "test"], "dev or test"),
        ([""], ""),
    ],
)
def test_each_split_that_is_asked_for_must_be_in_the_file(tmp_path, splits, lacking):
    with pytest.raises(SourceError, match=rf"a\.json has no image of split {lacking}; it has: train \(1\), val \(2\)$"):
        karpathy.require_splits(of_train_and_val(tmp_path), splits, tmp_path / "a.json")


def of_train_and_val(folder):
    images = [{"split": "train"}, {"split": "val"}, {"split": "val"}]
    return karpathy.read_entries(write_json(folder / "a.json", {"images": images}))


# --- released code ----------------------------------------------------------------------------------------------------


def test_released_records_have_image_captions_and_answers():
    caption = released.captioned_image(entry(image="a.jpg", caption="one", image_id=17))
    assert caption[1:] == ("a.jpg", ("one",), "17")
    assert released.captioned_image(entry(image="a.jpg", caption=[], image_id=None))[2:] == ((), None)
    question = released.question(entry(image="a.jpg", question="who?", question_id=7, answer="x"))
    assert question == ("7", "a.jpg", "who?", "", ("x",))
    untyped = entry(image="a.jpg", question="who?", question_id=7, answer="x", question_type=None)
    assert released.question(untyped).question_type == ""
    statement = released.statement(entry(images=["a.jpg", "b.jpg"], sentence="so", label="False"))
    assert statement == (("a.jpg", "b.jpg"), "so", False)


# --- VQAv2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([1], r"a\.json must be an object with a list of `questions` or `annotations`, not a list of a number"),
        ({"questions": None}, r"a list of `questions` or `annotations`, not an object with the keys questions"),
        ({"questions": [], "annotations": {}}, r"not an object with the keys questions, annotations"),
        ({"questions": [{"question_id": 1, "image_id": "x"}]}, r"entry 0: image_id \('x'\) must be the number of a CO"),
        ({"questions": [], "annotations": [{"question_id": 1}]}, r"a\.json holds no questions"),
    ],
)
def test_vqav2_file_of_another_form_is_refused(tmp_path, tree, message):
    with pytest.raises(SourceError, match=message):
        list(vqav2.read_questions([write_json(tmp_path / "a.json", tree)]))


def test_vqav2_question_without_a_type(tmp_path):
    tree = {
        "questions": [{"question_id": 1, "image_id": 2, "question": "who?"}],
        "annotations": [{"question_id": 1, "question_type": None, "answers": [{"answer": "x"}]}],
    }
    (question,) = vqav2.read_questions([write_json(tmp_path / "a.json", tree)])
    assert question.question_type == ""


def vqav2_files(answers, annotations=1):
    annotation = {"question_id": "1", "answers": [{"answer": answer} for answer in answers]}
    return {
        "questions": [{"question_id": 1, "image_id": 2, "question": "who?"}],
        "annotations": [annotation, annotation | {"question_id": 1.0}][:annotations],
    }


def test_answers_of_vqav2_are_texts_and_numbers(tmp_path):
    path = write_json(tmp_path / "a.json", vqav2_files(["yes", "", "None", 2, 2.0, "2.0"]))
    (question,) = vqav2.read_questions([path])
    assert question.answers == ("yes", "", "None", "2", "2", "2.0")


@pytest.mark.parametrize("answer", [None, True, ["x"], {"a": 1}, 0.5, float("nan")], ids=str)
def test_an_answer_of_vqav2_of_another_type_is_refused(tmp_path, answer):
    """As text, a missing answer would be the word "None", which counts as 0."""
    path = write_json(tmp_path / "a.json", vqav2_files(["yes", answer]))
    with pytest.raises(SourceError, match=r"entry 0: an answer \(.*\) must be a string or a whole number"):
        list(vqav2.read_questions([path]))


def test_two_annotations_of_a_question_of_vqav2_are_refused(tmp_path):
    path = write_json(tmp_path / "a.json", vqav2_files(["yes"], annotations=2))
    with pytest.raises(
        SourceError, match=r"entry 1: question 1 has another annotation at .*a\.json entry 0: remove one"
    ):
        list(vqav2.read_questions([path]))


def test_vqav2_answers_must_be_objects(tmp_path):
    tree = {
        "questions": [{"question_id": 1, "image_id": 2, "question": "who?"}],
        "annotations": [{"question_id": 1, "answers": ["x"]}],
    }
    with pytest.raises(SourceError, match="entry 0: answers must be a list of objects with `answer`"):
        list(vqav2.read_questions([write_json(tmp_path / "a.json", tree)]))


NLVR_LINE = '{{"sentence": "{}", "label": "true", "identifier": "{}"}}'


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_of_nlvr_are_no_statements(end):
    lines = ["", NLVR_LINE.format("one", "1-0"), " ", NLVR_LINE.format("two", "2-0"), "", ""]
    found = nlvr.read_statements(end.join(lines).encode(), "dev", "dev.json")
    assert [(item.identifier, item.sentence) for item in found] == [("1-0", "one"), ("2-0", "two")]


def test_two_statements_of_nlvr_with_the_same_images_are_refused():
    """One of them would silently replace the other, perhaps with another label."""
    lines = "\n".join(NLVR_LINE.format(sentence, "1-0") for sentence in ("one", "two"))
    with pytest.raises(SourceError, match=r"line 2 of dev\.json: identifier 1-0 is that of line 1 too"):
        list(nlvr.read_statements(lines.encode(), "dev", "dev.json"))


# --- NLVR2 and NLVR ---------------------------------------------------------------------------------------------------


def test_nlvr2_record_names_the_places_of_its_images():
    record = nlvr2.statement(entry(identifier="dev-1-0-2", sentence="so", label="True", directory=7))
    left, right = ((f"7/dev-1-0-img{side}.png", f"dev-1-0-img{side}.png") for side in (0, 1))
    assert record == ("dev-1-0-2", "so", True, (left, right))
    assert nlvr2.statement(entry(identifier="dev-1-0-2", sentence="so")).images[0] == ("dev-1-0-img0.png",)


def write_nlvr(folder):
    line = {"sentence": "there is a box", "label": "true", "identifier": "12-1", "directory": "0"}
    for split in ("dev", "test"):
        (folder / split / "images" / "0").mkdir(parents=True)
        (folder / split / f"{split}.json").write_text(json.dumps(line) + "\n")
        (folder / split / "images" / "0" / f"{split}-12-1-0.png").write_bytes(b"png")
        (folder / split / "images" / "0" / "notes.png").write_bytes(b"png")
    return folder


def test_nlvr_of_a_folder_is_read_lazily_and_of_an_archive_as_a_stream(tmp_path):
    folder = write_nlvr(tmp_path / "nlvr")
    with tarfile.open(tmp_path / "nlvr.tar.gz", "w:gz") as archive:
        archive.add(folder, "nlvr")
    image = folder / "dev" / "images" / "0" / "dev-12-1-0.png"
    for path, content in ((folder, image), (tmp_path / "nlvr.tar.gz", b"png")):
        corpus = nlvr.read_corpus(path, "dev")
        assert corpus.statements == [nlvr.Statement("dev", "12-1", "there is a box", True)]
        assert corpus.images == {"dev-12-1-0": content}
        assert len(nlvr.read_corpus(path, None).statements) == 2
        with pytest.raises(SourceError, match=r"has no SPLIT\.json of split hidden: it is not NLVR's layout"):
            nlvr.read_corpus(path, "hidden")


@pytest.mark.parametrize("line", ["{", "7", '{"sentence": "a"}', '{"sentence": "a", "identifier": "1", "label": 2}'])
def test_a_line_that_is_no_nlvr_example_is_refused(tmp_path, line):
    with pytest.raises(
        SourceError, match=r"here: line 1 of dev\.json is not an NLVR example; expected .* identifier \("
    ):
        list(nlvr.read_statements(line.encode(), "dev", "here"))


# --- tables -----------------------------------------------------------------------------------------------------------


def test_rows_of_a_table_are_read_as_a_stream(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("image\tcaption\na.jpg\tone\nb.jpg\n")
    rows = iter(tables.Table(path, tables.Columns("image", "caption", None)))
    assert next(rows) == ImageCaptions("a.jpg", ("one",))
    assert next(rows) == tables.Row(2, "malformed entry", "it ends before the column caption")


# --- both readers -----------------------------------------------------------------------------------------------------


def test_shards_and_tasks_read_the_same_captions(tmp_path, task_tree):
    (tmp_path / "a.jpg").touch()
    sentences = [{"raw": "one"}, {"raw": "two"}]
    trees = {
        "karpathy": {"images": [{"filename": "a.jpg", "split": "train", "sentences": sentences}]},
        "json": [{"image": "a.jpg", "caption": ["one", "two"]}],
    }
    for name, tree in trees.items():
        path = write_json(tmp_path / f"{name}.json", tree)
        source = {"format": "auto", "annotations": [str(path)]}
        examples = load_examples(parse_config(task_tree("retrieval", train=source)), "train")
        (candidate,) = Karpathy(path) if name == "karpathy" else CaptionJson([path])
        assert tuple(example.text for example in examples) == candidate.captions
        assert {str(example.images[0]) for example in examples} == {candidate.image.path}
