"""Loss of one micro-batch of drawn numbers, other ones on every rank and in every micro-step, for any EVE or engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eve_ds.config import ModelConfig

MICRO_SIZE = 3
"""Number of samples."""


def joint_loss(model: nn.Module, config: ModelConfig, rank: int, step: int, part: int) -> Tensor:
    """Return 10 times the mean square of all predictions.

    Args:
        model: plain model or DeepSpeed engine with the objective `joint`.
        config: its architecture, with at least five text tokens.
        rank, step, part: numbers of the rank, the optimizer step and the micro-step.
    """
    generator = torch.Generator().manual_seed(1000 * step + 10 * part + rank)
    order = torch.stack([torch.randperm(config.num_patches, generator=generator) for _ in range(MICRO_SIZE)])
    pixels = torch.randn(MICRO_SIZE, 3, config.image_size, config.image_size, generator=generator)
    output = model(
        pixel_values=pixels.to(next(model.parameters()).dtype),
        visible_patch_ids=order[:, :2].sort().values,
        masked_patch_ids=order[:, 2:].sort().values,
        input_ids=torch.randint(5, config.vocab_size, (MICRO_SIZE, 5), generator=generator),
        attention_mask=torch.ones(MICRO_SIZE, 5, dtype=torch.bool),
        masked_token_ids=torch.tensor([1, 2, 6, 8]),
    )
    return 10 * sum((tensor.float().square().mean() for tensor in output.tensors().values()), torch.zeros(()))
