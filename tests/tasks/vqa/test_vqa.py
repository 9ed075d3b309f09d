"""Official accuracy against numbers computed by hand, soft targets, the loss against a loop, and the vocabulary."""

import json
import math

import numpy as np
import pytest
import torch

from eve_ds.config import ConfigError, parse_config
from eve_ds.model.eve import initialize_weights
from eve_ds.tasks.batches import TaskBatch
from eve_ds.tasks.classification import ClassifierOutput
from eve_ds.tasks.examples import Example
from eve_ds.tasks.features.class_token import VisiblePatches
from eve_ds.tasks.vqa import VQA
from eve_ds.tasks.vqa.answer_accuracy import normalize_answer, soft_targets, vqa_accuracy
from eve_ds.tasks.vqa.vocabulary import build_vocabulary, read_vocabulary


def question(key, *answers, kind=""):
    return Example(key, (np.zeros((4, 4, 3), np.uint8),), "what?", kind, answers)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Red Ball", "red ball"),
        ("two", "2"),
        ("None", "0"),
        ("a dog and a cat", "dog and cat"),
        ("yes!", "yes"),  # a mark inside or at the end without a space becomes one, which is then stripped
        ("black/white", "black white"),
        ("red, white", "red white"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("st. john", "st john"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # two missing apostrophes
        ("'dont'", "'dont'"),
        ("twas", "'twas"),
        ("Id've", "id've"),  # the official key has a capital, the word is in lower case
        ("somebody'd", "somebodyd"),
        ("somebodyd've", "somebody'd've"),
        ("'ows'at", "'ow's'at"),
        ("ow's'at", "'ow's'at"),
        ("x" + 40 * ".", "x" + 8 * "."),
    ],
)
def test_answers_are_normalized_as_in_the_official_code(answer, expected):
    assert normalize_answer(answer) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    [
        # k of ten annotators say it: k of them see k - 1 others agree, 10 - k see k. min(1, others / 3) each.
        (0, 0.0),
        (1, 0.3),  # 9 * 1/3 + 1 * 0
        (2, 0.6),  # 8 * 2/3 + 2 * 1/3
        (3, 0.9),  # 7 * 1 + 3 * 2/3
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_accuracy_leaves_one_annotator_out(agreeing, expected):
    annotators = ["red"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert vqa_accuracy("red", annotators) == pytest.approx(expected)


def test_accuracy_equals_the_official_loop():
    annotators = ["Two", "2", "two", "a 3", "3", "four", "four", "2", "1,000", "1000"]
    for answer in ("two", "3", "4", "the four", "1000", "red"):
        said = [normalize_answer(text) for text in annotators]
        by_annotator = [
            min(1, sum(other == normalize_answer(answer) for j, other in enumerate(said) if j != i) / 3)
            for i in range(10)
        ]
        assert vqa_accuracy(answer, annotators) == pytest.approx(sum(by_annotator) / 10)


def test_nothing_is_normalized_where_all_annotators_agree():
    assert vqa_accuracy("red.", ["red"] * 10) == 0.0
    assert vqa_accuracy("red", ["red"] * 10) == 1.0


def test_soft_targets_follow_the_counts():
    annotators = ["red"] * 5 + ["blue"] * 3 + ["a pink", "pink"]
    assert soft_targets(annotators) == {"red": 1.0, "blue": 0.9, "pink": 0.6}
    assert soft_targets(["red"]) == {"red": 1.0}  # a single annotator


def test_vocabulary_is_counted_over_annotators_and_sorted_by_frequency():
    examples = [question("1", "red", "the red", "blue"), question("2", "blue", "blue", "green")]
    assert build_vocabulary(examples, 2) == ["blue", "red"]
    with pytest.raises(ConfigError, match=r"none of the 3 answers was given task\.min_answer_count \(4\) times: lower"):
        build_vocabulary(examples, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "answer vocabulary .* cannot be read"),
        ('{"a": 1}', "must be a JSON list of strings"),
        ('["red", "red"]', "holds 'red' twice: remove one"),
    ],
)
def test_damaged_vocabulary_is_an_error(tmp_path, content, message):
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_vocabulary(tmp_path)


def test_loss_is_binary_cross_entropy_summed_over_answers(task_tree):
    task = VQA(parse_config(task_tree("vqa")), ["red", "blue", "green"])
    examples = [question("1", "red", "red", "blue"), question("2", "purple")]
    targets = task.targets(examples)
    assert targets.tolist() == [[1.0, pytest.approx(0.9), 0.0], [0.0, 0.0, 0.0]]

    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    batch = TaskBatch(examples, torch.empty(2, 1, 3, 4, 4), torch.empty(2, 1), torch.empty(2, 1), targets)
    expected = 0.0
    for row in range(2):
        for column in range(3):
            chance = 1 / (1 + math.exp(-logits[row, column]))
            target = float(targets[row, column])
            expected -= (target * math.log(chance) + (1 - target) * math.log(1 - chance)) / 2
    loss = task.losses(ClassifierOutput(logits, (), 1), batch)
    assert loss.keys() == {"vqa"}
    assert float(loss["vqa"]) == pytest.approx(expected, rel=1e-5)


