"""Losses on held-out pairs, which a run never trains on, with the right and with another sample's image or caption.

If a loss is the same with the wrong image or caption, the model does not use the image or caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from eve_ds import ops
from eve_ds.config import Config, ConfigError, ModelConfig
from eve_ds.data.batch import Batch
from eve_ds.data.collate import Collator
from eve_ds.data.held_out import held_out_pairs
from eve_ds.distributed import gather_objects
from eve_ds.evaluation.scenes import (
    SIDES,
    Tally,
    evaluation_config,
    nest,
    predict_masked,
    with_another_caption,
    with_another_image,
    with_whole_caption,
    with_whole_image,
)
from eve_ds.objectives.registry import objectives_of
from eve_ds.topology import Topology

if TYPE_CHECKING:
    import torch.distributed as dist

BATCH_SIZE = 64
"""Number of pairs in one forward pass."""


class HeldOut(NamedTuple):
    """Held-out pairs of this rank, in batches with fixed masks; all ranks have batches of the same number and sizes."""

    batches: Sequence[Batch]


def load_held_out(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    topology: Topology,
    group: dist.ProcessGroup | None = None,
) -> HeldOut:
    """Read this rank's share of the pairs of `data.validation`; collective over `group` (default: all ranks).

    Raises:
        ConfigError: see :func:`eve_ds.data.held_out.held_out_pairs`, or fewer than two usable pairs on some rank.
    """
    pairs = held_out_pairs(config, topology.data_rank, topology.data_size, group)
    usable = min(gather_objects(len(pairs), group))
    if usable < 2:
        raise ConfigError(
            f"data.validation leaves a rank with {usable} usable pairs, at least 2 are needed: hold out more"
        )
    fixed = evaluation_config(config)
    collate = Collator(fixed, tokenizer, objectives_of(fixed.model), has_images=True, has_captions=True)
    starts = range(0, usable - 1, BATCH_SIZE)  # a batch of one pair has no wrong partner
    return HeldOut([collate(pairs[start : min(start + BATCH_SIZE, usable)]) for start in starts])


@torch.no_grad()
def evaluate_held_out(model: nn.Module, config: ModelConfig, held_out: HeldOut) -> dict[str, dict[str, float]]:
    """Compute mean losses over the pairs of all ranks; collective. The model's training mode is restored.

    Returns:
        `word_loss` (cross entropy) and `word_accuracy` of the masked words, half of each caption, beside the whole
        image; `pixel_loss` (mean squared error against `pixel_target`) of the masked patches beside the whole caption.
        Each maps `right` and `wrong`, where the image or caption is another sample's, to a number. An entry is absent
        if the model lacks its head.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    tally = Tally()
    for batch in held_out.batches:
        moved = batch.to(device)
        if config.predicts_words:
            _tally_words(tally, model, with_whole_image(moved))
        if config.predicts_pixels:
            _tally_pixels(tally, model, with_whole_caption(moved), config)
    names = ["word_loss", "word_accuracy"] * config.predicts_words + ["pixel_loss"] * config.predicts_pixels
    model.train(training)
    return nest(tally.means([f"{name}.{side}" for name in names for side in SIDES]))


def _tally_words(tally: Tally, model: nn.Module, batch: Batch) -> None:
    labels = batch.token_labels
    assert labels is not None
    for side, shown in (("right", batch), ("wrong", with_another_image(batch))):
        logits = predict_masked(model, shown).token_logits().float()
        tally.add(f"word_loss.{side}", F.cross_entropy(logits, labels, reduction="none"))
        tally.add(f"word_accuracy.{side}", (logits.argmax(dim=-1) == labels).float())


def _tally_pixels(tally: Tally, model: nn.Module, batch: Batch, config: ModelConfig) -> None:
    pixels, masked = batch.normalized_pixels, batch.masked_patch_ids
    assert pixels is not None
    assert masked is not None
    for side, shown in (("right", batch), ("wrong", with_another_caption(batch))):
        predictions: Tensor | None = predict_masked(model, shown).pixel_predictions
        assert predictions is not None
        loss = ops.masked_pixel_loss(pixels, predictions, masked, config.patch_size, normalize=config.normalizes_pixels)
        tally.add(f"pixel_loss.{side}", loss)
