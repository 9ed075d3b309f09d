"""Loss terms, denominators and cost of a pre-training step over all objectives.

Every term of masked modeling is a sum over this rank's micro-batch divided by a count over the whole optimizer step, so
that any split of a global batch over ranks and micro-steps has the same gradient. Contrastive and matching losses are
means over pairs, whose negatives depend on the split; see :mod:`eve_ds.objectives.contrastive`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eve_ds.config import MaskingConfig, ModelConfig
from eve_ds.data.batch import Batch
from eve_ds.objectives.objective import TOKENS, Counts, Gather, only_this_rank
from eve_ds.objectives.registry import objectives_of
from eve_ds.objectives.router import view_router_losses
from eve_ds.views import views_of

if TYPE_CHECKING:
    from eve_ds.model.eve import EVEOutput


def pretraining_losses(
    output: EVEOutput,
    targets: Mapping[str, Any],
    counts: Counts,
    config: ModelConfig,
    gather: Gather = only_this_rank,
) -> dict[str, Tensor]:
    """Compute loss terms by name, each () fp32; a term is absent if the batch lacks its modality.

    Args:
        output: predictions of :class:`eve_ds.model.eve.EVE`.
        targets: targets of the predictions, as :meth:`eve_ds.data.batch.Batch.targets` returns them.
        counts: denominators, as :func:`count` returns them; see :meth:`eve_ds.objectives.objective.Objective.losses`.
        config: architecture and objectives.
        gather: function that collects the pairs of all ranks for the contrastive loss.

    Returns:
        Terms of the objectives, and `load_balancing` and `router_z` of :mod:`eve_ds.objectives.router`.
    """
    terms: dict[str, Tensor] = {}
    for objective in objectives_of(config):
        terms |= objective.losses(output, targets, counts, config, gather)
    return terms | view_router_losses(output.moe, counts[TOKENS])


def count(batch: Batch, config: ModelConfig) -> dict[str, float]:
    """Compute denominators of the loss terms of one micro-batch on the host; their names depend on `config` alone."""
    counts: dict[str, float] = {}
    for objective in objectives_of(config):
        counts |= objective.counts(batch)
    return counts | {TOKENS: sum(encoder_tokens(batch, config).values())}


def encoder_tokens(batch: Batch, config: ModelConfig) -> dict[str, float]:
    """Count the tokens that enter the encoder, class tokens included, by view."""
    tokens = {view: float(layout.mask.sum()) for view, layout in (batch.layouts or {}).items()}
    for objective in objectives_of(config):
        tokens |= objective.late_tokens(tokens)
    return tokens


def view_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of the views that a batch of images with captions has before the forward."""
    pairs = {"pixel_values": torch.zeros(1, 3, 1, 1), "input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    return tuple(views_of(objectives_of(config), pairs))


def caption_tokens(batch: Batch) -> float:
    """Count the real tokens of the captions, [CLS] and [SEP] included."""
    return 0.0 if batch.attention_mask is None else float(batch.attention_mask.sum())


def pretraining_flops(config: ModelConfig, masking: MaskingConfig, text_tokens: float) -> float:
    """Compute the FLOPs of one pair's forward in all views, two per multiply-add; a step costs three forwards.

    The count includes matrix products of the encoder (top-k experts in MoE layers), attention scores, pixel decoder and
    vocabulary head. It leaves out norms, activations, embeddings and the heads of `itc` and `itm`, as is usual for
    model FLOP/s utilization. `text_tokens` is the mean length of a caption, [CLS] and [SEP] included.
    """
    return 2 * sum(objective.forward_macs(config, masking, text_tokens) for objective in objectives_of(config))
