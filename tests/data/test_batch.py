"""Batches of complete samples, and of samples that lack an image or a caption."""

import inspect
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from eve_ds.config import ConfigError, parse_config
from eve_ds.data.batch import Batch, Sample
from eve_ds.data.collate import Collator
from eve_ds.data.tokenizer import load_tokenizer, train_tokenizer
from eve_ds.model.eve import EVE
from eve_ds.objectives.registry import objectives_of

CAPTIONS = ("a small red circle top left", "a large blue cross bottom right and a small green square top left")


def config(**masking):
    """Return a configuration with one view; test_views.py tests the other objectives."""
    model = {"image_size": 32, "patch_size": 8, "vocab_size": 256, "objectives": ["joint"]}
    return parse_config({"model": model, "masking": masking})


def collate(samples, tokenizer="scenes", has_images=True, has_captions=True, **masking):
    collator = Collator(
        config(**masking),
        load_tokenizer(tokenizer),
        objectives_of(config(**masking).model),
        has_images=has_images,
        has_captions=has_captions,
    )
    return collator(samples)


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def pairs():
    return [Sample(f"k{number}", 0, image(number), caption) for number, caption in enumerate(CAPTIONS)]


def test_pairs_have_every_field():
    batch = collate(pairs())
    tokens = [load_tokenizer("scenes")(caption)["input_ids"] for caption in CAPTIONS]
    length = max(map(len, tokens))
    assert batch.keys == ["k0", "k1"]
    assert len(batch) == 2
    assert batch.pixel_values.shape == (2, 3, 32, 32)
    assert batch.pixel_values.dtype == torch.uint8
    assert batch.image_mask is None
    assert batch.visible_patch_ids.shape == (2, 4)
    assert batch.masked_patch_ids.shape == (2, 12)
    assert batch.visible_patch_ids.dtype == batch.masked_patch_ids.dtype == torch.int64
    assert batch.input_ids.shape == batch.attention_mask.shape == (2, length)
    assert batch.input_ids.dtype == batch.masked_token_ids.dtype == batch.token_labels.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.bool
    assert batch.attention_mask.sum(1).tolist() == list(map(len, tokens))


def test_labels_restore_the_captions():
    tokenizer = load_tokenizer("scenes")
    batch = collate(pairs())
    masked = batch.masked_input_ids.flatten()
    assert (masked[batch.masked_token_ids] == tokenizer.mask_token_id).all()
    restored = masked.scatter(0, batch.masked_token_ids, batch.token_labels).view_as(batch.input_ids)
    assert torch.equal(restored, batch.input_ids)
    for row, caption in enumerate(CAPTIONS):
        assert restored[row][batch.attention_mask[row]].tolist() == tokenizer(caption)["input_ids"]
    assert (restored[~batch.attention_mask] == tokenizer.pad_token_id).all()
    assert (batch.masked_token_ids.diff() > 0).all()


def test_first_last_and_padding_tokens_are_never_masked():
    tokenizer = load_tokenizer("scenes")
    batch = collate([Sample(str(number), 0, image(), CAPTIONS[number % 2]) for number in range(200)])
    special = torch.tensor(tokenizer.all_special_ids)
    assert not torch.isin(batch.token_labels, special).any()
    lengths = batch.attention_mask.sum(1)
    masked = (batch.masked_input_ids == tokenizer.mask_token_id).sum(1)
    assert masked.tolist() == [round(0.5 * (length - 2)) for length in lengths.tolist()]


def test_pixels_equal_the_image():
    expected = torch.from_numpy(image(1)).permute(2, 0, 1).float() / 127.5 - 1
    batch = collate(pairs())
    torch.testing.assert_close(batch.normalized_pixels[1], expected, rtol=0, atol=1e-6)
    assert torch.equal(batch.pixel_values[1], torch.from_numpy(image(1)).permute(2, 0, 1))


def test_normalizing_the_batch_equals_normalizing_each_image_bit_for_bit():
    """All 256 byte values, with and without a missing image; resumed runs depend on equal bits."""
    every = np.arange(256, dtype=np.uint8).repeat(12).reshape(32, 32, 3)
    samples = [Sample("a", 0, every, CAPTIONS[0]), Sample("b", 0, None, CAPTIONS[1]), *pairs()]
    before = [torch.from_numpy(s.image).permute(2, 0, 1).contiguous().float() for s in samples if s.image is not None]
    before = [pixels.mul_(2 / 255).sub_(1) for pixels in before]
    assert torch.equal(collate([samples[0], *samples[2:]]).normalized_pixels, torch.stack(before))
    with_gap = torch.stack([before[0], torch.zeros(3, 32, 32), *before[1:]])
    assert torch.equal(collate(samples).normalized_pixels, with_gap)


