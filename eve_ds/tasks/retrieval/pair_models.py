"""Models of image-text retrieval: features of images and texts, logits of pairs.

Li et al., ALBEF (NeurIPS 2021), sections 3.2 and 4, with one backbone for images, texts and pairs.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import Config
from eve_ds.distributed import gather_rows
from eve_ds.model.eve import Backbone, MoEFactory
from eve_ds.model.moe import MoEOutput
from eve_ds.objectives.contrastive import IGNORED, GlobalPairs, draw_hard_negatives
from eve_ds.tasks.features.class_token import VisiblePatches, image_class_states, sum_outputs, text_class_states
from eve_ds.tasks.task import task_section


class PairScorer(Protocol):
    """Model for retrieval: features that are compared by their dot product, and logits of pairs for re-ranking."""

    centered: bool
    """Whether the mean over all candidates is subtracted from the features of images."""
    matching: bool
    """Whether training computes pairs for ITM (three fifths of its cost), so that `match_logits` are log odds."""

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, targets: Tensor
    ) -> RetrievalOutput:
        """Similarities and pairs of one training step; a collective to which every rank brings B samples.

        Args:
            pixel_values: (B, 1, 3, H, W).
            input_ids: (B, L) int64.
            attention_mask: (B, L) bool.
            targets: (B,) int64, equal for captions of the same image.
        """

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, F) fp32."""

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64, (B, L) bool -> (B, F) fp32."""

    def match_logits(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pairs (B, 3, H, W), (B, L), (B, L) -> (B,) fp32, larger for a better match."""


class RetrievalOutput(NamedTuple):
    """Output of one training forward."""

    image_logits: Tensor
    """(B, G) similarity of this rank's images to all ranks' texts, divided by the temperature."""
    text_logits: Tensor
    """(B, G) similarity of this rank's texts to all ranks' images, divided by the temperature."""
    same: Tensor
    """(B, G) bool, True where image and text belong to the same image."""
    matching_logits: Tensor | None
    """(3 B, 2) logits of true pairs, then of every image with a wrong text, then of every text with a wrong image; None
    without ITM."""
    matching_labels: Tensor | None
    """(3 B,) int64: 1 = true pair, 0 = wrong pair, IGNORED where there was no wrong partner in the batch."""
    moe: tuple[MoEOutput, ...]
    num_tokens: int


class RetrievalHead(nn.Module):
    """Projections for the dot product, learned temperature, and classifier of pairs.

    Args:
        width: D, width of the backbone.
        temperature: initial temperature of the contrastive loss.
    """

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.image_projection = nn.Linear(width, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))
        self.matching = nn.Linear(width, 2)


class RetrievalModel(nn.Module):
    """Retrieval with one backbone for images alone, texts alone and pairs; a :class:`PairScorer`.

    Args:
        config: configuration with `model` and `task`.
        moe_cls: makes the MoE of a layer.
    """

    centered = False

    def __init__(self, config: Config, moe_cls: MoEFactory) -> None:
        super().__init__()
        self.backbone = Backbone(config.model, moe_cls)
        self.visible_patches = VisiblePatches(config)
        self.head = RetrievalHead(config.model.hidden_size, task_section(config).temperature)
        self.matching = task_section(config).itm_weight > 0
        self.tp_size = config.parallel.tp_size

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, targets: Tensor
    ) -> RetrievalOutput:
        """Similarities, and pairs unless `task.itm_weight` is 0; see :meth:`PairScorer.forward`."""
        pixel_values = pixel_values.squeeze(1)
        image_pass = self.backbone(pixel_values, visible_patch_ids=self.visible_patches(pixel_values))
        text_pass = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        images = _unit(self.head.image_projection(image_class_states(image_pass)))
        texts = _unit(self.head.text_projection(text_class_states(text_pass)))
        scale = (-self.head.log_temperature.float()).exp()
        logits = contrastive_logits(images, texts, scale, targets, self.tp_size)
        if not self.matching:
            return RetrievalOutput(*logits, None, None, *sum_outputs((image_pass, text_pass)))
        same = targets.unsqueeze(1) == targets.unsqueeze(0)
        wrong_images, wrong_texts = draw_hard_negatives((scale * images @ texts.t()).detach(), same)
        paired_images = torch.cat([pixel_values, pixel_values, pixel_values[wrong_images]])
        pair_pass = self.backbone(
            paired_images,
            torch.cat([input_ids, input_ids[wrong_texts], input_ids]),
            torch.cat([attention_mask, attention_mask[wrong_texts], attention_mask]),
            visible_patch_ids=self.visible_patches(paired_images),
        )
        wrong = torch.where(same.all(dim=1), IGNORED, 0)
        return RetrievalOutput(
            *logits,
            self.head.matching(text_class_states(pair_pass)),
            torch.cat([torch.ones_like(wrong), wrong, wrong]),
            *sum_outputs((image_pass, text_pass, pair_pass)),
        )

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) fp32 of length 1."""
        return _unit(self.head.image_projection(image_class_states(self.backbone(pixel_values))))

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64, (B, L) bool -> (B, D) fp32 of length 1."""
        encoded = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        return _unit(self.head.text_projection(text_class_states(encoded)))

    def match_logits(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pairs (B, 3, H, W), (B, L), (B, L) -> (B,) fp32 log odds that they belong together."""
        encoded = self.backbone(pixel_values, input_ids, attention_mask)
        logits = self.head.matching(text_class_states(encoded)).float()
        return logits[:, 1] - logits[:, 0]


def contrastive_logits(
    images: Tensor, texts: Tensor, scale: Tensor, targets: Tensor, tp_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities over the global batch of G, and which of them are of one image; a collective.

    Args:
        images, texts: (B, F) fp32 features of this rank's samples.
        scale: () or (1,), one over the temperature.
        targets: (B,) int64, equal for the same image.
        tp_size: number of consecutive ranks with the same samples.

    Returns:
        (B, G) of images to texts, (B, G) of texts to images, (B, G) bool.
    """
    everyone = GlobalPairs.of(images, texts, partial(gather_rows, tp_size=tp_size))
    same = targets.unsqueeze(1) == gather_rows(targets, tp_size)[0].unsqueeze(0)
    return scale * images @ everyone.texts.t(), scale * texts @ everyone.images.t(), same


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)
