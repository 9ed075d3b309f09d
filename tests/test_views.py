"""Pre-training views: the tokens each one shows and hides, and one pass over all views against one pass per view."""

import os
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny import tiny_tree
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from eve_ds.checkpoint.check_batch import emptied
from eve_ds.config import parse_config
from eve_ds.data.batch import Sample
from eve_ds.data.collate import Collator
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model import attention
from eve_ds.model.eve import EVE
from eve_ds.model.moe import MoE, packs_views
from eve_ds.model.with_losses import weighted_sum
from eve_ds.objectives.contrastive import draw_hard_negatives
from eve_ds.objectives.pairs import Pairs, layout_of_negatives
from eve_ds.objectives.pretraining import pretraining_losses
from eve_ds.objectives.registry import objectives_of
from eve_ds.ops import build, feed_forward
from eve_ds.parallel.experts.moe import DeepSpeedMoE
from eve_ds.views import IMAGE, TEXT, Layout, Packing, View

CAPTIONS = ("a small red circle top left", "a large blue cross bottom right and a small green square top left")
ALL = ["mim", "mlm", "itc", "itm"]
COUNTS = {"masked_patches": 24.0, "masked_tokens": 12.0, "tokens": 100.0}
SETS = (["mlm"], ["mim"], ["mim", "mlm"], ["joint"], ["mlm", "itc", "itm"], ["mim", "mlm", "itc"], ALL)
CHEAP = {
    "predicted_patch_share": 0.5,
    "text_to_image_share": 0.5,
    "text_to_image_mask_ratio": 0.8,
    "image_view_share": 0.6,
    "image_view_word_share": 0.5,
    "language_view_patch_share": 0.5,
}
EXACT = {"rtol": 1e-10, "atol": 1e-12}
"""fp64 tolerance for sums in another order."""


def config_of(objectives=("mim", "mlm"), masking=None, **model):
    model = {"image_size": 32, "initializer_range": 0.2, "objectives": list(objectives)} | model
    return parse_config({"model": tiny_tree(**model), "masking": masking or {}})


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def pairs(count=6):
    return [Sample(f"k{number}", 0, image(number), CAPTIONS[number % 2]) for number in range(count)]


MIXED = [*pairs(4), Sample("image", 0, image(7), None), Sample("text", 0, None, CAPTIONS[1])]


def batch_of(config, samples=None, has_images=True, has_captions=True):
    collate = Collator(
        config, load_tokenizer("scenes"), objectives_of(config.model), has_images=has_images, has_captions=has_captions
    )
    return collate(pairs() if samples is None else samples)


def model_of(config, seed=0):
    torch.manual_seed(seed)
    return EVE(config.model).double()


def in_fp64(batch):
    pixels = batch.normalized_pixels
    return replace(batch, pixel_values=None if pixels is None else pixels.double())


def losses_of(model, config, batch):
    torch.manual_seed(5)  # for hard negatives
    output = model(**batch.model_inputs())
    return output, pretraining_losses(output, batch.targets(), COUNTS, config.model)


@pytest.fixture(autouse=True)
def _plain_ops(monkeypatch):
    monkeypatch.setenv("EVE_DS_OPS", "reference")


# --- content of the views of a batch ----------------------------------------------------------------------------------


def test_image_view_masks_patches_and_language_view_masks_words():
    batch = batch_of(config_of())
    mask_id = load_tokenizer("scenes").mask_token_id
    assert not (batch.input_ids == mask_id).any()
    masked = batch.masked_input_ids.flatten()
    assert (masked[batch.masked_token_ids] == mask_id).all()
    assert torch.equal(masked.scatter(0, batch.masked_token_ids, batch.token_labels), batch.input_ids.flatten())
    assert batch.visible_patch_ids.shape == (6, 4)
    assert batch.masked_patch_ids.shape == (6, 12)
    assert batch.image_view_ids is batch.image_view_text_mask is batch.language_patch_ids is None


