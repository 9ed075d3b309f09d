"""Retrieval by masked words and by a pre-trained model without fine-tuning, against loops over captions and words."""

import json

import pytest
import torch
from PIL import Image

from eve_ds.config import ConfigError, parse_config
from eve_ds.data.captions import CaptionEncoder
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.evaluation.ask import rank
from eve_ds.evaluation.zero_shot import load_zero_shot
from eve_ds.export import load
from eve_ds.tasks.batches import ImageReader, Inference, TaskBatch, TaskCollator
from eve_ds.tasks.examples import Example
from eve_ds.tasks.features.words import Template
from eve_ds.tasks.registry import task_class
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.saved import TaskModel, load_task_model, save_task_model, start_head_weights
from eve_ds.training.task_weights import prepare_weights

WORDS = {"itm_weight": 0, "rerank": 0, "features": "words"}
CAPTIONS = [
    "a small red circle",
    "a large blue square top left",
    "a cross",
    "two white circles and a small green cross",
]


@pytest.fixture
def encoder():
    return CaptionEncoder(load_tokenizer("scenes"), max_length=24)


def of_words(folder, task_tree, template):
    """The task and its model, initialized from an export."""
    tree = task_tree("retrieval", **WORDS)
    config = parse_config(tree | {"train": {"init": str(folder)}})
    task = Retrieval(config, template)
    model = task.model()
    prepare_weights(model, config, task)
    return task, model.eval()


def encoded(captions):
    return TaskCollator(
        parse_config({"model": {"vocab_size": 256, "text_length": 24}}), load_tokenizer("scenes")
    ).encode(captions)


@torch.no_grad()
def likelihood(eve, pixels, ids, hidden, encoder):
    """Log-probability, summed over the `hidden` places, of the words of one caption under EVE."""
    masked = ids.clone()
    masked[hidden] = encoder.mask_id
    logits = eve(pixels[None], input_ids=masked[None], masked_token_ids=torch.tensor(hidden)).token_logits().double()
    return sum(float(row.log_softmax(0)[ids[place]]) for row, place in zip(logits, hidden, strict=True))


def test_dot_products_of_features_are_log_likelihoods_of_captions(pretrained, task_tree, encoder):
    folder = pretrained("mim+mlm")
    eve, _, _ = load(folder)
    template = Template.of(CAPTIONS, encoder, most=4)
    assert len(template.lengths) == 4
    _, model = of_words(folder, task_tree, template)
    pixels = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        found = model.image_features(pixels) @ model.text_features(*encoded(CAPTIONS)).t()
    for image in range(3):
        for number, caption in enumerate(CAPTIONS):
            ids = torch.from_numpy(encoder.encode(caption))
            expected = likelihood(eve, pixels[image], ids, list(range(1, len(ids) - 1)), encoder)
            assert float(found[image, number]) == pytest.approx(expected, abs=1e-4)


def test_a_caption_is_compared_with_the_next_longer_length_and_cut_to_the_longest(pretrained, task_tree, encoder):
    folder = pretrained("mim+mlm")
    eve, _, _ = load(folder)
    template = Template((4, 6), encoder.cls_id, encoder.sep_id, encoder.mask_id)
    _, model = of_words(folder, task_tree, template)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = model.image_features(pixels) @ model.text_features(*encoded(CAPTIONS)).t()
    for number, caption in enumerate(CAPTIONS):
        words = torch.from_numpy(encoder.encode(caption))[1:-1][:6]
        length = 4 if len(words) <= 4 else 6
        ids = torch.tensor([encoder.cls_id, *words, *[encoder.mask_id] * (length - len(words)), encoder.sep_id])
        masked = ids.clone()
        masked[1:-1] = encoder.mask_id
        with torch.no_grad():
            logits = eve(pixels, input_ids=masked[None], masked_token_ids=torch.arange(1, length + 1)).token_logits()
        expected = sum(float(logits[i].double().log_softmax(0)[word]) for i, word in enumerate(words))
        assert float(found[0, number]) == pytest.approx(expected, abs=1e-4)


def test_pairs_are_scored_by_each_word_beside_half_of_the_others(pretrained, task_tree, encoder):
    folder = pretrained("mim+mlm")
    eve, _, _ = load(folder)
    _, model = of_words(folder, task_tree, Template.of(CAPTIONS, encoder, most=1))
    pixels = torch.randn(len(CAPTIONS), 3, 64, 64)
    with torch.no_grad():
        found = model.match_logits(pixels, *encoded(CAPTIONS))
    for number, caption in enumerate(CAPTIONS):
        ids = torch.from_numpy(encoder.encode(caption))
        even, odd = (list(range(first, len(ids) - 1, 2)) for first in (2, 1))
        expected = sum(likelihood(eve, pixels[number], ids, hidden, encoder) for hidden in (even, odd) if hidden)
        assert float(found[number]) == pytest.approx(expected, abs=1e-4)