def test_pixels_are_sent_as_bytes_and_normalized_once_for_inputs_and_targets():
    batch = collate(pairs())
    assert batch.model_inputs()["pixel_values"] is batch.targets()["pixel_values"] is batch.normalized_pixels
    copied = pickle.loads(pickle.dumps(collate(pairs())))
    assert copied.pixel_values.dtype == torch.uint8
    assert torch.equal(copied.normalized_pixels, batch.normalized_pixels)
    image_bytes = 3 * 32 * 32
    assert batch.pixel_values.nbytes == 2 * image_bytes
    assert not any(tensor.is_floating_point() for tensor in batch.tensors())


def test_tensors_returns_every_tensor_of_the_batch():
    batch = collate(pairs())
    assert batch.normalized_pixels is not None
    own = [value for name, value in vars(batch).items() if name != "normalized_pixels"]
    own += [value for layout in batch.layouts.values() for value in layout]
    expected = {id(value) for value in own if isinstance(value, torch.Tensor)}
    assert {id(tensor) for tensor in batch.tensors()} == expected
    assert len(batch.tensors()) == len(expected) == 8 + 6


def test_floating_point_pixels_are_not_normalized_again():
    batch = collate([*pairs(), Sample("a", 0, None, CAPTIONS[0])])
    given = torch.full((3, 3, 32, 32), 7.0, dtype=torch.float64)
    pixels = replace(batch, pixel_values=given).normalized_pixels
    assert pixels.dtype == torch.float64
    assert pixels.flatten(1).unique(dim=1).flatten().tolist() == [7, 7, 0]
    assert (given == 7).all()


def test_masks_do_not_depend_on_the_rest_of_the_batch():
    both, alone = collate(pairs()), collate(pairs()[1:])
    assert (both.masked_patch_ids[1] == alone.masked_patch_ids[0]).all()
    length = alone.input_ids.shape[1]
    own = both.masked_token_ids[both.masked_token_ids >= length] - length
    assert (own == alone.masked_token_ids).all()


def test_masks_depend_on_the_epoch():
    first, second = (collate([Sample("k", epoch, image(), CAPTIONS[1])]) for epoch in (0, 1))
    assert (first.masked_patch_ids != second.masked_patch_ids).any()
    assert first.masked_token_ids.tolist() != second.masked_token_ids.tolist()


def test_missing_image_has_zero_pixels_and_is_marked_in_the_mask():
    batch = collate([Sample("a", 0, None, CAPTIONS[0]), *pairs()])
    assert batch.image_mask.tolist() == [False, True, True]
    assert batch.normalized_pixels[0].abs().max() == 0
    torch.testing.assert_close(batch.normalized_pixels[1:], collate(pairs()).normalized_pixels)
    assert batch.visible_patch_ids.shape == (3, 4)