@pytest.mark.parametrize("objectives", SETS, ids="+".join)
def test_batch_has_only_the_fields_of_its_views(objectives):
    batch = batch_of(config_of(objectives, CHEAP))
    has_image_view, has_words = {"mim", "joint"} & {*objectives}, {"mlm", "joint"} & {*objectives}
    assert (batch.masked_patch_ids is not None) == bool(has_image_view)
    assert (batch.visible_patch_ids is not None) == bool(has_image_view)
    assert (batch.masked_input_ids is not None) == (batch.token_labels is not None) == bool(has_words)
    assert (batch.language_patch_ids is not None) == ("mlm" in objectives)
    assert (batch.image_view_text_mask is not None) == ("mim" in objectives)
    assert batch.input_ids is not None


def test_masks_of_a_view_depend_only_on_seed_epoch_key_and_view():
    config = config_of(ALL, CHEAP)
    whole = batch_of(config)
    parts = [batch_of(config, pairs()[row : row + 1]) for row in range(6)]
    chosen = whole.image_view_ids.tolist()
    assert 0 < len(chosen) < 6
    place = 0
    for row, part in enumerate(parts):
        assert len(part.visible_patch_ids) == (row in chosen)
        assert torch.equal(part.language_patch_ids[0], whole.language_patch_ids[row])
        length = part.input_ids.shape[1]
        assert torch.equal(part.masked_input_ids[0], whole.masked_input_ids[row, :length])
        if row in chosen:
            for name in ("visible_patch_ids", "visible_patch_mask", "masked_patch_ids"):
                assert torch.equal(getattr(part, name)[0], getattr(whole, name)[place]), name
            assert torch.equal(part.image_view_text_mask[0], whole.image_view_text_mask[place, :length])
            place += 1
    only_words = batch_of(config_of(["mlm"], CHEAP))
    assert torch.equal(only_words.masked_input_ids, whole.masked_input_ids), "other views must have no effect"
    later = batch_of(config, [replace(sample, epoch=1) for sample in pairs()])
    assert not torch.equal(later.masked_input_ids, whole.masked_input_ids)
    joint = batch_of(config_of(["joint"]))
    assert not torch.equal(joint.masked_input_ids, batch_of(config_of()).masked_input_ids)


def test_shares_of_samples_words_and_patches_match_the_settings():
    samples = [Sample(f"k{number}", 0, image(), CAPTIONS[1]) for number in range(400)]
    masking = {"image_view_share": 0.3, "image_view_word_share": 0.25, "language_view_patch_share": 0.5}
    batch = batch_of(config_of(masking=masking), samples)
    # 400 draws: the standard error of the share is 0.023.
    assert len(batch.image_view_ids) / 400 == pytest.approx(0.3, abs=0.09)
    words = len(CAPTIONS[1].split())
    assert (batch.image_view_text_mask.sum(dim=1) == 2 + round(0.25 * words)).all()
    length = int(batch.attention_mask[0].sum())
    assert batch.image_view_text_mask[:, [0, length - 1]].all(), "[CLS] and [SEP] are always shown"
    assert batch.language_patch_ids.shape == (400, 8)
    assert (batch.language_patch_ids.diff(dim=1) > 0).all()
    counts = torch.bincount(batch.language_patch_ids.flatten(), minlength=16)
    assert (counts / 400 - 0.5).abs().max() < 0.13  # five standard deviations


@pytest.mark.parametrize(("ratio", "visible"), [(0.0, 16), (0.01, 15), (0.99, 1), (1.0, 0)])
def test_ratios_from_0_to_1_are_supported(ratio, visible):
    masking = {"patch_mask_ratio": ratio, "text_mask_ratio": ratio}
    batch = batch_of(config_of(["joint"] if ratio == 0 else ["mim", "mlm"], masking | {"max_text_mask_ratio": 1.0}))
    assert batch.visible_patch_ids.shape[1] == visible
    assert batch.masked_patch_ids.shape[1] == 16 - visible
    config = config_of(["joint"] if ratio == 0 else ["mim", "mlm"], masking | {"max_text_mask_ratio": 1.0})
    output, terms = losses_of(model_of(config), config, in_fp64(batch))
    assert output.pixel_predictions.shape == (6, 16 - visible, 192)
    assert all(bool(term.isfinite()) for term in terms.values())
    if ratio == 1:
        assert len(batch.token_labels) == sum(len(CAPTIONS[row % 2].split()) for row in range(6))


