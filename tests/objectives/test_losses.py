"""Loss terms equal loops over samples, patches and tokens in fp64."""

import math

import pytest
import torch

from eve_ds.config import LossConfig, ModelConfig
from eve_ds.model.eve import EVEOutput
from eve_ds.model.moe import MoEOutput
from eve_ds.model.vocabulary import Vocabulary
from eve_ds.model.with_losses import weighted_sum
from eve_ds.objectives.pretraining import pretraining_losses

BATCH, MASKED, PATCH, SIDE, VOCAB, WIDTH, TOKENS = 3, 4, 4, 16, 11, 6, 5


def made():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    moe = tuple(MoEOutput(None, torch.tensor(1.0 + i / 4), torch.tensor(30.0 + i), None) for i in range(2))
    pixels, hidden = draw(BATCH, MASKED, 3 * PATCH**2), draw(TOKENS, WIDTH)
    output = EVEOutput(Vocabulary(draw(VOCAB, WIDTH), draw(VOCAB)), {"joint": moe}, pixels, hidden)
    inputs = {
        "pixel_values": draw(BATCH, 3, SIDE, SIDE),
        "image_mask": torch.tensor([True, False, True]),
        "masked_patch_ids": torch.tensor([[0, 5, 6, 15], [1, 2, 3, 4], [3, 7, 8, 12]]),
        "token_labels": torch.tensor([0, 3, 10, 7, 3]),
    }
    return output, inputs


def losses_of(output, targets, patches, words, tokens, normalize_pixels=True):
    config = ModelConfig(image_size=SIDE, patch_size=PATCH, pixel_target="normalized" if normalize_pixels else "raw")
    counts = {"masked_patches": patches, "masked_tokens": words, "tokens": tokens}
    return pretraining_losses(output, targets, counts, config)


def pixel_sum_by_loops(output, inputs, normalize_pixels=True):
    total = 0.0
    for row in range(BATCH):
        if not inputs["image_mask"][row]:
            continue
        for place, patch in enumerate(inputs["masked_patch_ids"][row].tolist()):
            top, left = PATCH * (patch // (SIDE // PATCH)), PATCH * (patch % (SIDE // PATCH))
            values = [
                float(inputs["pixel_values"][row, channel, top + y, left + x])
                for y in range(PATCH)
                for x in range(PATCH)
                for channel in range(3)
            ]
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
            targets = [(value - mean) / math.sqrt(variance + 1e-6) for value in values]
            targets = targets if normalize_pixels else values
            guesses = output.pixel_predictions[row, place].tolist()
            total += sum((guess - target) ** 2 for guess, target in zip(guesses, targets, strict=True)) / len(values)
    return total


def text_sum_by_loops(output, inputs):
    total = 0.0
    for hidden, label in zip(output.token_hidden.tolist(), inputs["token_labels"].tolist(), strict=True):
        logits = [
            sum(h * w for h, w in zip(hidden, weights, strict=True)) + bias
            for weights, bias in zip(output.vocabulary.weight.tolist(), output.vocabulary.bias.tolist(), strict=True)
        ]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
    return total


@pytest.mark.parametrize("normalize_pixels", [True, False])
def test_loss_terms_equal_loops(normalize_pixels):
    output, inputs = made()
    terms = losses_of(output, inputs, 8, 5, 40, normalize_pixels)
    assert set(terms) == {"mim", "mlm", "load_balancing", "router_z"}
    assert float(terms["mim"]) == pytest.approx(pixel_sum_by_loops(output, inputs, normalize_pixels) / 8, rel=1e-6)
    assert float(terms["mlm"]) == pytest.approx(text_sum_by_loops(output, inputs) / 5, rel=1e-6)
    assert float(terms["load_balancing"]) == pytest.approx((1.0 + 1.25) / 2)
    assert float(terms["router_z"]) == pytest.approx((30 + 31) / 2 / 40)
    assert all(term.dtype == torch.float32 and term.ndim == 0 for term in terms.values())


def test_denominators_below_one_are_not_clamped():
    """Denominators are small if many ranks and micro-steps share few words: 3 in 64 micro-steps are 3 / 64 each."""
    output, inputs = made()
    terms = losses_of(output, inputs, 1 / 64, 3 / 64, 1 / 4)
    assert float(terms["mim"]) == pytest.approx(64 * pixel_sum_by_loops(output, inputs), rel=1e-6)
    assert float(terms["mlm"]) == pytest.approx(64 / 3 * text_sum_by_loops(output, inputs), rel=1e-6)
    assert float(terms["router_z"]) == pytest.approx(4 * (30 + 31) / 2)


def test_without_image_mask_every_sample_has_an_image():
    output, inputs = made()
    everyone = losses_of(output, inputs | {"image_mask": None}, 12, 5, 40)
    all_true = losses_of(output, inputs | {"image_mask": torch.ones(3, dtype=torch.bool)}, 12, 5, 40)
    assert torch.equal(everyone["mim"], all_true["mim"])


def test_a_missing_modality_has_no_term():
    output, inputs = made()
    image = output._replace(token_hidden=None)
    assert "mlm" not in losses_of(image, inputs, 8, 5, 40)
    text = output._replace(pixel_predictions=None)
    terms = losses_of(text, inputs | {"pixel_values": None, "masked_patch_ids": None}, 8, 5, 40)
    assert "mim" not in terms
    plain = losses_of(output._replace(moe={}), inputs, 8, 5, 40)
    assert set(plain) == {"mim", "mlm"}


def test_loss_without_predictions_is_zero_not_nan():
    output, inputs = made()
    output = output._replace(token_hidden=torch.zeros(0, WIDTH, requires_grad=True))
    nothing = inputs | {
        "token_labels": torch.empty(0, dtype=torch.int64),
        "image_mask": torch.zeros(3, dtype=torch.bool),
    }
    terms = losses_of(output, nothing, 0, 0, 0)
    assert terms["mlm"].item() == 0
    assert terms["mim"].item() == 0
    terms["mlm"].backward()  # every rank runs the backward of the head


def test_mean_loss_over_a_split_equals_the_loss_of_the_whole_batch():
    output, inputs = made()
    whole = losses_of(output, inputs, 8, 5, 40)
    parts = []
    for rows, tokens in ((slice(0, 1), slice(0, 4)), (slice(1, 3), slice(4, 5))):
        share = output._replace(
            pixel_predictions=output.pixel_predictions[rows], token_hidden=output.token_hidden[tokens], moe={}
        )
        arguments = {
            name: value[tokens if name == "token_labels" else rows]
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        # Two micro-steps are averaged, so each divides by half of the totals.
        parts.append(losses_of(share, inputs | arguments, 8 / 2, 5 / 2, 40 / 2))
    for name in ("mim", "mlm"):
        assert float(sum(part[name] for part in parts) / 2) == pytest.approx(float(whole[name]), rel=1e-6)


def test_weighted_sum_leaves_out_terms_with_weight_zero():
    terms = {"mim": torch.tensor(2.0), "mlm": torch.tensor(3.0), "router_z": torch.tensor(math.inf)}
    weights = LossConfig(mim_weight=0.5, mlm_weight=2.0, router_z_weight=0.0)
    assert float(weighted_sum(terms, weights.weights)) == 7.0
    assert float(weighted_sum(terms, LossConfig(router_z_weight=0.1).weights)) == math.inf
