"""Processor of the transformers model: images and captions to the inputs of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import PaddingStrategy

from eve_ds.export.hf.image_processor import EveImageProcessor, PixelSource


class EveProcessor(ProcessorMixin):
    """Processor that converts images and captions to the inputs of :class:`eve_ds.export.hf.model.EveModel`.

    Args:
        image_processor: processor of images.
        tokenizer: tokenizer of captions; its `model_max_length` limits the tokens of a caption, including [CLS] and
            [SEP].
    """

    def __init__(self, image_processor: EveImageProcessor, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: PixelSource | Sequence[PixelSource] | None = None,
        text: str | Sequence[str] | None = None,
        padding: bool | str = True,
        truncation: bool = True,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Return the inputs of the model for images, captions, or equal numbers of both; defaults are as in training.

        Args:
            images: see :meth:`eve_ds.export.hf.image_processor.EveImageProcessor.preprocess`.
            text: one caption or several.
            padding: True or `longest` pads to the longest caption, `max_length` to the limit, False not at all.
            truncation: whether captions are cut at the limit.
            max_length: limit of the tokens of a caption; None: `model_max_length` of the tokenizer.
            return_tensors: `pt`, `np`, or None for lists of token ids.

        Returns:
            `pixel_values` (B, 3, H, W) float32; `input_ids` (B, L) int64 and `attention_mask` (B, L) bool.

        Raises:
            ValueError: neither images nor captions, different numbers of both, an image that cannot be used, a caption
                that is no string, captions of different lengths for a tensor, or another unusable argument.
        """
        inputs: dict[str, Any] = {}
        if images is not None:
            inputs |= self.image_processor(images, return_tensors=return_tensors)
        if text is not None:
            rows = self._token_ids([text] if isinstance(text, str) else list(text), truncation, max_length)
            inputs |= self._padded(rows, padding, max_length)
        sizes = {name: len(values) for name, values in inputs.items()}
        if not inputs or len(set(sizes.values())) > 1:
            raise ValueError(f"pass images, captions, or equal numbers of both; these are {sizes or 'neither'}")
        if return_tensors is not None and len({len(row) for row in inputs.get("input_ids", [])}) > 1:
            raise ValueError("captions have different lengths: pass padding=True, or return_tensors=None for lists")
        return BatchFeature(inputs, tensor_type=return_tensors)

    def _token_ids(self, captions: list[str], truncation: bool, max_length: int | None) -> list[list[int]]:
        """Encode captions as [CLS] caption [SEP], like :mod:`eve_ds.data.collate`, whatever the tokenizer would add."""
        if not captions:
            raise ValueError("text is empty: pass at least one caption")
        others = [type(caption).__name__ for caption in captions if not isinstance(caption, str)]
        if others:
            raise ValueError(f"a caption of type {others[0]} must be a string: pass one string for every caption")
        limit = self._limit(max_length)
        encoded = self.tokenizer(captions, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        cut = [ids[: limit - 2] if truncation else ids for ids in encoded["input_ids"]]
        return [[self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id] for ids in cut]

    def _padded(self, rows: list[list[int]], padding: bool | str, max_length: int | None) -> dict[str, Any]:
        """Pad token ids on the right, and mark the real tokens."""
        names = {True: PaddingStrategy.LONGEST, False: PaddingStrategy.DO_NOT_PAD}
        strategy = names[padding] if isinstance(padding, bool) else PaddingStrategy(padding)
        length = {
            PaddingStrategy.LONGEST: max(len(row) for row in rows),
            PaddingStrategy.MAX_LENGTH: self._limit(max_length),
            PaddingStrategy.DO_NOT_PAD: 0,
        }[strategy]
        filling = [length - len(row) for row in rows]
        return {
            "input_ids": [
                row + [self.tokenizer.pad_token_id] * count for row, count in zip(rows, filling, strict=True)
            ],
            "attention_mask": [[True] * len(row) + [False] * count for row, count in zip(rows, filling, strict=True)],
        }

    def _limit(self, max_length: int | None) -> int:
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        if limit < 2:
            raise ValueError(f"max_length ({limit}) must be at least 2: [CLS] and [SEP]")
        return limit
