"""Contrastive and matching objectives: losses equal loops in fp64; hard negatives; heads of each set of objectives."""

import math

import pytest
import torch
from tiny import tiny_config

from eve_ds.config import ConfigError
from eve_ds.data.collate import Collator
from eve_ds.data.synthetic.scenes import Scenes
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.evaluation.scenes import evaluate_scenes, samples_of, trains_on_scenes
from eve_ds.model.eve import EVE, model_shapes
from eve_ds.model.moe import MoEOutput, RouterStatistics, sum_statistics
from eve_ds.model.with_losses import weighted_sum
from eve_ds.objectives.contrastive import MatchingOutput, draw_hard_negatives, matching_loss, pair_contrastive_loss
from eve_ds.objectives.pairs import Pairs
from eve_ds.objectives.pretraining import pretraining_losses
from eve_ds.objectives.registry import objectives_of
from eve_ds.objectives.router import view_router_losses

PAIRS, WIDTH = 5, 7
ITC_ITM, WITH_WORDS = ["itc", "itm"], ["mlm", "itc", "itm"]


def config_of(objectives, *overrides):
    return tiny_config(f"model.objectives={objectives}", *overrides)


def batch_of(config, count=4):
    collate = Collator(
        config, load_tokenizer("scenes"), objectives_of(config.model), has_images=True, has_captions=True
    )
    scenes = Scenes("easy", 0, "train")
    return collate(samples_of([scenes[number] for number in range(count)]))


def matching_of(generator):
    """Return predictions in fp64 with gradients, and the tensors that they depend on."""

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    images, texts = (draw(PAIRS, WIDTH) for _ in range(2))
    log_temperature = torch.tensor(math.log(0.07), dtype=torch.float64, requires_grad=True)
    unit = [torch.nn.functional.normalize(features, dim=1) for features in (images, texts)]
    logits = draw(3 * PAIRS, 2)
    return MatchingOutput(*unit, log_temperature.exp(), logits), (images, texts, log_temperature, logits)


def cross_entropy_by_hand(logits, target):
    """Cross entropy of logits in a list of () tensors."""
    return torch.log(sum(torch.exp(logit) for logit in logits)) - logits[target]


def contrastive_by_loops(matching):
    total = 0.0
    for i in range(PAIRS):
        for ours, theirs in (matching[:2], matching[1::-1]):
            similarities = [sum(a * b for a, b in zip(ours[i], theirs[j], strict=True)) for j in range(PAIRS)]
            total = total + cross_entropy_by_hand([value / matching.temperature for value in similarities], i)
    return total / (2 * PAIRS)


def matching_by_loops(matching):
    total = 0.0
    for row in range(3 * PAIRS):
        total = total + cross_entropy_by_hand(list(matching.logits[row]), 1 if row < PAIRS else 0)
    return total / (3 * PAIRS)


@pytest.mark.parametrize(
    ("loss", "by_loops"), [(pair_contrastive_loss, contrastive_by_loops), (matching_loss, matching_by_loops)]
)
def test_losses_and_gradients_equal_loops(loss, by_loops):
    matching, leaves = matching_of(torch.Generator().manual_seed(0))
    found, expected = loss(matching.logits if loss is matching_loss else matching), by_loops(matching)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True) for value in (found, expected)]
    assert any(gradient is not None for gradient in grads[0])
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_loss_is_the_weighted_sum_of_its_terms():
    config = config_of(WITH_WORDS, "loss.itc_weight=0.5", "loss.itm_weight=2.0")
    torch.manual_seed(0)
    model, batch = EVE(config.model).train(), batch_of(config)
    output = model(**batch.model_inputs())
    counts = {"masked_patches": 0, "masked_tokens": len(batch.token_labels), "tokens": 100}
    terms = pretraining_losses(output, batch.targets(), counts, config.model)
    assert set(terms) == {"mlm", "itc", "itm", "load_balancing", "router_z"}
    assert all(term.dtype == torch.float32 and term.ndim == 0 for term in terms.values())
    weighed = 4.0 * terms["mlm"] + 0.5 * terms["itc"] + 2.0 * terms["itm"] + 0.001 * terms["load_balancing"]
    torch.testing.assert_close(weighted_sum(terms, config.loss.weights), weighed)
    weighted_sum(terms, config.loss.weights).backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert idle == set(), "every parameter of the model must get a gradient"


