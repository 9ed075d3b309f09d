"""Masks: exact counts, uniform choice, and dependence on (seed, epoch, key) alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eve_ds.data.masking import mask_patches, mask_tokens, sample_rng

MASK = 4


def masked(length, ratio, key="k", special=(0, -1), **options):
    token_ids = np.arange(100, 100 + length)
    maskable = np.ones(length, dtype=bool)
    maskable[list(special)] = False
    return token_ids, mask_tokens(token_ids, maskable, ratio, sample_rng(0, 0, key), mask_token_id=MASK, **options)


def test_rng_is_a_function_of_seed_epoch_and_key():
    draws = {
        (seed, epoch, key): tuple(sample_rng(seed, epoch, key).integers(2**62, size=2))
        for seed in (0, 1, -1)
        for epoch in (0, 1)
        for key in ("a", "b", "día", "\udc80")
    }
    assert len(set(draws.values())) == len(draws)
    assert tuple(sample_rng(0, 1, "a").integers(2**62, size=2)) == draws[0, 1, "a"]


def test_rng_distinguishes_seed_epoch_and_key():
    assert sample_rng(1, 11, "a").random() != sample_rng(11, 1, "a").random()
    assert sample_rng(1, 1, "1/a").random() != sample_rng(1, 11, "/a").random()


def test_rng_of_neighboring_keys_is_uniform_and_uncorrelated():
    """Mean and lag-one correlation of the first draws of 20,000 keys lie within four standard errors."""
    draws = np.array([sample_rng(0, 0, f"{number:08d}").random() for number in range(20_000)])
    error = 1 / np.sqrt(len(draws))
    assert abs(draws.mean() - 0.5) < 4 * error * np.sqrt(1 / 12)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 * error


def test_masks_equal_recorded_ones():
    """If these masks change, so do all stored loss traces and the masks of resumed runs."""
    visible, _ = mask_patches(16, 0.75, sample_rng(3, 1, "000000007"))
    assert visible.tolist() == [0, 9, 10, 15]
    assert masked(10, 0.5, key="000000007")[1].positions.tolist() == [1, 3, 7, 8]


@given(num_patches=st.integers(2, 200), ratio=st.floats(0.01, 0.99))
def test_visible_and_masked_patches_are_ascending_and_complete(num_patches, ratio):
    visible, hidden = mask_patches(num_patches, ratio, sample_rng(0, 0, "k"))
    assert visible.dtype == hidden.dtype == np.int64
    assert sorted([*visible, *hidden]) == list(range(num_patches))
    assert (np.diff(visible) > 0).all()
    assert (np.diff(hidden) > 0).all()
    assert len(hidden) == min(max(round(ratio * num_patches), 1), num_patches - 1)


def test_three_quarters_of_196_patches_are_masked():
    visible, hidden = mask_patches(196, 0.75, sample_rng(0, 0, "k"))
    assert (len(visible), len(hidden)) == (49, 147)


def test_every_patch_is_masked_equally_often():
    counts = np.zeros(64)
    for number in range(4000):
        counts[mask_patches(64, 0.75, sample_rng(0, 0, str(number)))[1]] += 1
    assert np.abs(counts / 4000 - 0.75).max() < 4 * np.sqrt(0.75 * 0.25 / 4000)


@given(length=st.integers(2, 40), ratio=st.floats(0.0, 1.0))
def test_one_of_several_tokens_stays_visible_without_an_image(length, ratio):
    most = masked(length, ratio)[1].positions.tolist()
    fewer = masked(length, ratio, show_one=True)[1].positions.tolist()
    assert len(fewer) == min(len(most), max(length - 3, 1))
    assert set(fewer) <= set(most)


@given(length=st.integers(2, 40), ratio=st.floats(0.0, 0.99), key=st.text(max_size=5))
def test_exact_number_of_tokens_is_masked_and_no_special_one(length, ratio, key):
    token_ids, result = masked(length, ratio, key)
    expected = round(ratio * (length - 2))
    if ratio > 0 and length > 2:
        expected = max(expected, 1)
    assert len(result.positions) == expected
    assert not {0, length - 1} & set(result.positions.tolist())
    assert (np.diff(result.positions) > 0).all()
    assert (result.labels == token_ids[result.positions]).all()
    assert (result.input_ids[result.positions] == MASK).all()
    untouched = np.delete(np.arange(length), result.positions)
    assert (result.input_ids[untouched] == token_ids[untouched]).all()
    assert (token_ids == np.arange(100, 100 + length)).all(), "the input must not change"


def test_text_without_maskable_tokens_has_no_mask():
    _, result = masked(2, 0.5)
    assert len(result.positions) == len(result.labels) == 0
    assert result.input_ids.tolist() == [100, 101]


def test_every_token_is_masked_equally_often():
    counts = np.zeros(12)
    for number in range(4000):
        counts[masked(12, 0.5, str(number))[1].positions] += 1
    assert counts[[0, -1]].sum() == 0
    assert np.abs(counts[1:-1] / 4000 - 0.5).max() < 4 * np.sqrt(0.25 / 4000)


def test_shares_of_random_and_kept_tokens_follow_the_configuration():
    options = {"random_token_ids": np.array([900, 901]), "random_share": 0.1, "keep_share": 0.2}
    replaced, kept, masks, total = 0, 0, 0, 0
    for number in range(500):
        token_ids, result = masked(42, 0.5, str(number), **options)
        now = result.input_ids[result.positions]
        replaced += np.isin(now, [900, 901]).sum()
        kept += (now == token_ids[result.positions]).sum()
        masks += (now == MASK).sum()
        total += len(now)
        assert (result.labels == token_ids[result.positions]).all()
    assert replaced + kept + masks == total == 10_000
    assert replaced / total == pytest.approx(0.1, abs=0.015)
    assert kept / total == pytest.approx(0.2, abs=0.02)


def test_random_tokens_without_a_vocabulary_are_refused():
    with pytest.raises(ValueError, match="random_share > 0 needs random_token_ids"):
        masked(20, 0.5, random_share=1.0)
