"""Retrieval by masked words: image features and caption features whose dot product is a log-likelihood.

A gallery of N images costs N forward passes per caption length of the template, whatever the number of captions.
Pre-training needs no extra objective. Hiding all words together loses the dependence of the words on each other; the
best candidates are therefore ordered again by the likelihood of each word beside half of the others (Salazar et al.,
"Masked Language Model Scoring", ACL 2020). The features need no fine-tuning, but can be fine-tuned by contrast, where
captions cost next to nothing. They are long: D + 2 numbers for every place of every length, 0.1 MB for a caption of up
to 38 words at the width of EVE-Base.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import Config
from eve_ds.model.eve import MoEFactory
from eve_ds.tasks.features.words import HiddenWords, Template, WordHead, WordModel, inner_words
from eve_ds.tasks.retrieval.pair_models import RetrievalOutput, contrastive_logits

PASSES = 2
"""Forwards of a pair when candidates are ordered again; each hides one in two words."""


class RetrievalWordHead(WordHead):
    """Text head with a learned temperature, which starts at 1, so that likelihoods are initially unscaled.

    Args:
        config: configuration with `model`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.log_temperature = nn.Parameter(torch.zeros(1))


class WordRetrievalModel(WordModel):
    """Features by masked words; a :class:`eve_ds.tasks.retrieval.pair_models.PairScorer`.

    Args:
        config: configuration with `model` and `task`.
        moe_cls: makes the MoE of a layer.
        template: lengths and special tokens of the hidden captions.
        centered: whether the mean over all candidates is subtracted from an image's features. Without it, likely and
            short captions come first for every image; contrastive training corrects that by itself.
    """

    matching = False

    def __init__(self, config: Config, moe_cls: MoEFactory, template: Template, centered: bool) -> None:
        super().__init__(config, moe_cls, template)
        self.head: RetrievalWordHead = RetrievalWordHead(config)
        self.centered = centered
        self.tp_size = config.parallel.tp_size

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, targets: Tensor
    ) -> RetrievalOutput:
        """Similarities; see :meth:`eve_ds.tasks.retrieval.pair_models.PairScorer.forward`."""
        pixel_values = pixel_values.squeeze(1)
        passes = [self.hidden_words(pixel_values, length) for length in self.template.lengths]
        images = _features(passes)
        texts = self.text_features(input_ids, attention_mask)
        scale = (-self.head.log_temperature.float()).exp()
        logits = contrastive_logits(images, texts, scale, targets, self.tp_size)
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
        """Pairs (B, 3, H, W), (B, L), (B, L) -> (B,) fp32 sums of the log-likelihood of each word beside the others.

        A word is scored in the one of PASSES forwards that hides it.
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
    """(B, (D + 2) * sum of lengths), the factors of :meth:`WordRetrievalModel.text_features` in the dot product."""
    parts = []
    for words in passes:
        own = [words.states.float(), torch.ones_like(words.log_partition), -words.log_partition]
        parts.append(torch.cat(own, dim=-1).flatten(1))
    return torch.cat(parts, dim=1)
