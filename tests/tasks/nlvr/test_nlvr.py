"""Loss, accuracy and consistency of statements, and the published form of predictions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eve_ds.config import ConfigError, parse_config
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.tasks.batches import TaskBatch, TaskCollator
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


@pytest.mark.parametrize(("profile", "routing"), [("official", "capacity"), ("default", "dropless")])
def test_each_side_takes_capacity_of_its_own(task_tree, profile, routing):
    """The released code makes one backbone pass per image; here both sides share the matrix products."""
    tree = task_tree("nlvr")
    tree["model"] |= {"profile": profile, "moe": tree["model"].get("moe", {}) | {"routing": routing}}
    tree["model"]["moe"] |= {"capacity_factor": 0.5, "min_capacity": 1}
    model = NLVR(parse_config(tree)).model().eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images, input_ids = torch.randn(3, 2, 3, 64, 64), torch.randint(2, 200, (3, 12))
    mask = torch.arange(12) < torch.tensor([[12], [5], [8]])
    with torch.no_grad():
        sides = [model.backbone(images[:, side], input_ids, mask) for side in range(2)]
        states = [side.stream.padded()[:, side.num_image_tokens] for side in sides]
        expected = model.head(torch.cat(states, dim=1))
        found = model(images, input_ids, mask)
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)
    dropped = sum(float(layer.statistics.dropped.sum()) for layer in found.moe)
    assert (dropped > 0) == (routing == "capacity")
    assert len(found.moe) == 2 * len(sides[0].moe)


@pytest.mark.parametrize("profile", ["official", "default"])
def test_official_profile_pads_texts_as_the_released_code_does(task_tree, profile):
    tree = task_tree("nlvr")
    tree["model"]["profile"] = profile
    config = parse_config(tree)
    input_ids, mask = TaskCollator(config, load_tokenizer(config.data.tokenizer)).encode(["a red square", "a"])
    longest = int(mask.sum(dim=1).max())
    assert input_ids.shape[1] == (config.model.text_length if profile == "official" else longest)
    assert longest < config.model.text_length


def test_csv_has_the_form_that_the_corpus_script_reads(tmp_path):
    """NLVR's `metrics_images.py` reads the first column up to the first dot without split, and the second column."""
    predictions = {f"dev-12-0-{k}": {"answer": k != 3} for k in range(6)} | {"dev-13-1-0": {"skipped": "missing image"}}
    NLVR.write_csv(predictions, tmp_path / "out.csv")
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[:2] == ["dev-12-0-0.png,true", "dev-12-0-1.png,true"]
    read = {"-".join(line.split(",")[0].split(".")[0].split("-")[1:]): line.split(",")[1] for line in lines}
    assert read == {f"12-0-{k}": "false" if k == 3 else "true" for k in range(6)}
