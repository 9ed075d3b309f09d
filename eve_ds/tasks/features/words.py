"""Masked words as features: likelihood of every word at each place of a caption whose words are all hidden.

Masked signal modeling has no head that compares an image with a text. But the text head, given an image, assigns every
word a likelihood at each masked place. The logarithm of a caption's likelihood is

    sum over places n of  state_n . embedding(word_n) + bias(word_n) - log Z_n

where states and log Z depend on the image alone, embedding and bias on the caption alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds import limits
from eve_ds.config import Config, ConfigError
from eve_ds.data.captions import CaptionEncoder
from eve_ds.model.decoders import TextHead
from eve_ds.model.eve import Backbone, MoEFactory
from eve_ds.model.moe import MoEOutput
from eve_ds.reading import read_json
from eve_ds.storage import cause
from eve_ds.tasks.features.class_token import VisiblePatches

TEMPLATE = "template.json"
"""Name of the file in a saved model."""


class Template(NamedTuple):
    """Captions whose words are all hidden."""

    lengths: tuple[int, ...]
    """Ascending numbers of words without special tokens; a caption is compared with the next longer length."""
    cls_id: int
    sep_id: int
    mask_id: int

    @classmethod
    def of(cls, captions: Iterable[str], encoder: CaptionEncoder, most: int) -> Template:
        """Template of at most `most` lengths, evenly spread over those of the captions.

        Raises:
            ConfigError: no caption has a word.
        """
        lengths = sorted({len(encoder.encode(caption)) - 2 for caption in captions} - {0})
        if not lengths:
            raise ConfigError("no caption has a word: give captions with words")
        if len(lengths) > most:
            lengths = sorted({lengths[-1 - len(lengths) * i // most] for i in range(most)})
        return cls(tuple(lengths), encoder.cls_id, encoder.sep_id, encoder.mask_id)

    def save(self, folder: Path) -> None:
        """Write the template beside the weights of a model."""
        (folder / TEMPLATE).write_text(json.dumps(self._asdict()), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Template:
        """Read what :meth:`save` wrote; raises ConfigError if it cannot be read."""
        try:
            saved = read_json(folder / TEMPLATE)
            template = cls(tuple(saved["lengths"]), saved["cls_id"], saved["sep_id"], saved["mask_id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"template of captions {folder / TEMPLATE} cannot be read: {cause(error)}") from None
        numbers = [*template.lengths, template.cls_id, template.sep_id, template.mask_id]
        if not template.lengths or not all(isinstance(n, int) and 0 <= n <= limits.TOKENS for n in numbers):
            raise ConfigError(
                f"template of captions {folder / TEMPLATE} must hold whole numbers from 0 to {limits.TOKENS:,}"
            )
        return template

    def hidden_captions(self, length: int, batch: int, device: torch.device) -> Tensor:
        """(batch, length + 2) int64: [CLS] [MASK] ... [SEP]."""
        row = torch.full((length + 2,), self.mask_id, device=device)
        row[0], row[-1] = self.cls_id, self.sep_id
        return row.expand(batch, -1)


class HiddenWords(NamedTuple):
    """Prediction of the N words of a hidden caption beside an image."""

    class_state: Tensor
    """(B, D) state of the caption's [CLS]."""
    states: Tensor
    """(B, N, D) states, whose products with the embeddings of words are logits."""
    log_partition: Tensor
    """(B, N, 1) fp32, logarithm of the sum of the exponentials of all words' logits."""
    moe: tuple[MoEOutput, ...]
    num_tokens: int
    """Number of tokens that entered the backbone on this rank."""


def inner_words(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, L) int64, (B, L) bool -> (B, L) bool, True = neither special token nor padding."""
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (place > 0) & (place < attention_mask.sum(dim=1, keepdim=True) - 1)


class WordHead(nn.Module):
    """The text head of pre-training; tasks add their own parts.

    Args:
        config: configuration with `model`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.text_head = TextHead(config.model)


class WordModel(nn.Module):
    """Backbone and text head of models that read masked words.

    Args:
        config: configuration with `model` and `task`.
        moe_cls: makes the MoE of a layer.
        template: lengths and special tokens of the hidden captions.
    """

    head: WordHead

    def __init__(self, config: Config, moe_cls: MoEFactory, template: Template) -> None:
        super().__init__()
        self.backbone = Backbone(config.model, moe_cls)
        self.visible_patches = VisiblePatches(config)
        self.template = template

    def hidden_words(self, pixel_values: Tensor, length: int) -> HiddenWords:
        """Encode images (B, 3, H, W), each beside a caption of `length` hidden words."""
        captions = self.template.hidden_captions(length, len(pixel_values), pixel_values.device)
        encoded = self.backbone(pixel_values, captions, visible_patch_ids=self.visible_patches(pixel_values))
        text = encoded.stream.padded()[:, encoded.num_image_tokens :]
        states = self.head.text_head(text[:, 1 : 1 + length])
        log_partition = self.word_logits(states).logsumexp(dim=-1, keepdim=True)
        return HiddenWords(text[:, 0], states, log_partition, encoded.moe, encoded.stream.hidden_states.shape[0])

    def word_logits(self, states: Tensor) -> Tensor:
        """(..., D) states -> (..., V) fp32 logits of all words."""
        return F.linear(states, self.backbone.text_embedding.word.weight, self.head.text_head.bias).float()

    def words(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(...,) int64 -> embeddings (..., D) and biases (..., 1) of the words, fp32: the factors of their logits."""
        embedding = self.backbone.text_embedding.word(input_ids).float()
        return embedding, self.head.text_head.bias[input_ids].float()[..., None]