# --- the model's views ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_view_encodes_only_its_own_tokens():
    config = config_of(ALL, CHEAP)
    model, batch = model_of(config).eval(), in_fp64(batch_of(config))
    output, _ = losses_of(model, config, batch)
    rows, backbone = batch.image_view_ids, model.backbone
    whole = {"pixel_values": batch.pixel_values, "input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    assert set(output.moe) == {"mim", "mlm", "itc_image", "itc_text", "itm"}
    shown = backbone(
        batch.pixel_values[rows],
        batch.input_ids[rows],
        batch.image_view_text_mask,
        visible_patch_ids=batch.visible_patch_ids,
        visible_patch_mask=batch.visible_patch_mask,
    )
    pixels = model.pixel_decoder(shown.stream, batch.visible_patch_ids, batch.masked_patch_ids)
    torch.testing.assert_close(output.pixel_predictions, pixels, **EXACT)
    masked = whole | {"input_ids": batch.masked_input_ids}
    words = backbone(**masked, visible_patch_ids=batch.language_patch_ids)
    states = words.stream.padded()[:, words.num_image_tokens :].flatten(0, 1)[batch.masked_token_ids]
    torch.testing.assert_close(output.token_hidden, model.text_head(states), **EXACT)
    images = model.matching.image_features(backbone(batch.pixel_values).stream.padded()[:, 0])
    texts = model.matching.text_features(
        backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask).stream.padded()[:, 0]
    )
    torch.testing.assert_close(output.matching.image_features, images)  # heads return fp32
    torch.testing.assert_close(output.matching.text_features, texts)
    torch.manual_seed(5)
    image_ids, text_ids = draw_hard_negatives(images @ texts.t() / torch.tensor(0.07))
    own = torch.arange(6)
    pictures, captions = torch.cat([own, image_ids, own]), torch.cat([own, own, text_ids])
    joined = backbone(batch.pixel_values[pictures], batch.input_ids[captions], batch.attention_mask[captions])
    logits = model.matching.classifier(joined.stream.padded()[:, joined.num_image_tokens]).float()
    torch.testing.assert_close(output.matching.logits, logits)