def test_contrast_of_words_reaches_every_weight_of_the_head(pretrained, task_tree, encoder):
    task, model = of_words(pretrained("mim+mlm"), task_tree, Template.of(CAPTIONS, encoder, most=1))
    examples = [Example(str(i), (), caption, caption) for i, caption in enumerate(CAPTIONS)]
    batch = TaskBatch(examples, torch.randn(4, 1, 3, 64, 64), *encoded(CAPTIONS), task.targets(examples))
    output = model.train()(**batch.model_inputs())
    with torch.no_grad():
        scores = model.image_features(batch.normalized_pixels.squeeze(1)) @ model.text_features(*encoded(CAPTIONS)).t()
    torch.testing.assert_close(output.image_logits, scores)
    torch.testing.assert_close(output.text_logits, scores.t())
    terms = task.losses(output, batch)
    assert terms.keys() == {"itc", "load_balancing", "router_z"}
    terms["itc"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.head.parameters())
    assert model.backbone.text_embedding.word.weight.grad.abs().sum() > 0


def test_lengths_of_a_template_are_spread_and_hold_the_longest(encoder):
    captions = ["a" + " circle" * n for n in range(10)]
    assert Template.of(captions, encoder, most=4).lengths == (3, 5, 8, 10)
    assert Template.of(captions, encoder, most=1).lengths == (10,)
    assert Template.of([*captions, ""], encoder, most=20).lengths == tuple(range(1, 11))
    with pytest.raises(ConfigError, match="no caption has a word"):
        Template.of([""], encoder, most=4)


