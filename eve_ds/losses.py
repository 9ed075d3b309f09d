"""Named loss terms of pre-training and their weighted sum.

Every term of masked signal modelling is a sum over this rank's micro-batch divided by a count over the whole optimiser
step, so that any split of a global batch over ranks and micro-steps has the same gradient. Contrastive and matching
losses are means over pairs, of which every micro-batch has as many; what they compare a pair with depends on the split:
see :func:`contrastive_loss` and :func:`matching_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    gather: Gather = only_this_rank,
) -> dict[str, Tensor]:
    """Loss terms by name, each () fp32; a term whose modality is absent is absent.

    Args:
        output: of :class:`eve_ds.model.eve.EVE`.
        pixel_values: (B, 3, H, W); image_mask: (B,) bool or None; masked_patch_ids: (B, N_masked) int64.
        token_labels: (M,) int64.
        patch_size: pixels of a patch's side.
        counts: denominators. With R ranks and A micro-steps whose gradients are averaged, pass the totals divided by
            R * A; then the average of the gradients is the gradient of the mean over everything.
        gather: of features over the ranks, each of which calls it once.
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
    if output.matching is not None:
        terms["itc"] = contrastive_loss(output.matching, gather)
        terms["itm"] = matching_loss(output.matching)
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


def matching_loss(matching: MatchingOutput) -> Tensor:
    """Cross entropy of match or not, mean over pairs and two hard negatives for each, () fp32 (ALBEF section 3.2).

    Negatives were drawn from the pairs of this rank's micro-batch, so another split draws others.
    """
    pairs = len(matching.image_features)
    matched = torch.arange(3 * pairs, device=matching.logits.device) < pairs
    return F.cross_entropy(matching.logits, matched.long())


def total_loss(terms: dict[str, Tensor], weights: LossConfig) -> Tensor:
    """Weighted sum of the terms that are present, () fp32."""
    weight = {
        "pixel": weights.pixel_weight,
        "text": weights.text_weight,
        "itc": weights.itc_weight,
        "itm": weights.itm_weight,
        "load_balancing": weights.load_balancing_weight,
        "router_z": weights.router_z_weight,
    }
    return torch.stack([weight[name] * term for name, term in terms.items() if weight[name] > 0]).sum()
