"""Held-out losses equal a loop over samples in plain torch, with the right and with another image or caption."""

import pytest
import torch
from tiny import tiny_config

from eve_ds.config import ConfigError
from eve_ds.data.held_out import held_out_pairs
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.evaluation.held_out import evaluate_held_out, load_held_out
from eve_ds.model.eve import EVE
from eve_ds.topology import Topology


def config_of(*overrides):
    validation = "data.validation={sources: [{kind: scenes, seed: 7}], num_samples: 10}"
    return tiny_config(validation, *overrides)


def by_hand(model, batch):
    """Mean losses over every masked word and patch, sample by sample; `shift` -1 selects the wrong partner."""
    found = {name: {} for name in ("word_loss", "word_accuracy", "pixel_loss")}
    count, length = batch.input_ids.shape
    for side, shift in (("right", 0), ("wrong", -1)):
        losses, hits, errors = [], [], []
        for row in range(count):
            other = (row + shift) % count
            places = [int(p) - row * length for p in batch.masked_token_ids if p // length == row]
            words = model.predict(
                pixel_values=batch.normalized_pixels[other : other + 1],
                input_ids=batch.masked_input_ids[row : row + 1],
                attention_mask=batch.attention_mask[row : row + 1],
                masked_token_ids=torch.tensor(places),
            )
            chances = words.token_logits().double().log_softmax(dim=1)
            labels = batch.input_ids[row, places]
            losses += [-float(chances[i, label]) for i, label in enumerate(labels)]
            hits += (chances.argmax(dim=1) == labels).double().tolist()
            pixels = model.predict(
                pixel_values=batch.normalized_pixels[row : row + 1],
                visible_patch_ids=batch.visible_patch_ids[row : row + 1],
                masked_patch_ids=batch.masked_patch_ids[row : row + 1],
                input_ids=batch.input_ids[other : other + 1],
                attention_mask=batch.attention_mask[other : other + 1],
            )
            image, side_of = batch.normalized_pixels[row], 8
            for place, patch in enumerate(batch.masked_patch_ids[row].tolist()):
                top, left = side_of * (patch // 8), side_of * (patch % 8)
                target = image[:, top : top + side_of, left : left + side_of].permute(1, 2, 0).flatten()
                errors.append(float(((pixels.pixel_predictions[0, place] - target) ** 2).mean()))
        for name, values in (("word_loss", losses), ("word_accuracy", hits), ("pixel_loss", errors)):
            found[name][side] = sum(values) / len(values)
    return found


@torch.no_grad()
def test_losses_equal_a_loop_over_samples():
    config = config_of()
    torch.manual_seed(0)
    model = EVE(config.model).train()
    held_out = load_held_out(config, load_tokenizer("scenes"), Topology())
    result = evaluate_held_out(model, config.model, held_out)
    assert model.training, "evaluation must restore the training mode"
    model.eval()
    (batch,) = held_out.batches
    assert len(batch) == 10
    expected = by_hand(model, batch)
    assert result.keys() == expected.keys()
    for name, sides in expected.items():
        assert result[name] == pytest.approx(sides, rel=1e-5), name


@pytest.mark.parametrize(
    ("objectives", "names"),
    [
        ("[mim]", {"pixel_loss"}),
        ("[mlm]", {"word_loss", "word_accuracy"}),
        ("[mlm, itc, itm]", {"word_loss", "word_accuracy"}),
        ("[joint]", {"pixel_loss", "word_loss", "word_accuracy"}),
    ],
)
def test_metrics_depend_on_the_heads_of_the_model(objectives, names):
    config = config_of(f"model.objectives={objectives}")
    held_out = load_held_out(config, load_tokenizer("scenes"), Topology())
    result = evaluate_held_out(EVE(config.model), config.model, held_out)
    assert result.keys() == names
    assert all(sides.keys() == {"right", "wrong"} for sides in result.values())


def test_a_single_held_out_pair_is_refused():
    config = config_of("data.validation.num_samples=2")
    with pytest.raises(ConfigError, match="leaves a rank with 1 usable pairs, at least 2 are needed"):
        load_held_out(config, load_tokenizer("scenes"), Topology(rank=1, world_size=2))
    assert len(held_out_pairs(config, 0, 1)) == 2
