"""Pairs of an image and a text, and their combination with hard negatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eve_ds.views import TEXT, Layout


class Pairs(NamedTuple):
    """B images and B texts; image i and text i belong together."""

    pixel_values: Tensor
    """(B, 3, H, W)."""
    image_mask: Tensor
    """(B,) bool; False only on a rank without samples, which still takes part in the collectives."""
    input_ids: Tensor
    """(B, L) int64."""
    attention_mask: Tensor
    """(B, L) bool."""

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Pairs:
        """Build pairs from keyword arguments of `EVE.forward`; a mask that is absent or None is all True.

        Raises:
            ValueError: no images or no texts.
        """
        pixel_values, input_ids = inputs.get("pixel_values"), inputs.get("input_ids")
        if pixel_values is None or input_ids is None:
            raise ValueError("contrastive and matching losses need pairs of an image and a text")
        image_mask, attention_mask = inputs.get("image_mask"), inputs.get("attention_mask")
        if image_mask is None:
            image_mask = torch.ones(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        return cls(pixel_values, image_mask, input_ids, attention_mask)

    def with_negatives(self, image_ids: Tensor, text_ids: Tensor) -> Pairs:
        """Return 3 * B rows: these pairs, texts with images `image_ids` (B,), images with texts `text_ids` (B,)."""
        own = torch.arange(len(image_ids), device=image_ids.device)
        images, texts = torch.cat([own, image_ids, own]), torch.cat([own, own, text_ids])
        return Pairs(
            self.pixel_values[images], self.image_mask[images], self.input_ids[texts], self.attention_mask[texts]
        )


def layout_of_negatives(pairs: Pairs, texts: Layout, num_image_positions: int, keep_padding: bool) -> Layout:
    """Lay out the tokens of the 3 * B rows of :meth:`Pairs.with_negatives` without a host sync.

    Only the device knows how many words the drawn texts have, so each gets as many places as the longest text.

    Args:
        pairs: the 3 * B rows.
        texts: layout of the B texts alone.
        num_image_positions: number of class token and patches of an image.
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
