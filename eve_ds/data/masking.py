"""Random masks of images and captions, as functions of (seed, epoch, sample key, view) only.

A resumed run, another number of ranks and another order of samples therefore use the same masks.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
from numpy.random import PCG64, Generator
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray


class _HashSeed(ISeedSequence):
    """Seed sequence that passes a hash to a bit generator as initial state; four times faster than `SeedSequence`."""

    def __init__(self, digest: bytes) -> None:
        self._digest = digest

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        """Return the first `n_words` words of the hash."""
        return np.frombuffer(self._digest, dtype=dtype, count=n_words)


def sample_rng(seed: int, epoch: int, key: str, view: str = "") -> Generator:
    """Return a random generator that depends on (seed, epoch, key, view) only.

    Seed, epoch and key are hashed with BLAKE2b (256 bits); the name of the view, at most 16 bytes, is the
    personalization of the hash. Similar keys, successive epochs and the views of one sample therefore get independent
    streams.
    """
    text = f"{seed}/{epoch}/{key}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text, digest_size=32, person=view.encode()).digest()
    return Generator(PCG64(_HashSeed(digest)))  # type: ignore[arg-type]


def num_masked_patches(num_patches: int, ratio: float) -> int:
    """Return round(ratio * num_patches); for 0 < ratio < 1 at least one patch is masked and one visible."""
    if ratio in (0, 1):
        return round(ratio) * num_patches
    return min(max(round(ratio * num_patches), 1), num_patches - 1)


def num_chosen(count: int, share: float) -> int:
    """Return round(share * count), but at least 1 if `count` is positive."""
    return max(round(share * count), min(count, 1))


def choose_patches(num_patches: int, share: float, rng: Generator) -> NDArray[np.int64]:
    """Draw num_chosen(num_patches, share) patch indices; int64, ascending."""
    chosen = rng.permutation(num_patches)[: num_chosen(num_patches, share)]
    chosen.sort()
    return chosen


def choose_words(num_tokens: int, share: float, rng: Generator) -> NDArray[np.bool_]:
    """Draw the tokens to keep, (num_tokens,) bool: [CLS], [SEP] and a random share of the words between them."""
    kept = np.zeros(num_tokens, dtype=np.bool_)
    kept[[0, -1]] = True
    kept[1 + choose_patches(num_tokens - 2, share, rng)] = True
    return kept


def mask_patches(
    num_patches: int, ratio: float, rng: Generator, predicted_share: float = 1.0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the patches of one image at random.

    Returns:
        Visible patches (num_patches - M,) and predicted patches (num_chosen(M, predicted_share),), both int64 and
        ascending, with M = num_masked_patches(num_patches, ratio). Their numbers are the same for every sample, so
        that samples can be stacked.
    """
    num_masked = num_masked_patches(num_patches, ratio)
    order = rng.permutation(num_patches)
    visible, masked = order[num_masked:], order[: num_chosen(num_masked, predicted_share)]
    visible.sort()
    masked.sort()
    return visible, masked


def keep_few_patches(num_patches: int, num_visible: int, ratio: float, rng: Generator) -> NDArray[np.bool_]:
    """Draw which of the visible patches of an image stay visible; (num_visible,) bool.

    Their number is uniform between 0 and round((1 - ratio) * num_patches), but at most `num_visible`.
    """
    count = rng.integers(min(round((1 - ratio) * num_patches), num_visible) + 1)
    return rng.permutation(num_visible) < count


class MaskedTokens(NamedTuple):
    """Masked caption of L tokens, K of them chosen."""

    input_ids: NDArray[np.int64]
    """(L,) tokens after replacement of the chosen ones."""
    positions: NDArray[np.int64]
    """(K,) positions of the chosen tokens, ascending."""
    labels: NDArray[np.int64]
    """(K,) original tokens at `positions`."""


def mask_tokens(
    token_ids: NDArray[np.int64],
    maskable: NDArray[np.bool_],
    ratio: float,
    rng: Generator,
    *,
    mask_token_id: int,
    random_token_ids: NDArray[np.int64] | None = None,
    random_share: float = 0.0,
    keep_share: float = 0.0,
    show_one: bool = False,
) -> MaskedTokens:
    """Choose round(ratio * n) of the n maskable tokens, but at least one if n > 0 and ratio > 0.

    A chosen token becomes a random token with probability `random_share`, stays unchanged with probability
    `keep_share` (BERT: 0.1 and 0.1), and becomes [MASK] otherwise. The model predicts it in all three cases.

    Args:
        token_ids: (L,) int64.
        maskable: (L,) bool; False for [CLS], [SEP] and padding.
        ratio: fraction of the maskable tokens to choose.
        rng: source of randomness.
        mask_token_id: ID of [MASK].
        random_token_ids: IDs that random tokens are drawn from; required if `random_share` is positive.
        random_share: probability of a random token.
        keep_share: probability of an unchanged token.
        show_one: if n > 1, leave at least one token unchosen, for a caption without an image.

    Raises:
        ValueError: `random_share` is positive and `random_token_ids` is None.
    """
    candidates = np.flatnonzero(maskable)
    count = round(ratio * len(candidates))
    if count == 0 and ratio > 0 and len(candidates) > 0:
        count = 1
    if show_one and len(candidates) > 1:
        count = min(count, len(candidates) - 1)
    positions = rng.permutation(candidates)[:count]
    positions.sort()
    labels = token_ids[positions]
    input_ids = token_ids.copy()
    input_ids[positions] = mask_token_id
    if random_share + keep_share > 0 and count > 0:
        draw = rng.random(count)
        kept = draw < keep_share
        random = (draw >= keep_share) & (draw < keep_share + random_share)
        input_ids[positions[kept]] = labels[kept]
        if random.any():
            if random_token_ids is None:
                raise ValueError("random_share > 0 needs random_token_ids to draw from")
            input_ids[positions[random]] = rng.choice(random_token_ids, int(random.sum()))
    return MaskedTokens(input_ids, positions, labels)
