"""Image-text contrastive learning (ITC) and matching (ITM) as of ALBEF (Li et al., 2021) without its momentum encoder:
heads, and the choice of hard negatives.

The encoder is EVE's own, for one modality as for both: nothing of a pass over images or texts alone can serve the
fusion, so a hard negative is encoded anew.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import ModelConfig
from eve_ds.views import TEXT, Layout

INITIAL_TEMPERATURE, LOWEST_TEMPERATURE = 0.07, 0.01
"""CLIP (Radford et al., 2021) section 2.5: similarities are multiplied by at most 100."""


class MatchingOutput(NamedTuple):
    """Predictions of ITC and ITM for B pairs."""

    image_features: Tensor
    """(B, D) fp32 of norm 1."""
    text_features: Tensor
    """(B, D) fp32 of norm 1."""
    temperature: Tensor
    """() fp32."""
    logits: Tensor | None
    """(3 * B, 2) fp32, no match and match: of the pairs, of texts beside a hard negative image, of images beside a hard
    negative text. None without the task `itm`."""


class Pairs(NamedTuple):
    """B images, and as many texts: row i of both belongs together."""

    pixel_values: Tensor
    """(B, 3, H, W)."""
    image_mask: Tensor
    """(B,) bool; False only where a rank without samples runs along."""
    input_ids: Tensor
    """(B, L) int64."""
    attention_mask: Tensor
    """(B, L) bool."""

    @classmethod
    def of(
        cls,
        pixel_values: Tensor | None,
        image_mask: Tensor | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
    ) -> Pairs:
        """Masks may be None for all True.

        Raises:
            ValueError: no images or no texts.
        """
        if pixel_values is None or input_ids is None:
            raise ValueError("contrastive and matching losses need pairs of an image and a text")
        if image_mask is None:
            image_mask = torch.ones(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        return cls(pixel_values, image_mask, input_ids, attention_mask)

    def with_negatives(self, image_ids: Tensor, text_ids: Tensor) -> Pairs:
        """3 * B rows: these pairs, every text with image `image_ids` (B,), every image with text `text_ids` (B,)."""
        own = torch.arange(len(image_ids), device=image_ids.device)
        images, texts = torch.cat([own, image_ids, own]), torch.cat([own, own, text_ids])
        return Pairs(
            self.pixel_values[images], self.image_mask[images], self.input_ids[texts], self.attention_mask[texts]
        )


def layout_of_negatives(pairs: Pairs, texts: Layout, num_image_positions: int, keep_padding: bool) -> Layout:
    """Where the tokens of the 3 * B rows of :meth:`Pairs.with_negatives` stand; the host waits for nothing.

    How many words the drawn texts have is known to the device alone: each gets as many places as the longest text has.

    Args:
        pairs: those rows.
        texts: layout of the B texts by themselves.
        num_image_positions: class token and patches of an image.
        keep_padding: see :meth:`eve_ds.views.Layout.of`.
    """
    batch, length = texts.mask.shape
    images = torch.ones(3 * batch, num_image_positions, dtype=torch.bool, device=texts.mask.device)
    drawn = (torch.arange(length, device=texts.mask.device) < texts.longest).expand(batch, -1)
    mask = torch.cat([images & pairs.image_mask.unsqueeze(1), pairs.attention_mask.bool()], dim=1)
    present = torch.cat([images, torch.cat([texts.mask, texts.mask, drawn])], dim=1)
    sizes = (images.numel(), 2 * texts.sizes[TEXT] + batch * texts.longest)
    if keep_padding:
        return Layout.of(mask, num_image_positions, keep_padding=True)
    longest = num_image_positions + texts.longest
    return Layout.of(mask, num_image_positions, present=present, sizes=sizes, longest=longest)


class MatchingHeads(nn.Module):
    """Projections of the class token and of [CLS] (bias-free, D to D), a temperature, and for `itm` a classifier."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.image_projection = nn.Linear(width, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        # Its logarithm, so that one update changes it by a share of itself; (1,), as DeepSpeed sends no scalars.
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(INITIAL_TEMPERATURE)))
        self.classifier = nn.Linear(width, 2) if "itm" in config.objectives else None

    def temperature(self) -> Tensor:
        """() fp32."""
        return self.log_temperature.float().clamp(min=math.log(LOWEST_TEMPERATURE)).exp().squeeze(0)

    def image_features(self, class_states: Tensor) -> Tensor:
        """(B, D) states of class tokens -> (B, D) fp32 of norm 1."""
        return F.normalize(self.image_projection(class_states).float(), dim=-1)

    def text_features(self, cls_states: Tensor) -> Tensor:
        """(B, D) states of [CLS] -> (B, D) fp32 of norm 1."""
        return F.normalize(self.text_projection(cls_states).float(), dim=-1)


@torch.no_grad()
def draw_hard_negatives(image_features: Tensor, text_features: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a wrong partner for every image and every text, the likelier the more similar it is.

    Probabilities are ITC's, the softmax of similarity over temperature, without the pair itself (ALBEF section 3.2).
    Draws from torch's default generator of the device.

    Args:
        image_features, text_features: (B, D) of norm 1, B at least 2; row i of both is pair i.
        temperature: ().

    Returns:
        image_ids (B,) int64: an image for every text; text_ids (B,) int64: a text for every image.

    Raises:
        ValueError: a single pair, for which there is no negative.
    """
    if len(image_features) < 2:
        raise ValueError("hard negatives need at least two pairs of an image and a text")
    logits = (image_features @ text_features.t() / temperature).fill_diagonal_(-math.inf)
    text_ids = _draw(logits.softmax(dim=1))
    image_ids = _draw(logits.softmax(dim=0).t())
    return image_ids, text_ids


def _draw(probabilities: Tensor) -> Tensor:
    """(B, N) -> (B,) int64, one of N by its probability, as `torch.multinomial`, which makes the host wait."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=1)
