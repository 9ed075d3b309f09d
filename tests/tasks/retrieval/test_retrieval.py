"""Contrastive loss and negatives against loops, recall with several captions per image, and re-ranking."""

import math

import numpy as np
import pytest
import torch

from eve_ds.config import ConfigError, parse_config
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model.eve import initialize_weights
from eve_ds.objectives.contrastive import IGNORED, contrastive_loss, draw_hard_negatives
from eve_ds.tasks.batches import ImageReader, Inference, TaskBatch, TaskCollator
from eve_ds.tasks.examples import Example
from eve_ds.tasks.registry import task_class
from eve_ds.tasks.retrieval import Retrieval


def caption(key, group, text="a small red circle"):
    rng = np.random.default_rng(sum(map(ord, group)))
    return Example(key, (rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),), text, group)


def drawn(task):
    model = task.model()
    initialize_weights(model, task.config.model, seed=1)
    return model.eval()


def test_contrastive_loss_shares_the_target_among_captions_of_one_image():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.5, 3.0]])
    same = torch.tensor([[True, True, False], [False, False, True]])
    expected = 0.0
    for row in range(2):
        total = sum(math.exp(value) for value in logits[row])
        right = [-math.log(math.exp(logits[row, column]) / total) for column in range(3) if same[row, column]]
        expected += sum(right) / len(right) / 2
    assert float(contrastive_loss(logits, logits, same)) == pytest.approx(expected)


def same_image(*targets):
    numbers = torch.tensor(targets)
    return numbers.unsqueeze(1) == numbers.unsqueeze(0)


def test_negatives_are_of_other_images_and_hard_ones_are_drawn_more_often():
    similarity = torch.tensor([[9.0, 5.0, 3.0, 8.0]]).repeat(4, 1)
    torch.manual_seed(0)
    same = same_image(7, 8, 9, 7)  # rows 0 and 3 are of one image
    draws = torch.stack([draw_hard_negatives(similarity, same)[1] for _ in range(400)])
    assert set(draws[:, 0].tolist()) == {1, 2}
    assert set(draws[:, 1].tolist()) <= {0, 2, 3}
    chances = (draws[:, 0] == 1).float().mean()  # e^5 to e^3
    assert float(chances) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.06)


def test_a_batch_of_one_image_has_no_negatives(task_tree):
    task = Retrieval(parse_config(task_tree("retrieval")))
    examples = [caption("0", "a"), caption("1", "a")]
    batch = TaskBatch(
        examples,
        torch.randn(2, 1, 3, 64, 64),
        torch.tensor([[2, 5, 3], [2, 6, 3]]),
        torch.ones(2, 3, dtype=torch.bool),
        task.targets(examples),
    )
    output = drawn(task).train()(**batch.model_inputs())
    assert output.matching_labels.tolist() == [1, 1, IGNORED, IGNORED, IGNORED, IGNORED]


def test_a_confident_row_still_draws_a_negative():
    similarity = torch.tensor([[200.0, -200.0], [-200.0, 200.0]])
    image_ids, text_ids = draw_hard_negatives(similarity, same_image(0, 1))
    assert image_ids.tolist() == text_ids.tolist() == [1, 0]


def test_training_forward_gives_finite_terms_and_gradients_to_all_of_the_head(task_tree):
    task = Retrieval(parse_config(task_tree("retrieval")))
    model = drawn(task).train()
    examples = [caption("0", "a"), caption("1", "a"), caption("2", "b")]
    batch = TaskBatch(
        examples,
        torch.randn(3, 1, 3, 64, 64),
        torch.tensor([[2, 9, 3], [2, 8, 3], [2, 7, 3]]),
        torch.ones(3, 3, dtype=torch.bool),
        task.targets(examples),
    )
    output = model(**batch.model_inputs())
    assert output.same.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert output.matching_labels.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    terms = task.losses(output, batch)
    assert terms.keys() == {"itc", "itm", "load_balancing", "router_z"}
    (terms["itc"] + terms["itm"]).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.head.parameters())

    alone = [caption("0", "a"), caption("1", "a"), caption("2", "a")]
    output = model(**(batch.model_inputs() | {"targets": task.targets(alone)}))
    assert output.matching_labels.tolist() == [1, 1, 1] + [IGNORED] * 6


def test_recall_counts_any_caption_of_the_image(task_tree):
    task = Retrieval(parse_config(task_tree("retrieval")))
    examples = [caption("0", "a"), caption("1", "a"), caption("2", "b"), caption("3", "b")]
    found = {
        "image:a": {"dot": ["2", "1"], "reranked": ["1", "2"]},
        "image:b": {"dot": ["2", "1"], "reranked": ["0", "1"]},
        "text:0": {"dot": ["a", "b"], "reranked": ["a", "b"]},
        "text:1": {"dot": ["b", "a"], "reranked": ["b", "a"]},
        "text:2": {"dot": ["b", "a"], "reranked": ["b", "a"]},
        "text:3": {"skipped": "image of the caption could not be read"},
    }
    metrics = task.metrics(examples, found)
    assert metrics["num_examples"] == 5
    assert metrics["dot"]["text_retrieval"] == {"R@1": 0.5, "R@5": 1.0, "R@10": 1.0}
    assert metrics["dot"]["image_retrieval"] == {"R@1": pytest.approx(2 / 3), "R@5": 1.0, "R@10": 1.0}
    assert metrics["reranked"]["text_retrieval"] == {"R@1": 0.5, "R@5": 0.5, "R@10": 0.5}


def test_candidates_equal_a_loop_over_all_pairs(task_tree):
    task = Retrieval(parse_config(task_tree("retrieval", rerank=3)))
    model, collate = drawn(task), TaskCollator(task.config, load_tokenizer("scenes"))
    words = ("red circle", "blue square", "green cross", "white triangle", "cyan circle")
    examples = [caption(str(i), "abbcd"[i], f"a {text}") for i, text in enumerate(words)]
    inference = Inference(model, ImageReader(task.config, training=False), collate, batch_size=2)
    records = {r["key"]: r for r in task.predict(inference, examples, task.queries(examples))}
    assert list(records) == ["image:a", "image:b", "image:c", "image:d", *(f"text:{i}" for i in range(5))]
    with torch.no_grad():
        for key in ("image:b", "text:3"):
            scores = {}
            for other in examples:
                pair = (next(e for e in examples if key == f"image:{e.group}" or key == f"text:{e.key}"), other)
                image, text = pair if key.startswith("image") else pair[::-1]
                batch = collate([text], [np.stack(image.images)])
                pixels = batch.normalized_pixels.squeeze(1)
                dot = model.image_features(pixels) @ model.text_features(batch.input_ids, batch.attention_mask).t()
                match = model.match_logits(pixels, batch.input_ids, batch.attention_mask)
                scores[other.key if key.startswith("image") else other.group] = (float(dot), float(match))
            by_dot = sorted(scores, key=lambda name: -scores[name][0])
            assert records[key]["dot"] == by_dot
            assert records[key]["reranked"] == sorted(by_dot[:3], key=lambda name: -scores[name][1]) + by_dot[3:]


def test_reranking_needs_matching(task_tree):
    with pytest.raises(ConfigError, match=r"task\.rerank \(4\) needs image-text matching: set it to 0"):
        task_class(parse_config(task_tree("retrieval", itm_weight=0)))
