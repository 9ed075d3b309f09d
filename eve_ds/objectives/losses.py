"""Named loss terms of pre-training and their weighted sum.

Every term of masked modeling is a sum over this rank's micro-batch divided by a count over the whole optimizer
step, so that any split of a global batch over ranks and micro-steps has the same gradient. Contrastive and matching
losses are means over pairs, of which every micro-batch has as many; what they compare a pair with depends on the split:
see :func:`contrastive_loss` and :func:`matching_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds import ops
from eve_ds.config import LossConfig
from eve_ds.model.eve import EVEOutput
from eve_ds.model.matching import MatchingOutput
from eve_ds.model.moe import MoEOutput

Gather = Callable[[Tensor], tuple[Tensor, int]]
"""(B, D) -> the rows of all ranks with gradients, and the number of this rank's first among them."""


class Counts(NamedTuple):
    """What loss terms are averaged over: of one micro-batch, or summed over a step."""

    masked_patches: float
    masked_tokens: float
    tokens: float
    """Tokens that enter the encoder, class tokens included; those that enter it several times, as often."""


def only_this_rank(rows: Tensor) -> tuple[Tensor, int]:
    """The :data:`Gather` of a single process."""
    return rows, 0


def pretraining_losses(
    output: EVEOutput,
    *,
    pixel_values: Tensor | None,
    image_mask: Tensor | None,
    masked_patch_ids: Tensor | None,
    token_labels: Tensor | None,
    patch_size: int,
    counts: Counts,
    normalize_pixels: bool,
    gather: Gather = only_this_rank,
) -> dict[str, Tensor]:
    """Loss terms by name, each () fp32; a term whose modality is absent is absent.

    Args:
        output: of :class:`eve_ds.model.eve.EVE`.
        pixel_values: (B_i, 3, H, W) of the image view's samples; image_mask: (B_i,) bool, False = no image, or None;
            masked_patch_ids: (B_i, N_masked) int64.
        token_labels: (M,) int64.
        patch_size: pixels of a patch's side.
        counts: denominators, 0 where there is nothing to predict. With R ranks and A micro-steps whose gradients are
            averaged, pass the totals divided by R * A, which may be less than 1.
        normalize_pixels: compare pixels normalized by patch instead of raw ones.
        gather: the contrastive loss compares with the pairs of all ranks that this gives.

    Returns:
        `mim`: squared error per masked patch. `mlm`: cross entropy per masked token. `itc`, `itm`: see
        :func:`contrastive_loss` and :func:`matching_loss`. `load_balancing` and `router_z`: see :func:`router_losses`.
    """
    terms: dict[str, Tensor] = {}
    if output.pixel_predictions is not None and pixel_values is not None and masked_patch_ids is not None:
        per_patch = ops.masked_pixel_loss(
            pixel_values, output.pixel_predictions, masked_patch_ids, patch_size, normalize=normalize_pixels
        )
        if image_mask is not None:
            per_patch = per_patch * image_mask.unsqueeze(1)
        terms["mim"] = per_patch.sum() / (counts.masked_patches or 1.0)
    if output.token_hidden is not None and token_labels is not None:
        total = ops.linear_cross_entropy(
            output.token_hidden, output.vocabulary_weight, output.vocabulary_bias, token_labels
        )
        terms["mlm"] = total / (counts.masked_tokens or 1.0)
    if output.matching is not None:
        terms["itc"] = contrastive_loss(output.matching, gather)
        if output.matching.logits is not None:
            terms["itm"] = matching_loss(output.matching.logits)
    return terms | view_router_losses(output.moe, counts.tokens)


def view_router_losses(moe: Mapping[str, Sequence[MoEOutput]], tokens: float) -> dict[str, Tensor]:
    """Load-balancing and z loss over the views of a step, each () fp32; nothing where there is no layer.

    Each view is balanced for itself, and the views that have tokens are averaged: without tokens the loss is 0, with
    any it is above. `tokens` are those of all views.
    """
    by_view = [router_losses(layers, tokens) for layers in moe.values() if layers]
    if not by_view:
        return {}
    balances = torch.stack([terms["load_balancing"] for terms in by_view])
    balance = balances.sum() / (balances.detach() > 0).sum().clamp(min=1)
    return {"load_balancing": balance, "router_z": torch.stack([terms["router_z"] for terms in by_view]).sum()}


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
    return {"load_balancing": balance, "router_z": z_sum / (tokens or 1.0)}


def contrastive_loss(matching: MatchingOutput, gather: Gather = only_this_rank) -> Tensor:
    """Mean of image-to-text and text-to-image cross entropy over this rank's pairs, () fp32 (CLIP section 2.3).

    A pair's negatives are all other pairs of the global micro-batch, the micro-batches of one micro-step on all ranks.
    How that is split over ranks makes no difference; gradient accumulation splits it, and makes the task easier.
    """
    width = matching.image_features.shape[1]
    everyone, first = gather(torch.cat([matching.image_features, matching.text_features], dim=1))
    images, texts = everyone.split(width, dim=1)  # (R * B, D) each
    own = torch.arange(first, first + len(matching.image_features), device=everyone.device)
    image_to_text = F.cross_entropy(matching.image_features @ texts.t() / matching.temperature, own)
    text_to_image = F.cross_entropy(matching.text_features @ images.t() / matching.temperature, own)
    return (image_to_text + text_to_image) / 2


def matching_loss(logits: Tensor) -> Tensor:
    """Cross entropy of match or not, mean over pairs and two hard negatives for each, () fp32 (ALBEF section 3.2).

    `logits` are the (3 * B, 2) of :class:`eve_ds.model.matching.MatchingOutput`. Their negatives were drawn from the
    pairs of this rank's micro-batch, so another split draws others.
    """
    matched = torch.arange(len(logits), device=logits.device) < len(logits) // 3
    return F.cross_entropy(logits, matched.long())


def total_loss(terms: dict[str, Tensor], weights: LossConfig) -> Tensor:
    """Weighted sum of the terms that are present, () fp32."""
    weight = {
        "mim": weights.mim_weight,
        "mlm": weights.mlm_weight,
        "itc": weights.itc_weight,
        "itm": weights.itm_weight,
        "load_balancing": weights.load_balancing_weight,
        "router_z": weights.router_z_weight,
    }
    return torch.stack([weight[name] * term for name, term in terms.items() if weight[name] > 0]).sum()
