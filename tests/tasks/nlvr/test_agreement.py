"""Agreement of statements and images against loops over words and places in fp64, and training of the head."""

import math

import pytest
import torch

from eve_ds.config import ConfigError, parse_config
from eve_ds.data.captions import CaptionEncoder
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.export import load
from eve_ds.tasks.batches import TaskCollator
from eve_ds.tasks.examples import Example
from eve_ds.tasks.nlvr import NLVR, agreement
from eve_ds.tasks.registry import task_class
from eve_ds.tasks.saved import load_task_model, save_task_model
from eve_ds.tasks.vqa import VQA
from eve_ds.training.optimizer import build_optimizer
from eve_ds.training.task_weights import lr_scales, prepare_weights

STATEMENTS = [
    "both images contain a red circle",
    "a cross",
    "the left image contains more objects than the right image",
]
NUM_HIDDEN = 5


def optimizer_of(model, config, task):
    return build_optimizer(model, config, ZERO, lr_scales(config))


@pytest.fixture
def encoder():
    return CaptionEncoder(load_tokenizer("scenes"), max_length=24)


@pytest.fixture
def start(pretrained, task_tree):
    """The function `start(**of_task)`, which returns a task, its model initialized from an export, and the export."""

    def make(**of_task):
        folder = pretrained("mim+mlm")
        tree = task_tree("nlvr", features="words", hidden_words=NUM_HIDDEN, **of_task)
        config = parse_config(tree | {"train": {"init": str(folder)}})
        task = NLVR.from_examples(config, [])
        model = task.model()
        torch.manual_seed(0)
        prepare_weights(model, config, task)
        return task, model.eval(), folder

    return make


def encoded(statements):
    config = parse_config({"model": {"vocab_size": 256, "text_length": 24}})
    return TaskCollator(config, load_tokenizer("scenes")).encode(statements)


@torch.no_grad()
@pytest.mark.parametrize("least", [-8.0, -30.0])
def test_agreement_equals_loops_over_words_and_places(start, encoder, monkeypatch, least):
    """The lower bound is for pairs of words, which random weights make less likely than the default bound."""
    monkeypatch.setattr(agreement, "LEAST", least)
    _, model, folder = start()
    eve, _, _ = load(folder)
    pixels = torch.randn(len(STATEMENTS), 2, 3, 64, 64)
    input_ids, mask = encoded(STATEMENTS)
    # Sharper than random weights: places differ, and only some words fall below the bound.
    for backbone in (eve.backbone, model.backbone):
        backbone.text_embedding.word.weight.mul_(10)
        backbone.text_embedding.position.mul_(50)
    found = model.agreement(model.hidden_words(pixels.flatten(0, 1), NUM_HIDDEN), input_ids, mask)
    assert found.shape == (3, 2, input_ids.shape[1], 2)
    hidden = torch.tensor([[encoder.cls_id] + [encoder.mask_id] * NUM_HIDDEN + [encoder.sep_id]])
    for number, statement in enumerate(STATEMENTS):
        ids = encoder.encode(statement).tolist()
        for image in range(2):
            logits = eve(
                pixels[number, image][None], input_ids=hidden, masked_token_ids=torch.arange(1, NUM_HIDDEN + 1)
            ).token_logits()
            p = logits.double().softmax(dim=1)
            for j in range(input_ids.shape[1]):
                if not 0 < j < len(ids) - 1:
                    assert found[number, image, j].tolist() == [0.0, 0.0], "special tokens and padding"
                    continue
                alone = sum(float(p[n, ids[j]]) for n in range(NUM_HIDDEN))
                pair = sum(float(p[n, ids[j]] * p[n + 1, ids[j + 1]]) for n in range(NUM_HIDDEN - 1))
                expected = [max(math.log(value), least) * -2 / least + 1 for value in (alone, pair)]
                assert found[number, image, j].tolist() == pytest.approx(expected, abs=1e-4)
    pairs = found[..., 1][found[..., 1] != 0]
    assert ((pairs == -1).float().mean() < 0.5) == (least < -8), "both kinds must be compared"


@torch.no_grad()
def test_a_judgment_depends_only_on_its_own_images_and_words(start):
    _, model, _ = start()
    pixels = torch.randn(len(STATEMENTS), 2, 3, 64, 64)
    input_ids, mask = encoded(STATEMENTS)
    together = model(pixels, input_ids, mask).logits
    for number, statement in enumerate(STATEMENTS):
        alone = model(pixels[number : number + 1], *encoded([statement])).logits[0]
        torch.testing.assert_close(together[number], alone, atol=1e-5, rtol=1e-5)
    swapped = model(pixels.flip(1), input_ids, mask).logits
    assert ((together - swapped).abs().amax(dim=1) > 1e-3).all(), "left and right must be distinguished"


