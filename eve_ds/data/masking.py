"""What a view shows of a sample and what it hides: a function of (seed, epoch, sample key, view) and of nothing else.

A resumed run, another number of ranks and another order of samples therefore see the same masks.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
from numpy.random import PCG64, Generator
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray


class _HashSeed(ISeedSequence):
    """Hands a hash to a bit generator as its initial state, in a quarter of the time of numpy's `SeedSequence`."""

    def __init__(self, digest: bytes) -> None:
        self._digest = digest

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        """The first `n_words` words of the hash."""
        return np.frombuffer(self._digest, dtype=dtype, count=n_words)


def sample_rng(seed: int, epoch: int, key: str, view: str = "") -> Generator:
    """A generator that depends on (seed, epoch, key, view) alone.

    The key is hashed (BLAKE2b, 256 bits) with the view's name, at most 16 bytes, as its personalization, so neighboring
    keys and epochs, and the views of one sample, give unrelated streams.
    """
    text = f"{seed}/{epoch}/{key}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text, digest_size=32, person=view.encode()).digest()
    return Generator(PCG64(_HashSeed(digest)))  # type: ignore[arg-type]


def num_masked_patches(num_patches: int, ratio: float) -> int:
    """round(ratio * num_patches); none at 0, all at 1, and between them at least one patch on each side."""
    if ratio in (0, 1):
        return round(ratio) * num_patches
    return min(max(round(ratio * num_patches), 1), num_patches - 1)


def num_chosen(count: int, share: float) -> int:
    """round(share * count), and at least one of any."""
    return max(round(share * count), min(count, 1))


def choose_patches(num_patches: int, share: float, rng: Generator) -> NDArray[np.int64]:
    """num_chosen(num_patches, share) patches at random, int64 and ascending."""
    chosen = rng.permutation(num_patches)[: num_chosen(num_patches, share)]
    chosen.sort()
    return chosen


def choose_words(num_tokens: int, share: float, rng: Generator) -> NDArray[np.bool_]:
    """(num_tokens,) bool: [CLS], [SEP] and a share of the words between them, at random."""
    kept = np.zeros(num_tokens, dtype=np.bool_)
    kept[[0, -1]] = True
    kept[1 + choose_patches(num_tokens - 2, share, rng)] = True
    return kept


def mask_patches(
    num_patches: int, ratio: float, rng: Generator, predicted_share: float = 1.0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the patches of one image at random.

    Returns:
        visible (num_patches - M,) and predicted (num_chosen(M, predicted_share),), both int64 and ascending, with
        M = num_masked_patches(num_patches, ratio): the same numbers for every sample, so that they stack.
    """
    num_masked = num_masked_patches(num_patches, ratio)
    order = rng.permutation(num_patches)
    visible, masked = order[num_masked:], order[: num_chosen(num_masked, predicted_share)]
    visible.sort()
    masked.sort()
    return visible, masked


def keep_few_patches(num_patches: int, num_visible: int, ratio: float, rng: Generator) -> NDArray[np.bool_]:
    """Which of the visible patches of an image stay so; (num_visible,) bool.

    Their number is uniform between 0 and round((1 - ratio) * num_patches), and at most `num_visible`.
    """
    count = rng.integers(min(round((1 - ratio) * num_patches), num_visible) + 1)
    return rng.permutation(num_visible) < count


class MaskedTokens(NamedTuple):
    """One caption after masking."""

    input_ids: NDArray[np.int64]
    """(L,) with chosen tokens replaced."""
    positions: NDArray[np.int64]
    """(K,) ascending positions of the chosen tokens."""
    labels: NDArray[np.int64]
    """(K,) the original tokens at `positions`."""


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
    """Choose exactly round(ratio * n) of the n maskable tokens, and at least one if there is any and ratio > 0.

    With `show_one`, one of several tokens is never chosen: for a caption beside which the model sees no image.

    A chosen token becomes [MASK], or with probability `random_share` a token drawn from `random_token_ids`, or with
    probability `keep_share` stays as it is (BERT: 0.1 and 0.1); it is predicted in all three cases.

    Args:
        token_ids: (L,) int64.
        maskable: (L,) bool; False for [CLS], [SEP] and padding.
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