def test_hard_negatives_exclude_the_pair_and_follow_the_softmax_of_similarity():
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(6, WIDTH), dim=1)
    similarity = features @ features.flip(0).t() / 0.5
    draws = [draw_hard_negatives(similarity) for _ in range(4000)]
    for which, logits in ((0, similarity.t()), (1, similarity)):
        ids = torch.stack([draw[which] for draw in draws])  # (draws, B)
        assert not (ids == torch.arange(6)).any()
        shares = torch.nn.functional.one_hot(ids, 6).float().mean(dim=0)
        expected = logits.masked_fill(torch.eye(6, dtype=torch.bool), -math.inf).softmax(dim=1)
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.04)  # five standard deviations of a share


def test_a_pair_without_similar_partners_still_gets_a_negative():
    eye = torch.eye(3)
    image_ids, text_ids = draw_hard_negatives(eye / 0.01)
    assert (image_ids != torch.arange(3)).all()
    assert (text_ids != torch.arange(3)).all()


def test_with_negatives_returns_pairs_then_other_images_then_other_texts():
    pixel_values = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    texts = {"input_ids": torch.tensor([[10], [11], [12]]), "attention_mask": torch.tensor([[True], [False], [True]])}
    pairs = Pairs.of({"pixel_values": pixel_values, **texts})
    joint = pairs.with_negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    assert joint.pixel_values[:, 0, 0, 0].tolist() == [0, 1, 2, 1, 2, 0, 0, 1, 2]
    assert joint.input_ids.flatten().tolist() == [10, 11, 12, 10, 11, 12, 12, 10, 11]
    assert joint.attention_mask.flatten().tolist() == [1, 0, 1, 1, 0, 1, 1, 1, 0]
    assert joint.image_mask.all()


@pytest.mark.parametrize("objectives", [ITC_ITM, WITH_WORDS], ids="+".join)
def test_output_equals_that_of_separate_passes(objectives):
    config = config_of(objectives, "masking.language_view_patch_share=1")
    torch.manual_seed(0)
    model, batch = EVE(config.model).eval(), batch_of(config)
    heads, backbone = model.matching, model.backbone
    torch.manual_seed(1)
    output = model(**batch.model_inputs())
    torch.manual_seed(1)
    pixels, words, mask = batch.normalized_pixels, batch.input_ids, batch.attention_mask
    image = heads.image_projection(backbone(pixels).stream.padded()[:, 0])
    text = heads.text_projection(backbone(input_ids=words, attention_mask=mask).stream.padded()[:, 0])
    image, text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    torch.testing.assert_close(output.matching.image_features, image)
    torch.testing.assert_close(output.matching.text_features, text)
    assert output.matching.temperature.item() == pytest.approx(0.07)
    image_ids, text_ids = draw_hard_negatives(image @ text.t() / torch.tensor(0.07))
    for part, (pictures, ids, masks) in enumerate(
        ((pixels, words, mask), (pixels[image_ids], words, mask), (pixels, words[text_ids], mask[text_ids]))
    ):
        encoded = backbone(pictures, ids, masks)
        logits = heads.classifier(encoded.stream.padded()[:, encoded.num_image_tokens])
        torch.testing.assert_close(output.matching.logits[4 * part : 4 * part + 4], logits)
    if objectives == ITC_ITM:
        assert output.token_hidden is None
        return
    encoded = backbone(pixels, batch.masked_input_ids, mask)
    states = encoded.stream.padded()[:, encoded.num_image_tokens :].flatten(0, 1)
    torch.testing.assert_close(output.token_hidden, model.text_head(states[batch.masked_token_ids]))


def test_a_single_pair_and_a_single_modality_are_refused():
    config = config_of(ITC_ITM)
    model = EVE(config.model)
    with pytest.raises(ValueError, match="hard negatives need at least 2 pairs, not 1: raise the micro-batch size"):
        model(**batch_of(config, count=1).model_inputs())
    with pytest.raises(ValueError, match="need pairs of an image and a text"):
        model(input_ids=torch.ones(2, 3, dtype=torch.int64))
    contrast = config_of(["itc"])
    one = EVE(contrast.model)(**batch_of(contrast, count=1).model_inputs())
    assert (one.matching.image_features.shape, one.matching.logits) == ((1, 32), None), (
        "a single pair is valid: its negatives come from other ranks"
    )


