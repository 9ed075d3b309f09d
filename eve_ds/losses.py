"""Named loss terms of masked signal modelling and their weighted sum.

Every term is a sum over this rank's micro-batch divided by a count over the whole optimiser step, so that any split of
a global batch over ranks and micro-steps has the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eve_ds import ops
from eve_ds.config import LossConfig
from eve_ds.model.eve import EVEOutput
from eve_ds.model.moe import MoEOutput


class Counts(NamedTuple):
    """What loss terms are averaged over: of one micro-batch, or summed over a step."""

    masked_patches: float
    masked_tokens: float
    tokens: float
    """Tokens that enter the encoder, class tokens included."""


def pretraining_losses(
    output: EVEOutput,
    *,
    pixel_values: Tensor | None,
    image_mask: Tensor | None,
    masked_patch_ids: Tensor | None,
    token_labels: Tensor | None,
    patch_size: int,
    counts: Counts,
) -> dict[str, Tensor]:
    """Loss terms by name, each () fp32; a term whose modality is absent is absent.

    Args:
        output: of :class:`eve_ds.model.eve.EVE`.
        pixel_values: (B, 3, H, W); image_mask: (B,) bool or None; masked_patch_ids: (B, N_masked) int64.
        token_labels: (M,) int64.
        patch_size: pixels of a patch's side.
        counts: denominators. With R ranks and A micro-steps whose gradients are averaged, pass the totals divided by
            R * A; then the average of the gradients is the gradient of the mean over everything.
    """
    terms: dict[str, Tensor] = {}
    if output.pixel_predictions is not None and pixel_values is not None and masked_patch_ids is not None:
        per_patch = ops.masked_pixel_loss(pixel_values, output.pixel_predictions, masked_patch_ids, patch_size)
        if image_mask is not None:
            per_patch = per_patch * image_mask.unsqueeze(1)
        terms["pixel"] = per_patch.sum() / max(counts.masked_patches, 1.0)
    if output.token_hidden is not None and token_labels is not None:
        total = ops.linear_cross_entropy(
            output.token_hidden, output.vocabulary_weight, output.vocabulary_bias, token_labels
        )
        terms["text"] = total / max(counts.masked_tokens, 1.0)
    return terms | router_losses(output.moe, counts.tokens)


def router_losses(moe: Sequence[MoEOutput], tokens: float) -> dict[str, Tensor]:
    """Load-balancing and z loss, each () fp32 and the mean over layers; nothing where there is no layer.

    Args:
        moe: one per MoE layer.
        tokens: that the z loss is averaged over.
    """
    if not moe:
        return {}
    balance = torch.stack([layer.load_balancing_loss for layer in moe]).mean()
    z_sum = torch.stack([layer.router_z_sum for layer in moe]).mean()
    return {"load_balancing": balance, "router_z": z_sum / max(tokens, 1.0)}


def total_loss(terms: dict[str, Tensor], weights: LossConfig) -> Tensor:
    """Weighted sum of the terms that are present, () fp32."""
    weight = {
        "pixel": weights.pixel_weight,
        "text": weights.text_weight,
        "load_balancing": weights.load_balancing_weight,
        "router_z": weights.router_z_weight,
    }
    return torch.stack([weight[name] * term for name, term in terms.items() if weight[name] > 0]).sum()
