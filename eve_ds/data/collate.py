"""Samples to a masked batch: stack, normalise, tokenise, mask."""

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
from eve_ds.data.masking import MaskedTokens, keep_few_patches, mask_patches, mask_tokens, sample_rng
from eve_ds.data.transforms import normalize


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Raise :class:`ConfigError` if the tokenizer has ids that the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.model.vocab_size:
        raise ConfigError(
            f"tokenizer '{config.data.tokenizer}' has a vocabulary of {largest + 1} tokens, larger than "
            f"model.vocab_size ({config.model.vocab_size}); raise model.vocab_size or use a smaller tokenizer"
        )


class Collator:
    """Makes a :class:`Batch` of samples, masked as `model.objective` asks for.

    Args:
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
        self._objective = config.model.objective
        self._captions = CaptionEncoder(tokenizer, config.model.text_length)
        special = set(tokenizer.all_special_ids)
        ids = sorted(set(tokenizer.get_vocab().values()) - special)
        self._random_ids = np.array(ids, dtype=np.int64)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch; its masks depend on seed, epoch and key of each sample alone."""
        rngs = [sample_rng(self._seed, sample.epoch, sample.key) for sample in samples]
        text_to_image = [self._is_text_to_image(sample, rng) for sample, rng in zip(samples, rngs, strict=True)]
        fields: dict[str, Tensor | None] = {}
        if self._has_images:
            fields |= self._image_fields(samples, rngs, text_to_image)
        if self._has_captions:
            fields |= self._text_fields(samples, rngs, text_to_image)
        return Batch(keys=[sample.key for sample in samples], **fields)

    def _is_text_to_image(self, sample: Sample, rng: Generator) -> bool:
        share = self._masking.text_to_image_share if self._objective == "msm" else 0.0
        return share > 0 and sample.image is not None and sample.caption is not None and rng.random() < share

    def _image_fields(
        self, samples: Sequence[Sample], rngs: Sequence[Generator], text_to_image: Sequence[bool]
    ) -> dict[str, Tensor | None]:
        present = np.array([sample.image is not None for sample in samples])
        images = [sample.image for sample in samples if sample.image is not None]
        pixel_values = normalize(np.stack(images)) if images else None
        if not present.all():
            pixel_values = self._with_gaps(pixel_values, present)
        return {
            "pixel_values": pixel_values,
            "image_mask": None if present.all() else torch.from_numpy(present),
            **(self._patch_masks(rngs, text_to_image) if self._objective == "msm" else {}),
        }

    def _patch_masks(self, rngs: Sequence[Generator], text_to_image: Sequence[bool]) -> dict[str, Tensor | None]:
        ratio, share = self._masking.patch_mask_ratio, self._masking.predicted_patch_share
        visible, masked = zip(*(mask_patches(self._num_patches, ratio, rng, share) for rng in rngs), strict=True)
        return {
            "visible_patch_ids": torch.from_numpy(np.stack(visible)),
            "visible_patch_mask": self._visible_patch_mask(len(visible[0]), rngs, text_to_image),
            "masked_patch_ids": torch.from_numpy(np.stack(masked)),
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

    def _with_gaps(self, pixel_values: Tensor | None, present: NDArray[np.bool_]) -> Tensor:
        padded = torch.zeros(len(present), 3, self._image_size, self._image_size)
        if pixel_values is not None:
            padded[torch.from_numpy(present)] = pixel_values
        return padded

    def _text_fields(
        self, samples: Sequence[Sample], rngs: Sequence[Generator], text_to_image: Sequence[bool]
    ) -> dict[str, Tensor | None]:
        tokens = [self._captions.encode(sample.caption) for sample in samples]
        # A batch without any caption keeps one column of padding, so that no tensor of the stream is empty.
        length = max(1, *(len(row) for row in tokens))
        input_ids = np.full((len(samples), length), self._captions.pad_id, dtype=np.int64)
        masked_input_ids, attention_mask = input_ids.copy(), np.zeros_like(input_ids, dtype=np.bool_)
        positions, labels = [], []
        for row, (token_ids, rng) in enumerate(zip(tokens, rngs, strict=True)):
            masked = self._mask(token_ids, 0.0 if text_to_image[row] else self._text_mask_ratio(rng), rng)
            input_ids[row, : len(token_ids)] = token_ids
            masked_input_ids[row, : len(token_ids)] = masked.input_ids
            attention_mask[row, : len(token_ids)] = True
            positions.append(masked.positions + row * length)
            labels.append(masked.labels)
        whole, hidden = torch.from_numpy(input_ids), torch.from_numpy(masked_input_ids)
        fields: dict[str, Tensor | None] = {
            "input_ids": hidden if self._objective == "msm" else whole,
            "attention_mask": torch.from_numpy(attention_mask),
        }
        if self._objective == "itc_itm":
            return fields
        if self._objective == "itc_itm_mlm":
            fields["masked_input_ids"] = hidden
        return fields | {
            "masked_token_ids": torch.from_numpy(np.concatenate(positions)),
            "token_labels": torch.from_numpy(np.concatenate(labels)),
        }

    def _mask(self, token_ids: NDArray[np.int64], ratio: float, rng: Generator) -> MaskedTokens:
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
