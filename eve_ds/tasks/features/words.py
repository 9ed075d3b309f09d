"""Masked words as features: how likely every word is at each place of a caption that is hidden altogether.

Masked signal modelling has no head that compares an image with a text, but this is what it learns to tell. Retrieval
by it needs no training. The logarithm of a caption's likelihood is

    sum over places n of  state_n . embedding(word_n) + bias(word_n) - log Z_n

where states and log Z come from the image alone, embedding and bias from the caption alone. A gallery of N images and
any number of captions costs N forwards of the backbone, and pre-training pays nothing. What the words say of each
other is lost by hiding them together; the best candidates are ordered again by the likelihood of each word beside half
of the others (Salazar et al., "Masked Language Model Scoring", ACL 2020).

The same features can be fine-tuned by contrast; captions then cost next to nothing. They are long: D + 2 numbers for
every place of every length, 0.1 MB for a caption of up to 38 words at the width of EVE-Base.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import Config, ConfigError
from eve_ds.data.captions import CaptionEncoder
from eve_ds.model.decoders import TextHead
from eve_ds.model.eve import Backbone, MoEFactory
from eve_ds.model.moe import MoEOutput
from eve_ds.tasks.encoder import VisiblePatches
from eve_ds.tasks.pair_models import RetrievalOutput, contrastive_logits

TEMPLATE = "template.json"
"""File of a saved model."""
PASSES = 2
"""Forwards of a pair when candidates are ordered again; each hides one in so many words."""


class Template(NamedTuple):
    """Captions of which every word is hidden."""

    lengths: tuple[int, ...]
    """Ascending numbers of words, special tokens not counted. A caption is compared with the next longer one."""
    cls_id: int
    sep_id: int
    mask_id: int

    @classmethod
    def of(cls, captions: Iterable[str], encoder: CaptionEncoder, most: int) -> Template:
        """At most `most` lengths, evenly spread over those that the captions have; raises ConfigError without any."""
        lengths = sorted({len(encoder.encode(caption)) - 2 for caption in captions} - {0})
        if not lengths:
            raise ConfigError("there is no caption with a word in it")
        if len(lengths) > most:
            lengths = sorted({lengths[-1 - len(lengths) * i // most] for i in range(most)})
        return cls(tuple(lengths), encoder.cls_id, encoder.sep_id, encoder.mask_id)

    def save(self, folder: Path) -> None:
        """Write it beside the weights of a model."""
        (folder / TEMPLATE).write_text(json.dumps(self._asdict()), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Template:
        """Read what :meth:`save` wrote; raises ConfigError if it cannot be read."""
        try:
            saved = json.loads((folder / TEMPLATE).read_text(encoding="utf-8"))
            return cls(tuple(saved["lengths"]), saved["cls_id"], saved["sep_id"], saved["mask_id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"template of captions {folder / TEMPLATE} cannot be read: {error}") from None

    def hidden_captions(self, length: int, batch: int, device: torch.device) -> Tensor:
        """(batch, length + 2) int64: [CLS] [MASK] ... [SEP]."""
        row = torch.full((length + 2,), self.mask_id, device=device)
        row[0], row[-1] = self.cls_id, self.sep_id
        return row.expand(batch, -1)


class HiddenWords(NamedTuple):
    """What a caption of N hidden words is expected to say of an image."""

    class_state: Tensor
    """(B, D) of the caption's [CLS]."""
    states: Tensor
    """(B, N, D) that are multiplied by the embeddings of words."""
    log_partition: Tensor
    """(B, N, 1) fp32, logarithm of the sum over all words."""
    moe: tuple[MoEOutput, ...]
    num_tokens: int
    """That entered the backbone on this rank."""


def inner_words(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, L) int64, (B, L) bool -> (B, L) bool: neither special token nor padding."""
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (place > 0) & (place < attention_mask.sum(dim=1, keepdim=True) - 1)


class WordHead(nn.Module):
    """The text head of pre-training; tasks add what is theirs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.text_head = TextHead(config.model)


