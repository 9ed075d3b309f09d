"""An encoder as a program of torch.export, which runs without eve_ds: `torch.export.load(file).module()`."""

from __future__ import annotations

import copy
import os
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from eve_ds.config import ModelConfig
from eve_ds.export.plain import ExportError
from eve_ds.model.eve import Backbone


class _Encoder(nn.Module):
    """The first token's state of a backbone; how many tokens it computes depends on shapes alone."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = copy.copy(backbone)  # the same modules and weights, the caller's attribute stays
        self.backbone.keep_padding = True

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return self.backbone(pixel_values, input_ids, attention_mask).stream.padded()[:, 0]


def export_encoder(backbone: Backbone, config: ModelConfig, modality: Literal["image", "text"]) -> ExportedProgram:
    """The encoder of images or of text, with any batch size and any length of text that has positions.

    Args:
        backbone: in evaluation mode, on the CPU.
        config: of the model that it is part of.
        modality: `image`: `pixel_values` (B, 3, H, W) -> (B, D), the class token's state. `text`: `input_ids` (B, L)
            int64 and `attention_mask` (B, L) bool -> (B, D), the state of [CLS].

    Raises:
        ExportError: EVE_DS_OPS is not `reference`, or `config` has the profile `official`.
    """
    if os.environ.get("EVE_DS_OPS") != "reference":
        raise ExportError("torch.export cannot trace the fused ops: set EVE_DS_OPS=reference")
    if config.profile == "official":
        raise ExportError("profile 'official' gives experts a capacity that depends on the batch: export 'default'")
    batch = Dim("batch", min=1)
    inputs, dynamic = _image_inputs(config, batch) if modality == "image" else _text_inputs(config, batch)
    with torch.no_grad():
        return torch.export.export(_Encoder(backbone).eval(), (), inputs, dynamic_shapes=dynamic)


def _image_inputs(config: ModelConfig, batch: Dim) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {"pixel_values": torch.zeros(2, 3, config.image_size, config.image_size)}, {"pixel_values": {0: batch}}


def _text_inputs(config: ModelConfig, batch: Dim) -> tuple[dict[str, Tensor], dict[str, Any]]:
    shape = (2, 5)  # any, as long as the two sizes differ and neither is 1
    sizes = {0: batch, 1: Dim("length", min=2, max=config.text_positions)}
    inputs = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.ones(shape, dtype=torch.bool),
    }
    return inputs, dict.fromkeys(inputs, sizes)