@torch.no_grad()
def test_masked_patches_affect_only_the_language_view_and_masked_words_only_the_image_view():
    config = config_of()
    model, batch = model_of(config).eval(), in_fp64(batch_of(config))
    before, _ = losses_of(model, config, batch)
    patch = int(batch.masked_patch_ids[2, 0])
    pixel_values = batch.pixel_values.clone()
    pixel_values[2, :, 8 * (patch // 4), 8 * (patch % 4)] += 1.0
    after, _ = losses_of(model, config, replace(batch, pixel_values=pixel_values))
    torch.testing.assert_close(after.pixel_predictions, before.pixel_predictions, **EXACT)
    length = batch.input_ids.shape[1]
    changed = ((after.token_hidden - before.token_hidden).abs() > 1e-9).any(dim=1)
    assert torch.equal(changed, batch.masked_token_ids // length == 2)
    place = int(batch.masked_token_ids[0])
    input_ids = batch.input_ids.flatten().index_fill(0, torch.tensor([place]), 7).view_as(batch.input_ids)
    after, _ = losses_of(model, config, replace(batch, input_ids=input_ids))
    torch.testing.assert_close(after.token_hidden, before.token_hidden, **EXACT)
    touched = ((after.pixel_predictions - before.pixel_predictions).abs() > 1e-9).flatten(1).any(dim=1)
    assert touched.tolist() == [row == place // length for row in range(6)]


@torch.no_grad()
def test_incomplete_samples_are_only_in_views_that_can_use_them():
    config = config_of()
    model, batch = model_of(config).eval(), in_fp64(batch_of(config, MIXED))
    assert batch.image_view_ids.tolist() == [0, 1, 2, 3, 4]
    output, terms = losses_of(model, config, batch)
    assert output.pixel_predictions.shape[0] == 5
    routed = {view: layers[0].statistics.tokens.tolist() for view, layers in output.moe.items()}
    words = [len(sample.caption.split()) + 2 for sample in MIXED if sample.caption]
    assert routed["mim"] == [5 * (1 + 4), sum(words[:4])]
    assert routed["mlm"] == [4 * (1 + 16), sum(words)], "an image without a caption has nothing to predict in this view"
    alone, _ = losses_of(model, config, in_fp64(batch_of(config, MIXED[4:5])))
    torch.testing.assert_close(output.pixel_predictions[4:], alone.pixel_predictions, **EXACT)
    alone, _ = losses_of(model, config, in_fp64(batch_of(config, MIXED[5:])))
    torch.testing.assert_close(output.token_hidden[-len(alone.token_hidden) :], alone.token_hidden, **EXACT)
    assert alone.pixel_predictions.shape == (0, 12, 192)
    assert set(terms) == {"mim", "mlm", "load_balancing", "router_z"}


@pytest.mark.parametrize("kind", ["cross", "self"])
@pytest.mark.parametrize("missing", ["image", "caption"])
def test_view_without_samples_has_zero_gradients(missing, kind):
    """Ranks must have the same set of gradients, whatever samples each rank got."""
    config = config_of(pixel_decoder={"kind": kind})
    model = model_of(config)
    samples = [replace(sample, **{missing: None}) for sample in pairs(2)]
    _, terms = losses_of(model, config, in_fp64(batch_of(config, samples)))
    weighted_sum(terms, config.loss.weights).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    idle = model.pixel_decoder if missing == "image" else model.text_head
    assert all(parameter.grad.abs().max() == 0 for parameter in idle.parameters())


@torch.no_grad()
def test_single_modality_sources_supply_one_view():
    config = config_of()
    model = model_of(config).eval()
    images = [replace(sample, caption=None) for sample in pairs()]
    batch = in_fp64(batch_of(config, images, has_captions=False))
    assert batch.input_ids is batch.masked_input_ids is None
    output, terms = losses_of(model, config, batch)
    assert (set(output.moe), output.token_hidden) == ({"mim"}, None)
    assert "mlm" not in terms
    texts = [replace(sample, image=None) for sample in pairs()]
    output, terms = losses_of(model, config, batch_of(config, texts, has_images=False))
    assert (set(output.moe), output.pixel_predictions) == ({"mlm"}, None)
    assert "mim" not in terms
    with pytest.raises(ValueError, match=r"holds neither images nor texts that objectives \(mim, mlm\) could use"):
        model()


# --- one pass over all views against one pass per view ----------------------------------------------------------------


def both_ways(config, batch, double=True):
    """Loss terms, statistics and gradients of one packed pass, and of one pass per view."""
    found = []
    for packed in (True, False):
        model = model_of(config).train()
        model = model if double else model.float()
        model.pack_views = packed
        output, terms = losses_of(model, config, batch)
        weights = config.loss.model_copy(update={"load_balancing_weight": 0.3, "router_z_weight": 0.1})
        weighted_sum(terms, weights.weights).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append((terms, output.moe, gradients))
    return found


ROUTING = {
    "dropless": {"num_experts": 4},
    "one choice": {"num_experts": 4, "top_k": 1},
    "capacity": {"num_experts": 4, "routing": "capacity", "capacity_factor": 0.6, "min_capacity": 1},
    "no modality embedding": {"num_experts": 4, "modality_embedding": False},
}


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("objectives", [["mim", "mlm"], ALL], ids="+".join)
def test_one_pass_equals_one_pass_per_view(objectives, routing):
    config = config_of(objectives, CHEAP, moe=ROUTING[routing])
    samples = MIXED if "itc" not in objectives else pairs()
    packed, apart = both_ways(config, in_fp64(batch_of(config, samples)))
    assert_equal_ways(packed, apart, EXACT if "itc" not in objectives else {"rtol": 1e-5, "atol": 1e-7})
    if routing == "capacity":
        assert all(layers[0].statistics.dropped.sum() > 0 for layers in packed[1].values()), "capacity must drop routes"


def assert_equal_ways(packed, apart, tolerance):
    terms, moe, gradients = packed
    assert terms.keys() == apart[0].keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, apart[0][name], **tolerance)
    assert moe.keys() == apart[1].keys()
    for view, layers in moe.items():
        for ours, theirs in zip(layers, apart[1][view], strict=True):
            torch.testing.assert_close(ours.load_balancing_loss, theirs.load_balancing_loss, **tolerance)
            torch.testing.assert_close(ours.router_z_sum, theirs.router_z_sum, **tolerance)
            for one, other in zip(ours.statistics, theirs.statistics, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        assert (gradient is None) == (apart[2][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(
                gradient, apart[2][name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_one_pass_equals_one_pass_per_view_with_compiled_ops(routing, monkeypatch):
    monkeypatch.setenv("EVE_DS_OPS", "build")
    config = config_of(masking=CHEAP, moe=ROUTING[routing])
    packed, apart = both_ways(config, batch_of(config, MIXED), double=False)
    assert_equal_ways(packed, apart, {"rtol": 1e-4, "atol": 2e-6})  # fp32


def test_router_jitter_requires_one_pass_per_view():
    """Jitter draws one number per token, so the views stay apart; every view is still routed."""
    config = config_of(moe={"num_experts": 4, "router_jitter": 0.2, "second_choice_noise": True})
    model, batch = model_of(config).float().train(), batch_of(config)
    output, terms = losses_of(model, config, batch)
    assert all(bool(term.isfinite()) for term in terms.values())
    assert {view: float(layers[0].statistics.tokens.sum()) for view, layers in output.moe.items()} == {
        "mim": 6 * 5 + float(batch.attention_mask.sum()),
        "mlm": 6 * 17 + float(batch.attention_mask.sum()),
    }
    assert not packs_views(config.model, training=True)
    assert packs_views(config.model, training=False)


def test_official_profile_keeps_padding_in_every_view():
    config = config_of(profile="official", moe=ROUTING["capacity"])
    packed, apart = both_ways(config, in_fp64(batch_of(config, MIXED)))
    assert_equal_ways(packed, apart, EXACT)
    padded = batch_of(config, MIXED).attention_mask
    assert float(packed[1]["mlm"][0].statistics.tokens.sum()) == 6 * 17 + padded.numel()


def test_activation_checkpointing_of_packed_views_does_not_change_results():
    config = config_of(masking=CHEAP)
    batch = in_fp64(batch_of(config))
    found = []
    for checkpointing in (False, True):
        model = model_of(config).train()
        if checkpointing:
            model.backbone.checkpoint_blocks()
        _, terms = losses_of(model, config, batch)
        weighted_sum(terms, config.loss.weights).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())


def test_views_of_different_numbers_of_samples_share_a_pass():
    config = config_of()
    model = model_of(config).eval()
    batch = in_fp64(batch_of(config))
    views = [
        View(batch.pixel_values[:2], batch.input_ids[:2], batch.attention_mask[:2]),
        View(input_ids=batch.input_ids, attention_mask=batch.attention_mask),
        View(batch.pixel_values[:0]),
        View(batch.pixel_values[1:5], visible_patch_ids=torch.arange(3).expand(4, -1)),
    ]
    for packed, view in zip(model.backbone.encode(views), views, strict=True):
        (alone,) = model.backbone.encode([view])
        torch.testing.assert_close(packed.stream.padded(), alone.stream.padded(), **EXACT)
        assert packed.num_image_tokens == alone.num_image_tokens
        assert torch.equal(packed.stream.layout.modality_ids, alone.stream.layout.modality_ids)


# --- feed-forward part of the deep layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["soft_router", "hard_router", "shared"])
def test_deep_layers_have_the_configured_kind(kind):
    config = config_of(deep_ffn=kind)
    model, batch = model_of(config).train(), in_fp64(batch_of(config))
    output, terms = losses_of(model, config, batch)
    weighted_sum(terms, config.loss.weights).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert config.model.expert_layers == ([1, 2] if kind == "soft_router" else [])
    assert [len(layers) for layers in output.moe.values()] == [len(config.model.expert_layers)] * 2
    assert ("load_balancing" in terms) == (kind == "soft_router")
    shared = [name for name in model.state_dict() if ".ffn.network." in name]
    assert len(shared) == (2 * 4 if kind == "shared" else 0)


@torch.no_grad()
def test_hard_router_uses_the_modality_and_shared_network_ignores_it():
    for kind, same in (("hard_router", False), ("shared", True)):
        config = config_of(deep_ffn=kind)
        block, batch = model_of(config).backbone.blocks[1], in_fp64(batch_of(config))
        x = torch.randn(4, 32, dtype=torch.float64).repeat(2, 1)

        # One sample: four image tokens, then the same four as text tokens.
        out = block.ffn(x, Packing.of([Layout.of(torch.ones(1, 8, dtype=torch.bool), num_image_positions=4)]))
        assert torch.allclose(out[:4], out[4:], rtol=0, atol=1e-12) is same
        assert batch is not None


@torch.no_grad()
def test_without_modality_embedding_the_router_sees_the_token_alone():
    without = model_of(config_of(moe={"num_experts": 4, "modality_embedding": False})).backbone.blocks[1].moe
    assert "router.modality_embedding" not in without.state_dict()
    x, ids = torch.randn(9, 32, dtype=torch.float64), torch.arange(9) % 2
    one, other = without(x, ids), without(x, 1 - ids)
    assert torch.equal(one.hidden_states, other.hidden_states)
    assert torch.equal(one.statistics.routes, other.statistics.routes.flip(0))
    embedded = model_of(config_of()).backbone.blocks[1].moe
    assert not torch.equal(embedded(x, ids).hidden_states, embedded(x, 1 - ids).hidden_states)


@pytest.mark.parametrize("objectives", SETS)
def test_emptied_check_batch_of_other_ranks_routes_no_token(objectives):
    config = config_of(objectives, CHEAP if "joint" not in objectives else None)
    model = model_of(config).eval()
    inputs = in_fp64(batch_of(config)).model_inputs()
    layers = [layer for view in model(**emptied(inputs)).moe.values() for layer in view]
    assert layers
    assert sum(float(layer.statistics.tokens.sum()) for layer in layers) == 0


# --- layouts ----------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("padding", ["none", "some", "all"])
@pytest.mark.parametrize("num_image_positions", [0, 2, 5])
@pytest.mark.parametrize("samples", [4, 2, 0])
def test_layout_equals_loop(samples, num_image_positions, padding):
    mask = MASK[:samples]
    present = {"none": mask, "some": mask | (torch.arange(5) % 4 == 1), "all": torch.ones_like(mask)}[padding]
    options = {"none": {}, "some": {"present": present}, "all": {"keep_padding": True}}[padding]
    found = [
        (sample * 5 + position, IMAGE if position < num_image_positions else TEXT)
        for sample in range(samples)
        for position in range(5)
        if present[sample, position]
    ]
    layout = Layout.of(mask, num_image_positions, **options)
    assert layout.token_ids.tolist() == [position for position, _ in found]
    assert layout.modality_ids.tolist() == [modality for _, modality in found]
    places = {position: token for token, (position, _) in enumerate(found)}
    assert layout.places.tolist() == [places.get(position, -1) for position in range(samples * 5)]
    assert layout.by_modality.tolist() == sorted(range(len(found)), key=lambda token: (found[token][1], token))
    assert layout.ends.tolist() == [sum(p < 5 * sample for p in places) for sample in range(samples + 1)]
    assert layout.ends.dtype == torch.int32
    assert layout.sizes == tuple(sum(own == modality for _, own in found) for modality in (IMAGE, TEXT))
    assert layout.is_whole == (len(found) == samples * 5)
    assert layout.longest == (5 if padding == "all" else max(layout.ends.diff().tolist(), default=0))
    real = [bool(mask.flatten()[position]) for position, _ in found]
    assert layout.real is None if padding == "none" else layout.real.tolist() == real
    assert layout.modalities == {0: (TEXT,), 2: (IMAGE, TEXT), 5: (IMAGE,)}[num_image_positions]
    behind = layout.behind(3)
    assert torch.equal(behind.mask, torch.cat([torch.ones(samples, 3, dtype=torch.bool), mask], dim=1))
    if padding == "some":
        options = {"present": torch.cat([behind.mask[:, :3], present], dim=1)}
    again = Layout.of(behind.mask, 3 + num_image_positions, **options)
    for name, value in again._asdict().items():
        if name == "longest" and not samples:
            continue  # without samples, either value is right
        same = torch.equal(getattr(behind, name), value) if isinstance(value, torch.Tensor) else None
        assert same is True or getattr(behind, name) == value, name


def test_packing_equals_loop():
    layouts = [
        Layout.of(MASK, 2),
        Layout.of(MASK[:3], 5),
        Layout.of(MASK[2:], 0),
        Layout.of(MASK, 3, keep_padding=True),
    ]
    packing = Packing.of(layouts)
    modalities = [modality for layout in layouts for modality in layout.modality_ids.tolist()]
    assert packing.modality_ids.tolist() == modalities
    assert packing.order.tolist() == sorted(range(len(modalities)), key=lambda token: (modalities[token], token))
    assert torch.equal(packing.order[packing.places], torch.arange(len(modalities)))
    assert packing.sizes == {IMAGE: modalities.count(IMAGE), TEXT: modalities.count(TEXT)}
    samples = [(view, sample) for view, layout in enumerate(layouts) for sample in layout.sample_ids().tolist()]
    first = (0, 4, 7, 9)
    assert packing.sample_ids.tolist() == [first[view] + sample for view, sample in samples]
    assert packing.real.tolist() == [True] * sum(packing.view_sizes[:3]) + MASK.flatten().tolist()
    assert Packing.of(layouts[:3]).real is None
    alone = Packing.of([layouts[1]])
    assert alone.order is alone.places is None
    assert alone.sizes == {IMAGE: 5}


@pytest.mark.parametrize("objectives", SETS, ids="+".join)
def test_batch_contains_the_layouts_of_its_masks(objectives):
    config = config_of(objectives, CHEAP if "joint" not in objectives else None)
    model, batch = model_of(config).eval(), in_fp64(batch_of(config, pairs() if "itc" in objectives else MIXED))
    assert set(batch.layouts) == set(model(**batch.model_inputs()).moe) - {"itm"}
    torch.manual_seed(5)
    carried = model(**batch.model_inputs()).tensors()
    torch.manual_seed(5)
    for name, tensor in model(**replace(batch, layouts=None).model_inputs()).tensors().items():
        assert torch.equal(tensor, carried[name]), name


def test_negative_captions_get_the_length_of_the_longest_caption(monkeypatch):
    config = config_of(ALL)
    model, batch = model_of(config).eval(), in_fp64(batch_of(config))
    lengths = batch.attention_mask.sum(dim=1)
    output, _ = losses_of(model, config, batch)
    layout = layout_of_negatives(
        Pairs.of(
            {name: getattr(batch, name) for name in ("pixel_values", "input_ids", "attention_mask")}
        ).with_negatives(torch.arange(6).roll(1), torch.arange(6).roll(2)),
        batch.layouts["itc_text"],
        17,
        keep_padding=False,
    )
    assert layout.sizes == (18 * 17, int(2 * lengths.sum() + 6 * lengths.max()))
    assert layout.num_tokens == sum(layout.sizes) == int(layout.ends[-1])
    monkeypatch.setattr(model.backbone, "keep_padding", True)  # this view keeps all padding; other layouts are given
    padded, _ = losses_of(model, config, batch)
    torch.testing.assert_close(output.matching.logits, padded.matching.logits, **EXACT)


# --- no view synchronizes with the host -------------------------------------------------------------------------------

MODELS = {
    "self-attention decoder": {"pixel_decoder": {"kind": "self"}},
    "capacity": {"moe": {"num_experts": 4, "routing": "capacity"}},
    "official": {"profile": "official"},
    "dropped paths": {"drop_path_rate": 0.3, "text_dropout": 0.1},
    "noise of the router": {"moe": {"num_experts": 4, "router_jitter": 0.1, "second_choice_noise": True}},
    "hard router": {"deep_ffn": "hard_router"},
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Select the code paths of a GPU."""
    monkeypatch.setattr(build, "_wanted_and_loaded", lambda device_type: True)
    monkeypatch.setattr(feed_forward, "_has_grouped_products", lambda *tensors: True)
    monkeypatch.setattr(attention, "_takes_packed", lambda packed, head_size, layout: not layout.is_whole)


def step_without_data(config, batch):
    """Model and losses after a bf16 step on fake tensors, which have no values: reading a value raises an error."""
    with torch.device("meta"):
        model = EVE(config.model).to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu").train()
        faked = batch._with_each(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        output = model(**faked.model_inputs())
        terms = pretraining_losses(output, faked.targets(), COUNTS, config.model)
        weighted_sum(terms, config.loss.weights).backward()
    return model, terms


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("objectives", SETS, ids="+".join)
def test_forward_and_backward_never_synchronize_with_the_host(objectives):
    config = config_of(objectives, None if "joint" in objectives else CHEAP)
    model, terms = step_without_data(config, batch_of(config, pairs() if "itc" in objectives else MIXED))
    assert {"load_balancing", "router_z"} < terms.keys()
    blocks = model.backbone.blocks.parameters()
    assert all(parameter.grad is not None for parameter in blocks)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_no_kind_of_model_synchronizes_with_the_host(settings):
    config = config_of(ALL if settings != MODELS["official"] else ["mim", "mlm"], **settings)
    step_without_data(config, batch_of(config))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_missing_layouts_synchronize_with_the_host():
    config = config_of()
    with pytest.raises(Exception, match="_local_scalar_dense"):
        step_without_data(config, replace(batch_of(config), layouts=None))


# --- compiled blocks --------------------------------------------------------------------------------------------------

NOISE = {"drop_path_rate": 0.3, "moe": {"num_experts": 4, "router_jitter": 0.1, "second_choice_noise": True}}
CAPACITY = {"moe": {"num_experts": 4, "routing": "capacity"}}


def gradients_of(model, config, batch):
    model.zero_grad()
    _, terms = losses_of(model, config, batch)
    loss = weighted_sum(terms, config.loss.weights)
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("moe_cls", "settings", "graphs", "backend"),
    [
        (MoE, NOISE, 3, "aot_eager"),
        (partial(DeepSpeedMoE, ep_size=1), CAPACITY, 2, "aot_eager"),
        pytest.param(
            *(MoE, {"drop_path_rate": 0.3}, 3, "inductor"),
            marks=pytest.mark.skipif(
                shutil.which("g++") is None or "EVE_DS_SLOW_TESTS" not in os.environ,
                reason="minutes of C++ compilation: set EVE_DS_SLOW_TESTS, and have g++",
            ),
        ),
    ],
    ids=["noise", "DeepSpeed, capacity", "inductor"],
)
def test_compiled_blocks_share_graphs_and_give_the_same_results(moe_cls, settings, graphs, backend, monkeypatch):
    monkeypatch.setenv("EVE_DS_OPS", "build")
    torch.compiler.reset()
    config = config_of(num_hidden_layers=5, moe_layers=[3, 4], **settings)
    torch.manual_seed(0)
    model = EVE(config.model, moe_cls).train()
    batches = [batch_of(config, pairs(count)) for count in (4, 6)]
    expected = [gradients_of(model, config, batch) for batch in batches]
    counters.clear()
    model.backbone.compile_blocks(backend)
    rounding = {"rtol": 0, "atol": 0} if backend == "aot_eager" else {"rtol": 2e-4, "atol": 1e-5}
    for batch, gradients in zip(batches, expected, strict=True):
        torch.testing.assert_close(gradients_of(model, config, batch), gradients, **rounding)
    model.eval()(**batches[0].model_inputs())
    # One graph per kind of block, and one for the first layer if only that one drops no path. Evaluation runs eagerly.
    assert counters["stats"]["unique_graphs"] == graphs


def test_blocks_with_distributed_experts_are_not_compiled():
    model = EVE(config_of().model, partial(DeepSpeedMoE, ep_size=2, ep_rank=0))
    model.backbone.compile_blocks("eager")
    assert [block.compiled is not None for block in model.backbone.blocks] == [True, False, False]
