"""Samples to a masked batch: stack, tokenize, mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eve_ds.config import Config
from eve_ds.data.batch import Batch, Sample
from eve_ds.data.batch_masks import Collated, Masker
from eve_ds.data.captions import CaptionEncoder, check_vocabulary, padded
from eve_ds.data.transforms import channels_first
from eve_ds.views import HasViews, layouts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PretrainingObjective(HasViews, Protocol):
    """Part of a pre-training objective that a batch is collated for."""

    def masks(self, masker: Masker, batch: Collated) -> dict[str, Tensor | None]:
        """Return the batch fields with the hidden parts of the views."""


class Collator:
    """Makes a :class:`Batch` of samples, with the masks of the views of pre-training objectives.

    Args:
        config: masking ratios, seed, sizes.
        tokenizer: tokenizer of the captions.
        objectives: decide which views are masked, as :func:`eve_ds.objectives.registry.objectives_of` returns them.
        has_images: whether some source has images; a sample without one then gets zeros.
        has_captions: whether some source has captions; a sample without one then gets a row of padding.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerFast,
        objectives: Sequence[PretrainingObjective],
        *,
        has_images: bool,
        has_captions: bool,
    ) -> None:
        check_vocabulary(tokenizer, config)
        self._has_images, self._has_captions = has_images, has_captions
        self._objectives = objectives
        self._model = config.model
        self._captions = CaptionEncoder(tokenizer, config.model.text_length)
        self._masker = Masker(config, tokenizer, self._captions, has_images=has_images, has_captions=has_captions)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Return one batch; the parts that a view hides depend only on the seed, and on the sample's epoch and key."""
        fields: dict[str, Any] = {}
        tokens = [self._captions.encode(sample.caption) for sample in samples] if self._has_captions else []
        # A batch without any caption keeps one column of padding, so that no tensor of the stream is empty.
        length = self._model.padded_length(max([1, *(len(row) for row in tokens)]))
        batch = Collated(samples, tokens, length)
        if self._has_images:
            fields |= self._pixels(samples)
        if self._has_captions:
            fields |= self._texts(batch)
        for objective in self._objectives:
            fields |= objective.masks(self._masker, batch)
        layouts = layouts_of(self._objectives, fields, self._model.num_patches, self._model.keeps_padding)
        more = {name: fields.pop(name) for name in fields.keys() - Batch.__dataclass_fields__.keys()}
        return Batch(keys=[sample.key for sample in samples], **fields, more=more, layouts=layouts)

    def _pixels(self, samples: Sequence[Sample]) -> dict[str, Tensor | None]:
        present = np.array([sample.image is not None for sample in samples])
        images = [sample.image for sample in samples if sample.image is not None]
        pixel_values = channels_first(images) if images else None
        if not present.all():
            pixel_values = self._with_gaps(pixel_values, present)
        return {"pixel_values": pixel_values, "image_mask": None if present.all() else torch.from_numpy(present)}

    def _with_gaps(self, pixel_values: Tensor | None, present: NDArray[np.bool_]) -> Tensor:
        padded = torch.zeros(len(present), 3, self._model.image_size, self._model.image_size, dtype=torch.uint8)
        if pixel_values is not None:
            padded[torch.from_numpy(present)] = pixel_values
        return padded

    def _texts(self, batch: Collated) -> dict[str, Tensor | None]:
        mask = np.arange(batch.length) < np.array([len(row) for row in batch.tokens])[:, None]
        input_ids = padded(batch.tokens, batch.length, self._captions.pad_id)
        return {"input_ids": input_ids, "attention_mask": torch.from_numpy(mask)}
