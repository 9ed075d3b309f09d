"""Evaluation answers every query once, with any batch size, and completes after a kill."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from eve_ds.config import ConfigError, parse_config
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.evaluation import predictions
from eve_ds.evaluation.predictions import evaluate, read_predictions
from eve_ds.model.eve import initialize_weights
from eve_ds.storage import SaveError
from eve_ds.tasks.batches import TaskCollator
from eve_ds.tasks.examples import Example
from eve_ds.tasks.load_examples import load_examples
from eve_ds.tasks.registry import new_task


class Prepared:
    """A task, a model with drawn weights, and twenty examples from scenes."""

    def __init__(self, tree):
        self.config = parse_config(tree)
        self.examples = load_examples(self.config, "val")
        self.task = new_task(self.config, self.examples)
        self.model = self.task.model()
        initialize_weights(self.model, self.config.model, seed=3)

    def evaluate(self, out, *, batch_size=8, examples=None, weights="w"):
        return evaluate(
            self.task,
            self.model,
            self.examples if examples is None else examples,
            TaskCollator(self.config, load_tokenizer("scenes")),
            out=out,
            weights=weights,
            batch_size=batch_size,
        )


@pytest.mark.parametrize("name", ["vqa", "nlvr", "retrieval"])
def test_predictions_do_not_depend_on_the_batch_size(tmp_path, task_tree, name):
    prepared = Prepared(task_tree(name))
    results = [prepared.evaluate(tmp_path / str(size), batch_size=size) for size in (1, 7, 64)]
    assert results[0] == results[1] == results[2]
    written = [(tmp_path / str(size) / "predictions.jsonl").read_text() for size in (1, 7, 64)]
    keys = [json.loads(line)["key"] for line in written[0].splitlines()]
    assert keys == prepared.task.queries(prepared.examples)
    if name == "retrieval":
        assert written[0] == written[1] == written[2]
    else:  # scores are written with five decimals, of which the last may be rounded either way
        for one, other in zip(*(read_predictions(tmp_path / str(size)).values() for size in (1, 64)), strict=True):
            assert one["answer"] == other["answer"]
            for field in one.keys() - {"key", "answer"}:
                assert one[field] == pytest.approx(other[field], abs=2e-5)


def test_a_killed_evaluation_is_completed(tmp_path, task_tree, monkeypatch):
    prepared = Prepared(task_tree("vqa"))
    whole = prepared.evaluate(tmp_path / "whole")
    expected = (tmp_path / "whole" / "predictions.jsonl").read_text()
    # Files as two killed ranks leave them: each wrote some lines, one line is half written.
    lines = expected.splitlines(keepends=True)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "evaluation.json").write_text((tmp_path / "whole" / "evaluation.json").read_text())
    (broken / "predictions.part-00000.jsonl").write_text(lines[0] + lines[2] + lines[4][:9])
    (broken / "predictions.part-00001.jsonl").write_text(lines[1])
    asked = []
    predict = prepared.task.predict
    monkeypatch.setattr(
        prepared.task,
        "predict",
        lambda inference, examples, todo: asked.extend(todo) or predict(inference, examples, todo),
    )
    assert prepared.evaluate(broken) == whole
    assert asked == [json.loads(line)["key"] for line in [lines[3], *lines[4:]]]
    assert (broken / "predictions.jsonl").read_text() == expected
    names = [".lock", "evaluation.json", "metrics.json", "predictions.jsonl"]
    assert sorted(path.name for path in broken.iterdir()) == names
    assert prepared.evaluate(broken) == whole  # nothing is left to do
    assert (broken / "predictions.jsonl").read_text() == expected


def test_predictions_of_other_weights_or_examples_are_refused(tmp_path, task_tree):
    prepared = Prepared(task_tree("vqa"))
    prepared.evaluate(tmp_path)
    with pytest.raises(ConfigError, match=r"holds predictions of other weights \(w, now v\): name another folder"):
        prepared.evaluate(tmp_path, weights="v")
    with pytest.raises(
        ConfigError, match=r"holds predictions of other examples \(scenes vqa easy 0 val 20, now 5 exam"
    ):
        prepared.evaluate(tmp_path, examples=prepared.examples[:5])


def with_files(examples, folder, names="{}.png", color=0):
    """The same questions about files of a folder."""
    folder.mkdir()
    files = [folder / names.format(number) for number in range(len(examples))]
    for number, file in enumerate(files):
        Image.new("RGB", (32, 32), (10 * number, color, 0)).save(file)
    return [replace(item, images=(file,)) for item, file in zip(examples, files, strict=True)]


def test_predictions_of_other_images_are_refused(tmp_path, task_tree):
    """Other pictures under the same questions, as in a test with noise, would keep the old answers."""
    prepared = Prepared(task_tree("vqa"))
    examples = with_files(prepared.examples[:6], tmp_path / "images")
    before = prepared.evaluate(tmp_path / "out", examples=examples)
    moved = with_files(prepared.examples[:6], tmp_path / "moved")
    assert prepared.evaluate(tmp_path / "out", examples=moved) == before
    swapped = [replace(item, images=other.images) for item, other in zip(examples, examples[::-1], strict=True)]
    others = with_files(prepared.examples[:6], tmp_path / "noise", color=200)
    renamed = with_files(prepared.examples[:6], tmp_path / "renamed", names="x{}.png")
    for other in (swapped, others, renamed):
        with pytest.raises(ConfigError, match=r"out holds predictions of other images \(.* differs\): name another"):
            prepared.evaluate(tmp_path / "out", examples=other)
    identity = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (tmp_path / "out" / "evaluation.json").write_text(json.dumps(identity | {"images": None}))
    assert prepared.evaluate(tmp_path / "out", examples=examples) == before, "a folder of an earlier version"


def test_a_missing_image_counts_as_skipped_not_as_wrong(tmp_path, task_tree):
    prepared = Prepared(task_tree("vqa"))
    examples = [*prepared.examples[:6], Example("x", (tmp_path / "gone.png",), "what?", "", ("red",))]
    examples.append(Example("y", (b"no image",), "what?", "", ("red",)))
    metrics = prepared.evaluate(tmp_path / "out", examples=examples)
    assert metrics["num_examples"] == 6
    assert {key: value for key, value in metrics.items() if key.startswith("skipped")} == {
        "skipped/missing image": 1,
        "skipped/unreadable image": 1,
    }
    assert read_predictions(tmp_path / "out")["x"] == {"key": "x", "skipped": "missing image"}


@pytest.mark.parametrize("name", ["vqa", "retrieval"])
def test_a_restart_predicts_what_was_skipped_and_all_that_depends_on_it(tmp_path, task_tree, name):
    prepared = Prepared(task_tree(name))
    examples = [*prepared.examples[:6], Example("x", (tmp_path / "late.png",), "a red circle", "late", ("red",))]
    out = tmp_path / "out"
    assert prepared.evaluate(out, examples=examples)["skipped/missing image"] == 1
    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "late.png")
    metrics = prepared.evaluate(out, examples=examples)
    assert not any(key.startswith("skipped") for key in metrics)
    assert metrics == prepared.evaluate(tmp_path / "fresh", examples=examples)
    assert (out / "predictions.jsonl").read_bytes() == (tmp_path / "fresh" / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize("full_after", [0, 5])
def test_a_full_disk_ends_an_evaluation_that_a_restart_completes(tmp_path, task_tree, monkeypatch, full_after):
    prepared = Prepared(task_tree("vqa"))
    append, written = predictions._PartWriter._append, []

    def write(writer, line):
        if len(written) == full_after:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(line)
        append(writer, line)

    monkeypatch.setattr(predictions._PartWriter, "_append", write)
    with pytest.raises(SaveError, match=r"^rank 0: \S+/predictions\.part-00000\.jsonl: No space left on device$"):
        prepared.evaluate(tmp_path)
    assert len(read_predictions(tmp_path)) == full_after
    assert not (tmp_path / "metrics.json").exists()
    monkeypatch.setattr(predictions._PartWriter, "_append", append)
    prepared.evaluate(tmp_path)
    assert len(read_predictions(tmp_path)) == len(prepared.examples)


@pytest.mark.parametrize("damage", ["{", "[]", '"x"', "", "\0\0"])
def test_damaged_files_of_an_evaluation_are_named(tmp_path, task_tree, damage):
    prepared = Prepared(task_tree("vqa"))
    prepared.evaluate(tmp_path)
    (tmp_path / "predictions.jsonl").write_text(damage + "\n")
    with pytest.raises(ConfigError, match=r"^line 1 of \S+/predictions\.jsonl is no prediction \(.*\): remove "):
        prepared.evaluate(tmp_path)
    (tmp_path / "evaluation.json").write_text(damage)
    with pytest.raises(ConfigError, match=r"^\S+/evaluation\.json cannot be read \(.*\): remove \S+, or name another"):
        prepared.evaluate(tmp_path)


def test_lines_of_predictions_end_at_line_feeds_alone(tmp_path, task_tree):
    prepared = Prepared(task_tree("vqa"))
    examples = [replace(prepared.examples[0], key="a\u2028b\x85c")]
    prepared.evaluate(tmp_path, examples=examples)
    assert list(read_predictions(tmp_path)) == ["a\u2028b\x85c"]


def test_retrieval_skips_an_unreadable_image_and_its_captions(tmp_path, task_tree):
    prepared = Prepared(task_tree("retrieval"))
    examples = [*prepared.examples[:6], Example("x", (tmp_path / "gone.png",), "a red circle", "gone")]
    metrics = prepared.evaluate(tmp_path / "out", examples=examples)
    assert metrics["num_examples"] == 12
    assert metrics["skipped/missing image"] == 1
    assert metrics["skipped/image of the caption could not be read"] == 1
    assert all("x" not in record.get("dot", []) for record in read_predictions(tmp_path / "out").values())


def test_retrieval_skips_every_query_if_no_image_can_be_read(tmp_path, task_tree):
    prepared = Prepared(task_tree("retrieval"))
    examples = [Example(key, (tmp_path / "gone.png",), "a red circle", f"image {key}") for key in "ab"]
    metrics = prepared.evaluate(tmp_path / "out", examples=examples)
    assert metrics["num_examples"] == 0
    assert metrics["dot"]["text_retrieval"]["R@1"] is None
    assert (metrics["skipped/missing image"], metrics["skipped/image of the caption could not be read"]) == (2, 2)


def test_duplicate_keys_are_refused(tmp_path, task_tree):
    prepared = Prepared(task_tree("vqa"))
    image = np.zeros((8, 8, 3), np.uint8)
    examples = [Example("7", (image,), "what?", "", ("red",)), Example("7", (image,), "who?", "", ("red",))]
    with pytest.raises(ConfigError, match="key '7' belongs to 2 examples: keys must be unique"):
        prepared.evaluate(tmp_path, examples=examples)


def in_another_process(action):
    """Exit code of a forked child that runs `action`; 7 for an evaluation that is refused."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except ConfigError as error:
            os._exit(7 if "is being written by another evaluation: wait until it ends" in str(error) else 8)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_evaluation_into_one_folder_is_refused(tmp_path, task_tree, monkeypatch):
    prepared, codes = Prepared(task_tree("vqa")), []

    class Task(type(prepared.task)):
        def metrics(self, examples, records):
            codes.append(in_another_process(lambda: prepared.evaluate(tmp_path)))
            return super().metrics(examples, records)

    monkeypatch.setattr(prepared.task, "__class__", Task)
    first = prepared.evaluate(tmp_path)
    assert codes == [7]
    monkeypatch.undo()
    assert in_another_process(lambda: prepared.evaluate(tmp_path)) == 0, "the lock ends with the evaluation"
    assert prepared.evaluate(tmp_path) == first


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\r"])
def test_only_a_line_feed_ends_a_prediction(tmp_path, sign):
    record = {"key": f"a{sign}b", "answer": f"{sign}yes{sign}"}
    predictions._write_lines(tmp_path / predictions.PREDICTIONS, [record] * 2 + [{"key": "c"}])
    assert read_predictions(tmp_path) == {record["key"]: record, "c": {"key": "c"}}
