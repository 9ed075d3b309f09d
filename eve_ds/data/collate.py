"""Samples to a masked batch: stack, tokenize, mask."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eve_ds.config import Config, ConfigError
from eve_ds.data.batch import Batch, Sample
from eve_ds.data.masking import (
    MaskedTokens,
    choose_patches,
    choose_words,
    keep_few_patches,
    mask_patches,
    mask_tokens,
    num_chosen,
    num_masked_patches,
    sample_rng,
)
from eve_ds.data.transforms import channels_first
from eve_ds.views import Layout, layouts_of


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Raise :class:`ConfigError` if the tokenizer has ids that the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.model.vocab_size:
        raise ConfigError(
            f"tokenizer '{config.data.tokenizer}' has a vocabulary of {largest + 1} tokens, larger than "
            f"model.vocab_size ({config.model.vocab_size}); raise model.vocab_size or use a smaller tokenizer"
        )


class Collator:
    """Makes a :class:`Batch` of samples, with the masks of the views that `model.objectives` asks for.

    Args:
        config: its objectives, masking ratios and seed.
        tokenizer: of the captions.
        has_images: some source has images; a sample without one then gets zeros.
        has_captions: some source has captions; a sample without one then gets a row of padding.
    """

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerFast, *, has_images: bool, has_captions: bool
    ) -> None:
        check_vocabulary(tokenizer, config)
        self._has_images, self._has_captions = has_images, has_captions
        self._image_size, self._num_patches = config.model.image_size, config.model.num_patches
        self._masking, self._seed = config.masking, config.train.seed
        self._objectives = config.model.objectives
        self._keep_padding = config.model.profile == "official"
        self._captions = CaptionEncoder(tokenizer, config.model.text_length)
        special = set(tokenizer.all_special_ids)
        ids = sorted(set(tokenizer.get_vocab().values()) - special)
        self._random_ids = np.array(ids, dtype=np.int64)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch; what a view hides of a sample depends on seed, epoch and key of that sample alone."""
        fields: dict[str, Tensor | None] = {}
        tokens = [self._captions.encode(sample.caption) for sample in samples] if self._has_captions else []
        # A batch without any caption keeps one column of padding, so that no tensor of the stream is empty.
        length = max([1, *(len(row) for row in tokens)])
        if self._has_images:
            fields |= self._pixels(samples)
        if self._has_captions:
            fields |= self._texts(tokens, length)
        if "joint" in self._objectives:
            fields |= self._joint_view(samples, tokens, length)
        if "mim" in self._objectives and self._has_images:
            fields |= self._image_view(samples, tokens, length)
        if "mlm" in self._objectives and self._has_captions:
            fields |= self._language_view(samples, tokens, length)
        keys = [sample.key for sample in samples]
        return Batch(keys=keys, **fields, layouts=self._layouts(fields))

    def _layouts(self, fields: dict[str, Tensor | None]) -> dict[str, Layout]:
        """Where the tokens of every view stand; counted here, as on an accelerator the host would have to wait."""
        return layouts_of(self._objectives, fields, self._num_patches, self._keep_padding)

    def _pixels(self, samples: Sequence[Sample]) -> dict[str, Tensor | None]:
        present = np.array([sample.image is not None for sample in samples])
        images = [sample.image for sample in samples if sample.image is not None]
        pixel_values = channels_first(np.stack(images)) if images else None
        if not present.all():
            pixel_values = self._with_gaps(pixel_values, present)
        return {"pixel_values": pixel_values, "image_mask": None if present.all() else torch.from_numpy(present)}

    def _with_gaps(self, pixel_values: Tensor | None, present: NDArray[np.bool_]) -> Tensor:
        padded = torch.zeros(len(present), 3, self._image_size, self._image_size, dtype=torch.uint8)
        if pixel_values is not None:
            padded[torch.from_numpy(present)] = pixel_values
        return padded

    def _texts(self, tokens: Sequence[NDArray[np.int64]], length: int) -> dict[str, Tensor | None]:
        mask = np.arange(length) < np.array([len(row) for row in tokens])[:, None]
        return {"input_ids": self._padded(tokens, length), "attention_mask": torch.from_numpy(mask)}

    def _padded(self, rows: Sequence[NDArray[np.int64]], length: int) -> Tensor:
        """(B, L) int64."""
        padded = np.full((len(rows), length), self._captions.pad_id, dtype=np.int64)
        for place, row in zip(padded, rows, strict=True):
            place[: len(row)] = row
        return torch.from_numpy(padded)

    def _joint_view(
        self, samples: Sequence[Sample], tokens: Sequence[NDArray[np.int64]], length: int
    ) -> dict[str, Tensor | None]:
        """Masked image beside masked caption, or beside a whole one where even more of the image is hidden."""
        rngs = [sample_rng(self._seed, sample.epoch, sample.key) for sample in samples]
        text_to_image = [self._is_text_to_image(sample, rng) for sample, rng in zip(samples, rngs, strict=True)]
        fields = self._patch_masks(rngs, text_to_image) if self._has_images else {}
        if not self._has_captions:
            return fields
        return fields | self._token_masks(samples, tokens, length, rngs, text_to_image)

    def _image_view(
        self, samples: Sequence[Sample], tokens: Sequence[NDArray[np.int64]], length: int
    ) -> dict[str, Tensor | None]:
        """Masked image beside the whole caption, of the samples that have an image and are drawn."""
        masking = self._masking
        rngs = {
            row: sample_rng(self._seed, sample.epoch, sample.key, "mim")
            for row, sample in enumerate(samples)
            if sample.image is not None
        }
        if masking.image_view_share < 1:
            rngs = {row: rng for row, rng in rngs.items() if rng.random() < masking.image_view_share}
        text_to_image = [self._is_text_to_image(samples[row], rng) for row, rng in rngs.items()]
        fields = self._patch_masks(list(rngs.values()), text_to_image)
        if len(rngs) < len(samples):
            fields["image_view_ids"] = torch.tensor(list(rngs), dtype=torch.int64)
        if self._has_captions and masking.image_view_word_share < 1:
            fields["image_view_text_mask"] = self._shown_words(
                [(tokens[row], rng) for row, rng in rngs.items()], length
            )
        return fields

    def _language_view(
        self, samples: Sequence[Sample], tokens: Sequence[NDArray[np.int64]], length: int
    ) -> dict[str, Tensor | None]:
        """Masked caption beside the whole image, or beside a share of its patches."""
        share = self._masking.language_view_patch_share
        rngs = [sample_rng(self._seed, sample.epoch, sample.key, "mlm") for sample in samples]
        fields: dict[str, Tensor | None] = {}
        if self._has_images and share < 1:
            patches = np.stack([choose_patches(self._num_patches, share, rng) for rng in rngs])
            fields["language_patch_ids"] = torch.from_numpy(patches)
        return fields | self._token_masks(samples, tokens, length, rngs, [False] * len(samples))

    def _is_text_to_image(self, sample: Sample, rng: Generator) -> bool:
        share = self._masking.text_to_image_share
        return share > 0 and sample.image is not None and sample.caption is not None and rng.random() < share

    def _patch_masks(self, rngs: Sequence[Generator], text_to_image: Sequence[bool]) -> dict[str, Tensor | None]:
        ratio, share = self._masking.patch_mask_ratio, self._masking.predicted_patch_share
        num_masked = num_masked_patches(self._num_patches, ratio)
        visible = np.empty((len(rngs), self._num_patches - num_masked), dtype=np.int64)
        masked = np.empty((len(rngs), num_chosen(num_masked, share)), dtype=np.int64)
        for row, rng in enumerate(rngs):
            visible[row], masked[row] = mask_patches(self._num_patches, ratio, rng, share)
        return {
            "visible_patch_ids": torch.from_numpy(visible),
            "visible_patch_mask": self._visible_patch_mask(visible.shape[1], rngs, text_to_image),
            "masked_patch_ids": torch.from_numpy(masked),
        }

    def _visible_patch_mask(
        self, num_visible: int, rngs: Sequence[Generator], text_to_image: Sequence[bool]
    ) -> Tensor | None:
        if self._masking.text_to_image_share == 0:
            return None
        mask = np.ones((len(rngs), num_visible), dtype=np.bool_)
        for row in np.flatnonzero(text_to_image).tolist():
            ratio = self._masking.text_to_image_mask_ratio
            mask[row] = keep_few_patches(self._num_patches, num_visible, ratio, rngs[row])
        return torch.from_numpy(mask)

    def _shown_words(self, captions: Sequence[tuple[NDArray[np.int64], Generator]], length: int) -> Tensor:
        """(B_i, L) bool, True = a token that the image view shows."""
        shown = np.zeros((len(captions), length), dtype=np.bool_)
        for row, (token_ids, rng) in zip(shown, captions, strict=True):
            if len(token_ids):
                row[: len(token_ids)] = choose_words(len(token_ids), self._masking.image_view_word_share, rng)
        return torch.from_numpy(shown)

    def _token_masks(
        self,
        samples: Sequence[Sample],
        tokens: Sequence[NDArray[np.int64]],
        length: int,
        rngs: Sequence[Generator],
        text_to_image: Sequence[bool],
    ) -> dict[str, Tensor | None]:
        masked = [
            self._mask(token_ids, 0.0 if stays_whole else self._text_mask_ratio(rng), rng, sample.image is None)
            for sample, token_ids, rng, stays_whole in zip(samples, tokens, rngs, text_to_image, strict=True)
        ]
        places = [item.positions + row * length for row, item in enumerate(masked)]
        return {
            "masked_input_ids": self._padded([item.input_ids for item in masked], length),
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
            random_share=self._masking.random_token_share,
            keep_share=self._masking.keep_token_share,
            show_one=alone,
        )

    def _text_mask_ratio(self, rng: Generator) -> float:
        masking = self._masking
        if masking.max_text_mask_ratio is None:
            return masking.text_mask_ratio
        return rng.uniform(masking.text_mask_ratio, masking.max_text_mask_ratio)


class CaptionEncoder:
    """Captions to token ids, one at a time: a batch call would start threads, which a forked worker must not have."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self._tokenizer: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_length = max_length
        self.cls_id, self.sep_id = int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)
        self.pad_id, self.mask_id = int(tokenizer.pad_token_id), int(tokenizer.mask_token_id)

    def encode(self, caption: str | None) -> NDArray[np.int64]:
        """(n,) [CLS] caption [SEP], cut to the longest length; empty for None."""
        if caption is None:
            return np.empty(0, dtype=np.int64)
        ids = self._tokenizer.encode(caption, add_special_tokens=False).ids[: self._max_length - 2]
        return np.array([self.cls_id, *ids, self.sep_id], dtype=np.int64)