def test_the_template_is_saved_with_the_model(pretrained, task_tree, tmp_path):
    tree = task_tree("retrieval", **WORDS)
    config = parse_config(tree | {"train": {"init": str(pretrained("mim+mlm"))}})
    task = Retrieval.from_examples(config, [Example(str(i), (), caption) for i, caption in enumerate(CAPTIONS)])
    model = task.model()
    prepare_weights(model, config, task)
    save_task_model(tmp_path / "saved", task, config, load_tokenizer("scenes"), model.state_dict(), {})
    loaded = load_task_model(tmp_path / "saved")
    assert loaded.task.template == task.template
    assert len(task.template.lengths) == 1
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.model.image_features(pixels), model.eval().image_features(pixels))
    (tmp_path / "saved" / "template.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"template of captions .*template\.json cannot be read: 'lengths'"):
        Retrieval.load(config, tmp_path / "saved")


def test_captions_are_ranked_by_likelihood(pretrained, task_tree, encoder, tmp_path):
    template = Template.of(CAPTIONS, encoder, most=1)
    task, model = of_words(pretrained("mim+mlm"), task_tree, template)
    Image.new("RGB", (64, 64), (225, 45, 45)).save(tmp_path / "image.png")
    found = rank(TaskModel(task, model, task.config, load_tokenizer("scenes"), ""), tmp_path / "image.png", CAPTIONS)
    similarity = [item.similarity for item in found]
    assert similarity == sorted(similarity, reverse=True)
    assert all(value < 0 for value in similarity), "logarithms of probabilities"
    assert {item.match for item in found} == {None}, "no training has taught a match"


def test_words_have_no_matching_loss(task_tree):
    with pytest.raises(
        ConfigError, match=r"task\.features \('words'\) has no matching loss: set task\.itm_weight \(1\)"
    ):
        task_class(parse_config(task_tree("retrieval", features="words")))


# --- without fine-tuning ----------------------------------------------------------------------------------------------


def test_zero_shot_by_words_ranks_by_likelihood_relative_to_other_images(pretrained, encoder, tmp_path):
    torch.manual_seed(0)  # weights under which no two likelihoods are equal up to rounding
    folder = pretrained("mim+mlm")
    eve, _, _ = load(folder)
    (task, model, config, tokenizer, _), examples = load_zero_shot(folder, limit=6, rerank=3)
    examples = list(examples)
    collate = TaskCollator(config, tokenizer)
    inference = Inference(model, ImageReader(config, training=False), collate, batch_size=4)
    records = {r["key"]: r for r in task.predict(inference, examples, task.queries(examples))}
    pixels = collate(examples, [example.images[0][None] for example in examples]).normalized_pixels.squeeze(1)
    table = torch.zeros(6, 6, dtype=torch.float64)
    for column, example in enumerate(examples):
        ids = torch.from_numpy(encoder.encode(example.text))
        for row in range(6):
            table[row, column] = likelihood(eve, pixels[row], ids, list(range(1, len(ids) - 1)), encoder)
    centered = table - table.mean(dim=0)
    for row, example in enumerate(examples):
        order = [examples[i].key for i in centered[row].argsort(descending=True).tolist()]
        assert records[f"image:{example.group}"]["dot"] == order
        reranked = records[f"image:{example.group}"]["reranked"]
        assert sorted(reranked[:3]) == sorted(order[:3])
        assert reranked[3:] == order[3:]
        order = [examples[i].group for i in centered[:, row].argsort(descending=True).tolist()]
        assert records[f"text:{example.key}"]["dot"] == order


def test_zero_shot_by_class_tokens_has_the_features_of_pre_training(pretrained):
    folder = pretrained("itc+itm")
    eve, _, _ = load(folder)
    (task, model, *_), _ = load_zero_shot(folder, limit=4, rerank=2)
    assert task.template is None
    pixels, (ids, mask) = torch.randn(4, 3, 64, 64), encoded(CAPTIONS)
    with torch.no_grad():
        found = eve(pixels, input_ids=ids, attention_mask=mask).matching
        torch.testing.assert_close(model.image_features(pixels), found.image_features)
        torch.testing.assert_close(model.text_features(ids, mask), found.text_features)
        expected = found.logits[:4, 1] - found.logits[:4, 0]
        torch.testing.assert_close(model.match_logits(pixels, ids, mask), expected)


def test_features_that_the_objective_does_not_teach_are_refused(pretrained, task_tree, tmp_path):
    with pytest.raises(
        ConfigError, match="--features class_token: pre-training by mim, mlm does not teach it; use words"
    ):
        load_zero_shot(pretrained("mim+mlm"), features="class_token")
    with pytest.raises(
        ConfigError, match="--features words: pre-training by itc, itm does not teach it; use class_token"
    ):
        load_zero_shot(pretrained("itc+itm"), features="words")
    (task, *_), _ = load_zero_shot(pretrained("mlm+itc+itm"), features="words", limit=4)
    assert task.template is not None
    with pytest.raises(ConfigError, match="pre-training by mim does not teach retrieval: fine-tune the model first"):
        load_zero_shot(pretrained("mim"))
    with pytest.raises(ConfigError, match="--rerank 4 needs a model pre-trained with itm, this one has mlm, itc: use"):
        load_zero_shot(pretrained("mlm+itc"), rerank=4)
    (task, *_), _ = load_zero_shot(pretrained("mim+itc"), limit=4)
    assert task.template is None
    task = Retrieval(parse_config(task_tree("retrieval")))
    weights = {name: torch.zeros_like(weight) for name, weight in task.model().state_dict().items()}
    save_task_model(tmp_path / "tuned", task, task.config, load_tokenizer("scenes"), weights, {})
    with pytest.raises(ConfigError, match="is fine-tuned for retrieval: use `evaluate"):
        load_zero_shot(tmp_path / "tuned")


def test_fine_tuning_takes_the_heads_that_pre_training_has(pretrained, task_tree, tmp_path):
    folder = pretrained("itc+itm")
    config = parse_config(task_tree("retrieval") | {"train": {"init": str(folder)}})
    task = Retrieval(config)
    model = task.model()
    prepare_weights(model, config, task)
    eve, _, _ = load(folder)
    assert torch.equal(model.head.image_projection.weight, eve.matching.image_projection.weight)
    assert torch.equal(model.head.text_projection.weight, eve.matching.text_projection.weight)
    assert torch.equal(model.head.matching.bias, eve.matching.classifier.bias)
    assert torch.equal(model.head.log_temperature, eve.matching.log_temperature)
    assert start_head_weights(pretrained("mim+mlm"), task.pretrained_names()) == {}
    save_task_model(tmp_path / "tuned", task, config, load_tokenizer("scenes"), model.state_dict(), {})
    again = start_head_weights(tmp_path / "tuned", task.pretrained_names())
    assert again.keys() == {name for name in model.state_dict() if name.startswith("head.")}
    (tmp_path / "released.pth").write_bytes(b"")
    assert start_head_weights(tmp_path / "released.pth", task.pretrained_names()) == {}
    assert json.loads((tmp_path / "tuned" / "task.json").read_text()) == {}