def test_the_loss_reaches_every_weight_of_the_head(start):
    task, model, _ = start()
    examples = [Example(str(i), (), text, label=bool(i % 2)) for i, text in enumerate(STATEMENTS)]
    collate = TaskCollator(task.config, load_tokenizer("scenes"), task.targets)
    batch = collate(examples, [torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8).numpy() for _ in examples])
    terms = task.losses(model.train()(**batch.model_inputs()), batch)
    terms["nlvr"].backward()
    unused = {name for name, parameter in model.head.named_parameters() if not parameter.grad.abs().sum() > 0}
    assert unused == set()
    assert model.backbone.text_embedding.word.weight.grad.abs().sum() > 0


def test_head_weights_are_pre_trained_or_drawn_with_unit_gain(start):
    task, model, folder = start()
    eve, _, _ = load(folder)
    for name, weight in eve.text_head.state_dict().items():
        assert torch.equal(model.head.text_head.state_dict()[name], weight)
    again = task.model()
    torch.manual_seed(0)
    prepare_weights(again, task.config, task)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    drawn = model.head.layers.layers[0].linear1.weight.detach()  # (32, 16): 512 numbers of standard deviation 1/4
    assert float(drawn.std()) == pytest.approx(0.25, abs=0.03)


def test_a_fine_tuned_nlvr_model_initializes_the_whole_head(start, task_tree, tmp_path):
    task, model, _ = start()
    save_task_model(tmp_path / "saved", task, task.config, load_tokenizer("scenes"), model.state_dict(), {})
    config = task.config.model_copy(update={"train": task.config.train.model_copy(update={"init": tmp_path / "saved"})})
    again = task.model()
    torch.manual_seed(1)
    prepare_weights(again, config, task)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())
    asked = VQA(parse_config(task_tree("vqa")), ["red", "blue"])
    prepare_weights(asked.model(), asked.config.model_copy(update={"train": config.train}), asked)


def test_a_frozen_backbone_has_learning_rate_zero(start, task_tree):
    task, model, _ = start(freeze_backbone=True)
    scales = {id(p): g["lr_scale"] for g in optimizer_of(model, task.config, task).param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert scales[id(parameter)] == (0.0 if name.startswith("backbone.") else 1.0), name
    drawn = parse_config(task_tree("nlvr", features="words", freeze_backbone=True))
    model = NLVR.from_examples(drawn, []).model()
    groups = optimizer_of(model, drawn, task).param_groups
    assert {group["lr_scale"] for group in groups} == {1.0}, "a random backbone must be trained"


def test_only_the_word_embedding_of_the_backbone_does_not_decay(start):
    task, model, _ = start()
    decays = {
        id(p): g["weight_decay"] > 0 for g in optimizer_of(model, task.config, task).param_groups for p in g["params"]
    }
    named = dict(model.named_parameters())
    assert decays[id(named["head.word.weight"])], "a linear layer that happens to be named word"
    assert not decays[id(named["backbone.text_embedding.word.weight"])]


ZERO = {"zero_optimization": {"stage": 1}}


def test_a_saved_model_gives_the_same_logits(start, tmp_path):
    task, model, _ = start()
    save_task_model(tmp_path / "saved", task, task.config, load_tokenizer("scenes"), model.state_dict(), {})
    loaded = load_task_model(tmp_path / "saved")
    pixels = torch.randn(3, 2, 3, 64, 64)
    batch = encoded(STATEMENTS)
    assert torch.equal(loaded.model(pixels, *batch).logits, model(pixels, *batch).logits)
    (tmp_path / "saved" / "template.json").unlink()
    with pytest.raises(ConfigError, match=r"template of captions .*template\.json cannot be read"):
        NLVR.load(task.config, tmp_path / "saved")


def test_contradictory_settings_are_refused(task_tree):
    with pytest.raises(ConfigError, match=r"task\.features \('words'\) is for the tasks nlvr and retrieval"):
        task_class(parse_config(task_tree("vqa", features="words")))
    expected = r"task\.hidden_words \(39\) and two special tokens must not exceed model\.text_positions \(40\)"
    with pytest.raises(ConfigError, match=expected):
        task_class(parse_config(task_tree("nlvr", features="words", hidden_words=39)))
    assert task_class(parse_config(task_tree("nlvr", features="words", hidden_words=38))) is NLVR
