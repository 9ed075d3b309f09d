"""Loss, accuracy and consistency of statements, and the published form of predictions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eve_ds.config import ConfigError, parse_config
from eve_ds.tasks.batches import TaskBatch
from eve_ds.tasks.classification import ClassifierOutput
from eve_ds.tasks.examples import Example
from eve_ds.tasks.nlvr import NLVR


def statement(key, label, group="g", images=2):
    return Example(key, (np.zeros((4, 4, 3), np.uint8),) * images, "it is so", group, label=label)


def test_loss_is_cross_entropy_with_true_as_class_1(task_tree):
    task = NLVR(parse_config(task_tree("nlvr")))
    examples = [statement("1", True), statement("2", False)]
    logits = torch.tensor([[0.5, 2.0], [0.1, -1.0]])
    batch = TaskBatch(
        examples, torch.empty(2, 2, 3, 4, 4), torch.empty(2, 1), torch.empty(2, 1), task.targets(examples)
    )
    expected = -(F.log_softmax(logits[0], 0)[1] + F.log_softmax(logits[1], 0)[0]) / 2
    assert float(task.losses(ClassifierOutput(logits, (), 1), batch)["nlvr"]) == pytest.approx(float(expected))


def test_a_group_is_consistent_if_all_its_statements_are_judged_right(task_tree):
    task = NLVR(parse_config(task_tree("nlvr")))
    examples = [statement("1", True, "a"), statement("2", False, "a"), statement("3", True, "b"), statement("4", None)]
    said = {"1": True, "2": False, "3": False, "4": True}
    metrics = task.metrics(examples, {key: {"answer": answer} for key, answer in said.items()})
    assert metrics == {"accuracy": pytest.approx(2 / 3), "consistency": 0.5, "num_examples": 3}


def test_training_needs_labels(task_tree):
    with pytest.raises(ConfigError, match="example 2 has no label: take a split that publishes them"):
        NLVR(parse_config(task_tree("nlvr"))).trainable([statement("1", True), statement("2", None)])


def test_the_two_images_are_not_exchangeable(task_tree):
    model = NLVR(parse_config(task_tree("nlvr"))).model()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = {"input_ids": torch.tensor([[2, 7, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.bool)}
    images = torch.randn(1, 2, 3, 64, 64)
    one, other = (model.eval()(pixels, **inputs).logits for pixels in (images, images.flip(1)))
    assert not torch.allclose(one, other)


def test_csv_has_the_form_that_the_corpus_script_reads(tmp_path):
    """NLVR's `metrics_images.py` reads the first column up to the first dot without split, and the second column."""
    predictions = {f"dev-12-0-{k}": {"answer": k != 3} for k in range(6)} | {"dev-13-1-0": {"skipped": "missing image"}}
    NLVR.write_csv(predictions, tmp_path / "out.csv")
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[:2] == ["dev-12-0-0.png,true", "dev-12-0-1.png,true"]
    read = {"-".join(line.split(",")[0].split(".")[0].split("-")[1:]): line.split(",")[1] for line in lines}
    assert read == {f"12-0-{k}": "false" if k == 3 else "true" for k in range(6)}