def test_metrics_are_given_by_type_without_skipped_questions(task_tree):
    task = VQA(parse_config(task_tree("vqa")), ["red", "blue"])
    examples = [
        question("1", "red", kind="color"),
        question("2", "blue", kind="color"),
        question("3", "purple", kind="other"),
        question("4", "red"),
    ]
    predictions = {
        "1": {"answer": "red"},
        "2": {"answer": "red"},
        "3": {"answer": "red"},
        "4": {"skipped": "missing image"},
    }
    assert task.metrics(examples, predictions) == {
        "accuracy": pytest.approx(1 / 3),
        "by_type": {"color": 0.5, "other": 0.0},
        "answerable": pytest.approx(2 / 3),
        "num_examples": 3,
    }


def test_training_questions_outside_the_vocabulary_are_left_out(task_tree):
    task = VQA(parse_config(task_tree("vqa")), ["red"])
    examples = [question("1", "red"), question("2", "purple")]
    assert [example.key for example in task.trainable(examples)] == ["1"]
    with pytest.raises(ConfigError, match="have no answers: give VQAv2's file of annotations"):
        task.trainable([question("1")])


def test_vocabulary_is_saved_with_the_model(tmp_path, task_tree):
    config = parse_config(task_tree("vqa"))
    VQA(config, ["crème brûlée", "red"]).save(tmp_path)
    assert json.loads((tmp_path / "answers.json").read_text(encoding="utf-8")) == ["crème brûlée", "red"]
    assert VQA.load(config, tmp_path).answers == ["crème brûlée", "red"]


def test_softmax_loss_judges_answers_against_each_other(task_tree):
    task = VQA(parse_config(task_tree("vqa", answer_loss="softmax")), ["red", "blue", "green"])
    examples = [question("0", *["red"] * 7, *["blue"] * 3), question("1", "green")]
    logits = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, -3.0]])
    batch = TaskBatch(examples, *[torch.zeros(2, 1)] * 3, targets=task.targets(examples))
    expected = 0.0
    for row, scores in zip(logits.double(), batch.targets, strict=True):
        total = sum(math.exp(value) for value in row)
        expected -= sum(float(s) * math.log(math.exp(v) / total) for v, s in zip(row, scores, strict=True)) / 2
    assert float(task.losses(ClassifierOutput(logits, (), 2), batch)["vqa"]) == pytest.approx(expected)
    assert task.probabilities(logits).sum(dim=1).tolist() == pytest.approx([1, 1])
    assert task.probabilities(logits)[0, 0] == pytest.approx(math.e / (math.e + math.exp(-1) + math.exp(0.5)))


# --- patches that training sees ---------------------------------------------------------------------------------------


def test_training_sees_a_random_share_of_the_patches_and_evaluation_all(task_tree):
    visible = VisiblePatches(parse_config(task_tree("vqa", visible_patch_share=0.5)))  # 16 patches
    torch.manual_seed(0)
    ids = visible.train()(torch.zeros(200, 3, 64, 64))
    assert ids.shape == (200, 8)
    assert (ids.diff(dim=1) > 0).all(), "in the order of the patches, none twice"
    seen = ids.flatten().bincount(minlength=16) / 200
    # Each is drawn with probability one half: 200 draws deviate by 4 * sqrt(.25 / 200) at most, but once in 16,000.
    assert ((seen - 0.5).abs() < 0.142).all()
    assert not torch.equal(ids, visible(torch.zeros(200, 3, 64, 64))), "every step must draw other patches"
    assert visible.eval()(torch.zeros(2, 3, 64, 64)) is None
    assert VisiblePatches(parse_config(task_tree("vqa"))).train()(torch.zeros(2, 3, 64, 64)) is None


def test_hidden_patches_do_not_change_the_output_in_training(task_tree, monkeypatch):
    task = VQA(parse_config(task_tree("vqa", visible_patch_share=0.25)), ["red", "blue"])
    model = task.model().train()
    initialize_weights(model, task.config.model, seed=1)
    monkeypatch.setattr(model.visible_patches, "forward", lambda pixels: torch.tensor([[0, 1, 2, 3]]))
    ids, mask = torch.tensor([[2, 9, 3]]), torch.ones(1, 3, dtype=torch.bool)
    pixels = torch.randn(1, 1, 3, 64, 64, requires_grad=True)
    model(pixels, ids, mask).logits.sum().backward()
    touched = pixels.grad[0, 0].abs().sum(0)  # patches of 16: the first row of four is visible
    assert (touched[:16] > 0).all()
    assert (touched[16:] == 0).all()
