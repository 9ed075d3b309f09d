"""Denominators of the losses, against counts of a batch."""

import numpy as np
import pytest
from tiny import tiny_tree

from eve_ds.config import parse_config
from eve_ds.data.batch import Sample
from eve_ds.data.collate import Collator
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model.eve import EVE
from eve_ds.objectives.pretraining import count, encoder_tokens
from eve_ds.objectives.registry import objectives_of

MASKS = {"text_to_image_share": 0.5, "text_to_image_mask_ratio": 0.9}
CHEAP = MASKS | {"image_view_share": 0.5, "image_view_word_share": 0.5, "language_view_patch_share": 0.25}


@pytest.mark.parametrize("masking", [MASKS, CHEAP], ids=["whole", "cheap"])
@pytest.mark.parametrize("objectives", [["joint"], ["mim"], ["mlm"], ["mim", "mlm"]], ids="+".join)
def test_denominators_equal_the_encoded_tokens_and_predictions(objectives, masking):
    settings = parse_config({"model": tiny_tree(image_size=32, objectives=objectives), "masking": masking})
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    samples = [Sample(f"k{number}", 0, image, "a small red circle top left") for number in range(20)]
    samples += [Sample("image", 0, image, None), Sample("text", 0, None, "a large blue square")]
    batch = Collator(
        settings, load_tokenizer("scenes"), objectives_of(settings.model), has_images=True, has_captions=True
    )(samples)
    output = EVE(settings.model)(**batch.model_inputs())
    counts = count(batch, settings.model)
    routed = {view: float(layers[0].statistics.tokens.sum()) for view, layers in output.moe.items()}
    assert encoder_tokens(batch, settings.model) == routed
    assert counts["tokens"] == sum(routed.values())
    if "mlm" not in objectives:
        images = 21 if batch.image_view_ids is None or "joint" in objectives else len(batch.image_view_ids)
        assert counts["masked_patches"] == images * 12
        assert images == 21 or masking is CHEAP
    if "mim" not in objectives:
        assert counts["masked_tokens"] == len(batch.token_labels)


@pytest.mark.parametrize(("objectives", "passes"), [(["itc"], 1), (["itc", "itm"], 4), (["mlm", "itc", "itm"], 5)])
def test_denominators_of_matching_include_every_pass(objectives, passes):
    settings = parse_config({"model": tiny_tree(image_size=32, objectives=objectives)})
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    samples = [Sample(f"k{number}", 0, image, "a small red circle top left") for number in range(3)]
    batch = Collator(
        settings, load_tokenizer("scenes"), objectives_of(settings.model), has_images=True, has_captions=True
    )(samples)
    output = EVE(settings.model)(**batch.model_inputs())
    counts = count(batch, settings.model)
    routed = sum(float(layers[0].statistics.tokens.sum()) for layers in output.moe.values())
    assert counts["tokens"] == routed == passes * 3 * (1 + 16 + 8)
    assert counts.keys() == {"tokens", *(["masked_tokens"] if "mlm" in objectives else [])}
    assert counts.get("masked_tokens", 0) == (
        9 if "mlm" in objectives else 0
    )  # half of six words in each of three captions
