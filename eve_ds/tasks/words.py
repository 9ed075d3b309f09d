"""Retrieval by masked words: how likely a caption is, word by word, as a dot product.

Masked signal modelling has no head that compares an image with a caption, but it tells how likely a word is at each
place of a caption that is hidden altogether. The logarithm of a caption's likelihood is then

    sum over places n of  state_n . embedding(word_n) + bias(word_n) - log Z_n

where states and log Z come from the image alone, embedding and bias from the caption alone. A gallery of N images and
any number of captions costs N forwards of the backbone, and pre-training pays nothing. What the words say of each
other is lost by hiding them together; the best candidates are ordered again by the likelihood of each word beside half
of the others (Salazar et al., "Masked Language Model Scoring", ACL 2020).

The same features can be fine-tuned by contrast; captions then cost next to nothing. They are long: D + 2 numbers for
every place of every length, 0.1 MB for a caption of up to 38 words at the width of EVE-Base.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import Config, ConfigError
from eve_ds.data.collate import CaptionEncoder
from eve_ds.model.decoders import TextHead
from eve_ds.model.eve import Backbone, MoEFactory
from eve_ds.model.moe import MoEOutput
from eve_ds.tasks.encoder import VisiblePatches
from eve_ds.tasks.pair_models import RetrievalOutput, contrastive_logits

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

    def hidden_captions(self, length: int, batch: int, device: torch.device) -> Tensor:
        """(batch, length + 2) int64: [CLS] [MASK] ... [SEP]."""
        row = torch.full((length + 2,), self.mask_id, device=device)
        row[0], row[-1] = self.cls_id, self.sep_id
        return row.expand(batch, -1)


class WordHead(nn.Module):
    """The text head of pre-training, and a temperature, which is 1 where likelihoods are meant as they are."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.text_head = TextHead(config.model)
        self.log_temperature = nn.Parameter(torch.zeros(1))


class WordRetrievalModel(nn.Module):
    """Features by masked words; has the methods of :class:`eve_ds.tasks.pair_models.PairScorer`.

    Args:
        config: with `task`.
        moe_cls: makes the MoE of a layer.
        template: of the captions.
        centred: whether an image's features count by how they differ from those of all candidates. Without it likely
            and short captions come first for any image; contrastive training teaches that by itself.
    """

    def __init__(self, config: Config, moe_cls: MoEFactory, template: Template, centred: bool) -> None:
        super().__init__()
        self.backbone = Backbone(config.model, moe_cls)
        self.visible_patches = VisiblePatches(config)
        self.head = WordHead(config)
        self.template, self.centred = template, centred

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, targets: Tensor
    ) -> RetrievalOutput:
        """Training: (B, 1, 3, H, W), (B, L), (B, L), and (B,) int64 numbers that are equal for the same image.

        A collective: all ranks bring B samples.
        """
        pixel_values = pixel_values.squeeze(1)
        passes = [self._hidden_words(pixel_values, length) for length in self.template.lengths]
        images = torch.cat([features.flatten(1) for features, _, _ in passes], dim=1)
        texts = self.text_features(input_ids, attention_mask)
        scale = (-self.head.log_temperature.float()).exp()
        logits = contrastive_logits(images, texts, scale, targets)
        moe = tuple(layer for _, layers, _ in passes for layer in layers)
        return RetrievalOutput(*logits, None, None, moe, sum(tokens for _, _, tokens in passes))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, (D + 2) * sum of lengths) fp32: state, 1 and -log Z of every place."""
        lengths = self.template.lengths
        return torch.cat([self._hidden_words(pixel_values, length)[0].flatten(1) for length in lengths], dim=1)

    def _hidden_words(self, pixel_values: Tensor, length: int) -> tuple[Tensor, tuple[MoEOutput, ...], int]:
        """(B, length, D + 2), the MoE's outputs, and how many tokens were encoded."""
        captions = self.template.hidden_captions(length, len(pixel_values), pixel_values.device)
        encoded = self.backbone(pixel_values, captions, visible_patch_ids=self.visible_patches(pixel_values))
        first = encoded.num_image_tokens + 1
        states = self.head.text_head(encoded.stream.padded()[:, first : first + length])
        log_partition = self._logits(states).logsumexp(dim=-1, keepdim=True)
        features = [states.float(), torch.ones_like(log_partition), -log_partition]
        return torch.cat(features, dim=-1), encoded.moe, encoded.stream.hidden_states.shape[0]

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64, (B, L) bool -> (B, (D + 2) * sum of lengths) fp32: embedding, bias and 1 of every word."""
        lengths = self.template.lengths
        num_words = attention_mask.sum(dim=1).sub(2).clamp(0, lengths[-1])
        chosen = torch.bucketize(num_words, torch.tensor(lengths, device=num_words.device))
        embedding, bias = self.backbone.text_embedding.word, self.head.text_head.bias
        parts = []
        for number, length in enumerate(lengths):
            words = F.pad(input_ids, (0, max(0, length + 1 - input_ids.shape[1])))[:, 1 : length + 1]
            place = torch.arange(length, device=words.device)
            there = (place < num_words[:, None]) & (chosen == number)[:, None]
            own = [embedding(words).float(), bias[words].float()[..., None], torch.ones_like(words)[..., None].float()]
            parts.append((torch.cat(own, dim=-1) * there[..., None]).flatten(1))
        return torch.cat(parts, dim=1)

    def match_logits(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pairs (B, 3, H, W), (B, L), (B, L) -> (B,) fp32 sum of every word's log-likelihood beside other words."""
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        inner = (place > 0) & (place < attention_mask.sum(dim=1, keepdim=True) - 1)
        total = torch.zeros(len(input_ids), device=input_ids.device)
        for turn in range(PASSES):
            hidden = inner & (place % PASSES == turn)
            encoded = self.backbone(pixel_values, input_ids.masked_fill(hidden, self.template.mask_id), attention_mask)
            states = encoded.stream.padded()[:, encoded.num_image_tokens :][hidden]
            logits = self._logits(self.head.text_head(states))
            likelihood = -F.cross_entropy(logits, input_ids[hidden], reduction="none")
            total = total.index_add(0, hidden.nonzero()[:, 0], likelihood)
        return total

    def _logits(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., V) fp32."""
        return F.linear(states, self.backbone.text_embedding.word.weight, self.head.text_head.bias).float()
