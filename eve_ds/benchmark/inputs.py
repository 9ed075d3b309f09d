"""Inputs and gradients of steps whose time is measured: random pairs, arbitrary weights, and the plain torch ops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eve_ds.config import Config, MaskingConfig
from eve_ds.data.masking import num_chosen, num_masked_patches
from eve_ds.model.eve import EVE
from eve_ds.model.with_losses import weighted_sum
from eve_ds.objectives.pretraining import pretraining_losses
from eve_ds.objectives.registry import OBJECTIVES
from eve_ds.views import layouts_of

Inputs = dict[str, Any]
"""Arguments of `EVE.forward`."""
ANY_COUNTS = {"masked_patches": 1000.0, "masked_tokens": 100.0, "tokens": 1000.0}
"""Denominators of losses whose value does not matter."""
REAL_TOKENS = 12
"""Tokens of a caption in the benchmarks of a step, [CLS] and [SEP] included."""


def device() -> torch.device:
    """Return the GPU if one is available, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def reference_ops() -> Iterator[None]:
    """Use the plain torch ops inside the block."""
    before = os.environ.get("EVE_DS_OPS")
    os.environ["EVE_DS_OPS"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["EVE_DS_OPS"]
        else:
            os.environ["EVE_DS_OPS"] = before


def backward(model: EVE, config: Config, inputs: Inputs) -> None:
    """Compute loss and gradients of inputs from :func:`random_inputs`; the denominators are arbitrary."""
    pixel_values = inputs["pixel_values"]
    targets = {
        "pixel_values": pixel_values[inputs["image_view_ids"]] if "image_view_ids" in inputs else pixel_values,
        "masked_patch_ids": inputs["masked_patch_ids"],
        "token_labels": inputs["input_ids"].flatten()[inputs["masked_token_ids"]],
    }
    terms = pretraining_losses(model(**inputs), targets, ANY_COUNTS, model.config)
    weighted_sum(terms, config.loss.weights).backward()


@torch.no_grad()
def draw_weights(module: nn.Module) -> None:
    """Draw arbitrary weights in place; the initialization of training takes a minute for EVE-Base."""
    for parameter in module.parameters():
        parameter.uniform_(-0.03, 0.03)
    for child in module.modules():
        if isinstance(child, nn.LayerNorm):
            child.reset_parameters()


def random_inputs(config: Config, masking: MaskingConfig, size: int) -> Inputs:
    """Return `size` random pairs with masks for all objectives; half of the words are masked."""
    model = config.model
    masked = num_masked_patches(model.num_patches, masking.patch_mask_ratio)
    order, seen = (torch.stack([torch.randperm(model.num_patches) for _ in range(size)]) for _ in range(2))
    length = model.text_length
    positions = torch.arange(size).unsqueeze(1) * length + torch.arange(1, 1 + REAL_TOKENS // 2)
    tokens = torch.randint(5, model.vocab_size, (size, length))
    inputs = {
        "pixel_values": torch.randn(size, 3, model.image_size, model.image_size),
        "input_ids": tokens,
        "attention_mask": (torch.arange(length) < REAL_TOKENS).expand(size, -1).contiguous(),
        "masked_input_ids": tokens,
        "masked_token_ids": positions.flatten(),
        "visible_patch_ids": order[:, masked:].sort().values,
        "masked_patch_ids": order[:, : num_chosen(masked, masking.predicted_patch_share)].sort().values,
    }
    if masking.image_view_share < 1:
        shown = round(size * masking.image_view_share)
        inputs["image_view_ids"] = torch.arange(shown)
        inputs |= {name: inputs[name][:shown] for name in ("visible_patch_ids", "masked_patch_ids")}
    if masking.image_view_word_share < 1:
        words = 2 + num_chosen(REAL_TOKENS - 2, masking.image_view_word_share)
        inputs["image_view_text_mask"] = (torch.arange(length) < words).expand(size, -1).contiguous()
    if masking.language_view_patch_share < 1:
        kept = num_chosen(model.num_patches, masking.language_view_patch_share)
        inputs["language_patch_ids"] = seen[:, :kept].sort().values
    layouts = layouts_of([OBJECTIVES[name] for name in ("joint", "mim", "mlm", "itc")], inputs, model.num_patches)
    moved: Inputs = {name: _moved(tensor) for name, tensor in inputs.items()}
    return moved | {"layouts": {name: layout.with_each(_moved) for name, layout in layouts.items()}}


def _moved(tensor: Tensor) -> Tensor:
    return tensor.to(device())