def test_caption_without_image_keeps_at_least_one_word():
    batch = collate([Sample("a", 0, None, CAPTIONS[0]), *pairs()], text_mask_ratio=0.99)
    words = batch.attention_mask.sum(1) - 2
    hidden = torch.bincount(batch.masked_token_ids // batch.input_ids.shape[1])
    assert hidden.tolist() == [words[0] - 1, words[1], words[2]]


def test_missing_caption_becomes_an_empty_row():
    batch = collate([Sample("a", 0, image(), None), *pairs()])
    assert not batch.attention_mask[0].any()
    assert (batch.masked_token_ids >= batch.input_ids.shape[1]).all()


def test_batch_without_any_caption_or_without_any_image_keeps_its_fields():
    batch = collate([Sample("a", 0, image(), None)])
    assert batch.input_ids.shape == (1, 1)
    assert not batch.attention_mask.any()
    assert len(batch.masked_token_ids) == len(batch.token_labels) == 0
    batch = collate([Sample("a", 0, None, CAPTIONS[0])])
    assert batch.image_mask.tolist() == [False]
    assert batch.pixel_values.shape == (1, 3, 32, 32)


def test_fields_are_none_if_no_source_has_the_modality():
    batch = collate([Sample("a", 0, image(), None)], has_captions=False)
    assert batch.input_ids is batch.attention_mask is batch.masked_token_ids is batch.token_labels is None
    batch = collate([Sample("a", 0, None, CAPTIONS[0])], has_images=False)
    assert batch.pixel_values is batch.image_mask is batch.visible_patch_ids is batch.masked_patch_ids is None


def test_long_captions_are_truncated_before_their_last_token():
    tokenizer = load_tokenizer("scenes")
    batch = collate([Sample("a", 0, image(), " and ".join(CAPTIONS * 20))])
    assert batch.input_ids.shape == (1, 40)
    assert batch.input_ids[0, -1] == tokenizer.sep_token_id
    assert batch.input_ids[0, 0] == tokenizer.cls_token_id


def test_padding_and_truncation_of_the_tokenizer_are_ignored(tmp_path):
    tokenizer = load_tokenizer("scenes")
    tokenizer.backend_tokenizer.enable_padding(length=33, pad_id=0)
    tokenizer.backend_tokenizer.enable_truncation(4)
    collator = Collator(config(), tokenizer, objectives_of(config().model), has_images=True, has_captions=True)
    fresh = collate(pairs())
    assert collator(pairs()).input_ids.tolist() == fresh.input_ids.tolist()


def test_random_and_kept_tokens_follow_the_configuration():
    tokenizer = load_tokenizer("scenes")
    batch = collate(pairs() * 50, random_token_share=1.0)
    now = batch.masked_input_ids.flatten()[batch.masked_token_ids]
    assert not set(now.tolist()) & set(tokenizer.all_special_ids)
    assert now.max() < len(tokenizer)
    batch = collate(pairs(), keep_token_share=1.0)
    assert torch.equal(batch.masked_input_ids, batch.input_ids)


def test_mask_ratios_are_uniform_between_the_limits():
    caption = " ".join(CAPTIONS[1].split() * 3)
    samples = [Sample(f"k{number}", 0, None, caption) for number in range(600)]
    batch = collate(samples, has_images=False, text_mask_ratio=0.4, max_text_mask_ratio=0.8)
    rows = batch.masked_token_ids // batch.input_ids.shape[1]
    ratios = torch.bincount(rows, minlength=600) / (batch.attention_mask.sum(1) - 2)
    assert ratios.min() >= 0.38
    assert ratios.max() <= 0.82
    # 600 draws from an interval of width 0.4: the standard error of the mean is 0.005.
    assert ratios.mean().item() == pytest.approx(0.6, abs=0.02)


def test_text_to_image_samples_keep_the_caption_and_hide_more_of_the_image():
    samples = [Sample(f"k{number}", 0, image(), CAPTIONS[number % 2]) for number in range(400)]
    samples += [Sample("image alone", 0, image(), None), Sample("text alone", 0, None, CAPTIONS[0])]
    batch = collate(samples, patch_mask_ratio=0.5, text_to_image_share=0.3, text_to_image_mask_ratio=0.8)
    assert batch.visible_patch_mask.shape == batch.visible_patch_ids.shape == (402, 8)
    rows = batch.masked_token_ids // batch.input_ids.shape[1]
    whole = torch.bincount(rows, minlength=402) == 0
    fewer = ~batch.visible_patch_mask.all(dim=1)
    assert (whole[:401] == fewer[:401]).logical_or(torch.arange(401) == 400).all()
    assert not fewer[400]
    assert not fewer[401]
    # 400 draws: the standard error of the share is 0.023.
    assert fewer[:400].float().mean().item() == pytest.approx(0.3, abs=0.09)
    counts = batch.visible_patch_mask[fewer].sum(1)
    assert set(counts.tolist()) == {0, 1, 2, 3}  # round(0.2 * 16) = 3
    assert collate(samples[:2]).visible_patch_mask is None


def test_shares_of_random_and_kept_tokens_above_one_are_refused():
    with pytest.raises(ConfigError, match=r"random_token_share \(0.6\) and keep_token_share \(0.5\) must not exceed 1"):
        config(random_token_share=0.6, keep_token_share=0.5)


def test_tokenizer_larger_than_the_vocabulary_of_the_model_is_refused():
    tokenizer = train_tokenizer([chr(0x4E00 + number) for number in range(600)], 700)
    size = len(tokenizer)
    with pytest.raises(ConfigError, match=rf"vocabulary of {size} tokens, larger than model.vocab_size \(256\); raise"):
        Collator(config(), tokenizer, objectives_of(config().model), has_images=True, has_captions=True)


def test_model_inputs_equal_the_parameters_of_the_model():
    inputs = collate(pairs()).model_inputs()
    assert set(inputs) == set(inspect.signature(EVE.forward).parameters) - {"self", "more"}


def test_to_moves_every_tensor():
    batch = collate(pairs())
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert moved.keys == batch.keys
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8
    assert all(tensor.device.type == "meta" for tensor in tensors)