def test_each_set_of_objectives_has_exactly_its_heads():
    shapes = {
        "+".join(names): model_shapes(config_of(names).model)
        for names in (["joint"], ["mim"], ["mlm"], ["mim", "mlm"], ITC_ITM, WITH_WORDS, ["mim", "itc"])
    }
    parts = {names: {name.split(".")[0] for name in found} - {"backbone"} for names, found in shapes.items()}
    assert parts == {
        "joint": {"pixel_decoder", "text_head"},
        "mim": {"pixel_decoder"},
        "mlm": {"text_head"},
        "mim+mlm": {"pixel_decoder", "text_head"},
        "itc+itm": {"matching"},
        "mlm+itc+itm": {"matching", "text_head"},
        "mim+itc": {"matching", "pixel_decoder"},
    }
    heads = {name: tuple(shape) for name, shape in shapes["itc+itm"].items() if name.startswith("matching.")}
    projections = {
        "matching.image_projection.weight": (32, 32),
        "matching.text_projection.weight": (32, 32),
        "matching.log_temperature": (1,),
    }
    assert heads == projections | {"matching.classifier.weight": (2, 32), "matching.classifier.bias": (2,)}
    assert {name for name in shapes["mim+itc"] if name.startswith("matching.")} == projections.keys()


def test_initial_backbone_does_not_depend_on_the_objectives():
    states = []
    for names in (["joint"], ["mim", "mlm"], WITH_WORDS):
        torch.manual_seed(0)
        states.append(EVE(config_of(names).model).backbone.state_dict())
    for other in states[1:]:
        assert all(torch.equal(states[0][name], other[name]) for name in states[0])


@pytest.mark.parametrize(("low", "high"), [(0.15, 0.15), (0.5, 0.5), (0.15, 0.5)])
def test_ratio_of_masked_words_is_within_its_bounds(low, high):
    ratios = [f"masking.text_mask_ratio={low}", f"masking.max_text_mask_ratio={high}"]
    batch = batch_of(config_of(WITH_WORDS, *ratios), count=64)
    maskable = batch.attention_mask.sum(dim=1) - 2
    rows = batch.masked_token_ids // batch.input_ids.shape[1]
    chosen = torch.bincount(rows, minlength=64)
    assert (chosen >= (low * maskable - 0.5).clamp(min=1)).all()
    assert (chosen <= high * maskable + 0.5).all()


def test_views_are_balanced_separately_and_their_statistics_add_up():
    def made(balance, z_sum, tokens):
        statistics = RouterStatistics(
            torch.full((2, 4), tokens), torch.zeros(2), torch.full((2,), tokens), torch.tensor(tokens)
        )
        return MoEOutput(torch.zeros(3), torch.tensor(balance), torch.tensor(z_sum), statistics)

    views = {"mim": (made(1.0, 10.0, 2.0), made(2.0, 1.0, 2.0)), "mlm": (made(3.0, 20.0, 5.0), made(4.0, 3.0, 5.0))}
    terms = view_router_losses(views, tokens=10)
    assert float(terms["load_balancing"]) == pytest.approx((1.5 + 3.5) / 2)
    assert float(terms["router_z"]) == pytest.approx((5.5 + 11.5) / 10)
    total = sum_statistics([layers[0].statistics for layers in views.values()])
    assert total.routes.tolist() == [[7.0] * 4] * 2
    assert total.entropy_sum == 7.0
    assert view_router_losses({"mim": ()}, tokens=10) == {}
    views["itc_text"] = (made(0.0, 0.0, 0.0),) * 2
    assert float(view_router_losses(views, tokens=10)["load_balancing"]) == pytest.approx((1.5 + 3.5) / 2)
    assert float(view_router_losses({"mim": views["itc_text"]}, tokens=0)["load_balancing"]) == 0


def test_models_without_a_decoder_are_not_evaluated_on_scenes():
    config = config_of(ITC_ITM)
    assert trains_on_scenes(config_of(["joint"]))
    assert trains_on_scenes(config_of(WITH_WORDS))
    assert not trains_on_scenes(config)
    with pytest.raises(ConfigError, match=r"model.objectives \(itc, itm\) must include mim, mlm or joint"):
        evaluate_scenes(EVE(config.model), config, load_tokenizer("scenes"))


@pytest.mark.parametrize("objectives", [ITC_ITM, WITH_WORDS], ids="+".join)
def test_transformers_model_has_the_same_weights_and_states(objectives):
    from eve_ds.export.hf import EveConfig, EveModel

    config = config_of(objectives)
    torch.manual_seed(0)
    model, batch = EVE(config.model).eval(), batch_of(config)
    other = EveModel(EveConfig(**config.model.model_dump(mode="json"))).eval()
    other.load_state_dict(model.state_dict())
    states = other(batch.normalized_pixels, batch.input_ids, batch.attention_mask).last_hidden_state
    torch.testing.assert_close(
        states, model.backbone(batch.normalized_pixels, batch.input_ids, batch.attention_mask).stream.padded()
    )