class WordModel(nn.Module):
    """What models that read masked words share.

    Args:
        config: with `task`.
        moe_cls: makes the MoE of a layer.
        template: of the captions.
    """

    head: WordHead

    def __init__(self, config: Config, moe_cls: MoEFactory, template: Template) -> None:
        super().__init__()
        self.backbone = Backbone(config.model, moe_cls)
        self.visible_patches = VisiblePatches(config)
        self.template = template

    def hidden_words(self, pixel_values: Tensor, length: int) -> HiddenWords:
        """Images (B, 3, H, W), each beside a caption of `length` hidden words."""
        captions = self.template.hidden_captions(length, len(pixel_values), pixel_values.device)
        encoded = self.backbone(pixel_values, captions, visible_patch_ids=self.visible_patches(pixel_values))
        text = encoded.stream.padded()[:, encoded.num_image_tokens :]
        states = self.head.text_head(text[:, 1 : 1 + length])
        log_partition = self.word_logits(states).logsumexp(dim=-1, keepdim=True)
        return HiddenWords(text[:, 0], states, log_partition, encoded.moe, encoded.stream.hidden_states.shape[0])

    def word_logits(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., V) fp32."""
        return F.linear(states, self.backbone.text_embedding.word.weight, self.head.text_head.bias).float()

    def words(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(..., ) int64 -> what states are multiplied with, (..., D), and what is added, (..., 1); both fp32."""
        embedding = self.backbone.text_embedding.word(input_ids).float()
        return embedding, self.head.text_head.bias[input_ids].float()[..., None]


class RetrievalWordHead(WordHead):
    """With a temperature, which is 1 where likelihoods are meant as they are."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.log_temperature = nn.Parameter(torch.zeros(1))


class WordRetrievalModel(WordModel):
    """Features by masked words; has the methods of :class:`eve_ds.tasks.pair_models.PairScorer`.

    Args:
        config: with `task`.
        moe_cls: makes the MoE of a layer.
        template: of the captions.
        centred: whether an image's features count by how they differ from those of all candidates. Without it likely
            and short captions come first for any image; contrastive training teaches that by itself.
    """

    def __init__(self, config: Config, moe_cls: MoEFactory, template: Template, centred: bool) -> None:
        super().__init__(config, moe_cls, template)
        self.head: RetrievalWordHead = RetrievalWordHead(config)
        self.centred = centred

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, targets: Tensor
    ) -> RetrievalOutput:
        """Training: (B, 1, 3, H, W), (B, L), (B, L), and (B,) int64 numbers that are equal for the same image.

        A collective: all ranks bring B samples.
        """
        pixel_values = pixel_values.squeeze(1)
        passes = [self.hidden_words(pixel_values, length) for length in self.template.lengths]
        images = _features(passes)
        texts = self.text_features(input_ids, attention_mask)
        scale = (-self.head.log_temperature.float()).exp()
        logits = contrastive_logits(images, texts, scale, targets)
        moe = tuple(layer for words in passes for layer in words.moe)
        return RetrievalOutput(*logits, None, None, moe, sum(words.num_tokens for words in passes))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, (D + 2) * sum of lengths) fp32: state, 1 and -log Z of every place."""
        return _features([self.hidden_words(pixel_values, length) for length in self.template.lengths])

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64, (B, L) bool -> (B, (D + 2) * sum of lengths) fp32: embedding, bias and 1 of every word."""
        lengths = self.template.lengths
        num_words = attention_mask.sum(dim=1).sub(2).clamp(0, lengths[-1])
        chosen = torch.bucketize(num_words, torch.tensor(lengths, device=num_words.device))
        parts = []
        for number, length in enumerate(lengths):
            words = F.pad(input_ids, (0, max(0, length + 1 - input_ids.shape[1])))[:, 1 : length + 1]
            place = torch.arange(length, device=words.device)
            there = (place < num_words[:, None]) & (chosen == number)[:, None]
            embedding, bias = self.words(words)
            own = torch.cat([embedding, bias, torch.ones_like(bias)], dim=-1)
            parts.append((own * there[..., None]).flatten(1))
        return torch.cat(parts, dim=1)

    def match_logits(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pairs (B, 3, H, W), (B, L), (B, L) -> (B,) fp32 sum of every word's log-likelihood beside other words.

        A word is judged in the one of PASSES forwards that hides it.
        """
        hideable = inner_words(input_ids, attention_mask)
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        found = torch.zeros(input_ids.shape, device=input_ids.device)
        for turn in range(PASSES):
            hidden = hideable & (place % PASSES == turn)
            encoded = self.backbone(
                pixel_values,
                input_ids.masked_fill(hidden, self.template.mask_id),
                attention_mask,
                visible_patch_ids=self.visible_patches(pixel_values),
            )
            states = encoded.stream.padded()[:, encoded.num_image_tokens :][hidden]
            logits = self.word_logits(self.head.text_head(states))
            likelihood = -F.cross_entropy(logits, input_ids[hidden], reduction="none")
            found = found.masked_scatter(hidden, likelihood)
        return found.sum(dim=1)


def _features(passes: list[HiddenWords]) -> Tensor:
    """(B, (D + 2) * sum of lengths): what :meth:`WordRetrievalModel.text_features` is multiplied with."""
    parts = []
    for words in passes:
        own = [words.states.float(), torch.ones_like(words.log_partition), -words.log_partition]
        parts.append(torch.cat(own, dim=-1).flatten(1))
    return torch.cat(parts, dim=1)
