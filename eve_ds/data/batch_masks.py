"""Masks of a batch: masked patches and words of its samples, with the ratios of `MaskingConfig`.

Pre-training objectives (:mod:`eve_ds.objectives`) determine which of these masks their views use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from eve_ds.config import Config
from eve_ds.data.batch import Sample
from eve_ds.data.captions import CaptionEncoder, padded
from eve_ds.data.masking import (
    MaskedTokens,
    choose_words,
    keep_few_patches,
    mask_patches,
    mask_tokens,
    num_chosen,
    num_masked_patches,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Collated(NamedTuple):
    """Samples of one batch, with their captions as tokens."""

    samples: Sequence[Sample]
    tokens: list[NDArray[np.int64]]
    """(n,) token IDs of each sample's caption; empty without captions."""
    length: int
    """Length of the longest caption, at least 1."""


class Masker:
    """Random masks of the samples of a batch.

    Args:
        config: masking ratios and seed.
        tokenizer: tokenizer whose ordinary tokens replace words (`random_token_share`).
        captions: encoder of the captions.
        has_images: whether batches have images.
        has_captions: whether batches have captions.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerFast,
        captions: CaptionEncoder,
        *,
        has_images: bool,
        has_captions: bool,
    ) -> None:
        self.has_images, self.has_captions = has_images, has_captions
        self.config, self.seed, self.num_patches = config.masking, config.train.seed, config.model.num_patches
        self._captions = captions
        ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
        self._random_ids = np.array(ids, dtype=np.int64)

    def is_text_to_image(self, sample: Sample, rng: Generator) -> bool:
        """Draw whether a pair masks more of its image, so that words determine the pixels (`text_to_image_share`)."""
        share = self.config.text_to_image_share
        return share > 0 and sample.image is not None and sample.caption is not None and rng.random() < share

    def patch_masks(self, rngs: Sequence[Generator], text_to_image: Sequence[bool]) -> dict[str, Tensor | None]:
        """Return `visible_patch_ids`, `visible_patch_mask`, `masked_patch_ids` of B_i samples, one generator each."""
        ratio, share = self.config.patch_mask_ratio, self.config.predicted_patch_share
        num_masked = num_masked_patches(self.num_patches, ratio)
        visible = np.empty((len(rngs), self.num_patches - num_masked), dtype=np.int64)
        masked = np.empty((len(rngs), num_chosen(num_masked, share)), dtype=np.int64)
        for row, rng in enumerate(rngs):
            visible[row], masked[row] = mask_patches(self.num_patches, ratio, rng, share)
        return {
            "visible_patch_ids": torch.from_numpy(visible),
            "visible_patch_mask": self._visible_patch_mask(visible.shape[1], rngs, text_to_image),
            "masked_patch_ids": torch.from_numpy(masked),
        }

    def _visible_patch_mask(
        self, num_visible: int, rngs: Sequence[Generator], text_to_image: Sequence[bool]
    ) -> Tensor | None:
        if self.config.text_to_image_share == 0:
            return None
        mask = np.ones((len(rngs), num_visible), dtype=np.bool_)
        for row in np.flatnonzero(text_to_image).tolist():
            ratio = self.config.text_to_image_mask_ratio
            mask[row] = keep_few_patches(self.num_patches, num_visible, ratio, rngs[row])
        return torch.from_numpy(mask)

    def shown_words(self, captions: Sequence[tuple[NDArray[np.int64], Generator]], length: int) -> Tensor:
        """Return the tokens that the image view contains (`image_view_word_share`), (B_i, L) bool."""
        shown = np.zeros((len(captions), length), dtype=np.bool_)
        for row, (token_ids, rng) in zip(shown, captions, strict=True):
            if len(token_ids):
                row[: len(token_ids)] = choose_words(len(token_ids), self.config.image_view_word_share, rng)
        return torch.from_numpy(shown)

    def token_masks(
        self, batch: Collated, rngs: Sequence[Generator], text_to_image: Sequence[bool]
    ) -> dict[str, Tensor | None]:
        """Return `masked_input_ids`, `masked_token_ids`, `token_labels`; captions of text-to-image pairs stay whole."""
        masked = [
            self._mask(token_ids, 0.0 if stays_whole else self._text_mask_ratio(rng), rng, sample.image is None)
            for sample, token_ids, rng, stays_whole in zip(
                batch.samples, batch.tokens, rngs, text_to_image, strict=True
            )
        ]
        places = [item.positions + row * batch.length for row, item in enumerate(masked)]
        return {
            "masked_input_ids": padded([item.input_ids for item in masked], batch.length, self._captions.pad_id),
            "masked_token_ids": torch.from_numpy(np.concatenate(places)),
            "token_labels": torch.from_numpy(np.concatenate([item.labels for item in masked])),
        }

    def _mask(self, token_ids: NDArray[np.int64], ratio: float, rng: Generator, alone: bool) -> MaskedTokens:
        maskable = np.zeros(len(token_ids), dtype=np.bool_)
        maskable[1:-1] = True  # all but [CLS] and [SEP]
        return mask_tokens(
            token_ids,
            maskable,
            ratio,
            rng,
            mask_token_id=self._captions.mask_id,
            random_token_ids=self._random_ids,
            random_share=self.config.random_token_share,
            keep_share=self.config.keep_token_share,
            show_one=alone,
        )

    def _text_mask_ratio(self, rng: Generator) -> float:
        masking = self.config
        if masking.max_text_mask_ratio is None:
            return masking.text_mask_ratio
        return rng.uniform(masking.text_mask_ratio, masking.max_text_mask_ratio)
