"""States of class tokens as features, and the classifier on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eve_ds.config import Config
from eve_ds.model.eve import Backbone, BackboneOutput, MoEFactory
from eve_ds.model.moe import MoEOutput
from eve_ds.tasks.classification import ClassifierOutput
from eve_ds.tasks.task import task_section
from eve_ds.views import View


class Classifier(nn.Module):
    """Backbone on images and text together, and a perceptron on the text's [CLS] (heads of VQA and NLVR2 in EVE).

    Each of the I images of an example is paired with the text, and the I states are concatenated. The pairs with the
    first image are one view, those with the second another: where experts have a capacity, each view has its own, as
    in the released code, which makes one pass per image.

    Args:
        config: configuration with `model` and `task`.
        moe_cls: makes the MoE of a layer.
        num_images: I.
        num_classes: number of logits.
    """

    def __init__(self, config: Config, moe_cls: MoEFactory, num_images: int, num_classes: int) -> None:
        super().__init__()
        width = config.model.hidden_size
        self.backbone = Backbone(config.model, moe_cls)
        self.visible_patches = VisiblePatches(config)
        self.head = nn.Sequential(
            nn.Linear(num_images * width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, num_classes),
        )

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, targets: Tensor | None = None
    ) -> ClassifierOutput:
        """(B, I, 3, H, W), (B, L) int64, (B, L) bool -> logits (B, classes); `targets` are ignored."""
        encoded = self.backbone.encode(
            [
                View(images, input_ids, attention_mask, visible_patch_ids=self.visible_patches(images))
                for images in pixel_values.unbind(dim=1)
            ]
        )
        states = torch.cat([text_class_states(view) for view in encoded], dim=1)  # (B, I * D)
        return ClassifierOutput(self.head(states), *sum_outputs(encoded))


class VisiblePatches(nn.Module):
    """Choice of the patches that the encoder sees: all in evaluation, a random `task.visible_patch_share` in training.

    Args:
        config: configuration with `model` and `task`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_patches = (config.model.image_size // config.model.patch_size) ** 2
        self.count = max(1, round(task_section(config).visible_patch_share * self.num_patches))

    def forward(self, pixel_values: Tensor) -> Tensor | None:
        """(B, 3, H, W) -> (B, count) int64, ascending, or None for all; draws from torch's default generator."""
        if not self.training or self.count == self.num_patches:
            return None
        order = torch.rand(len(pixel_values), self.num_patches, device=pixel_values.device).argsort(dim=1)
        return order[:, : self.count].sort(dim=1).values


def text_class_states(encoded: BackboneOutput) -> Tensor:
    """(B, D) final states of the first text token, [CLS], of every sample."""
    return _states_at(encoded, encoded.num_image_tokens)


def image_class_states(encoded: BackboneOutput) -> Tensor:
    """(B, D) final states of the images' class token."""
    return _states_at(encoded, 0)


def _states_at(encoded: BackboneOutput, position: int) -> Tensor:
    """(B, D) final states at one position of every padded sample."""
    layout = encoded.stream.layout
    batch, length = layout.mask.shape
    positions = torch.arange(batch, device=layout.places.device) * length + position
    return encoded.stream.hidden_states.index_select(0, layout.places[positions])


def sum_outputs(passes: Sequence[BackboneOutput]) -> tuple[tuple[MoEOutput, ...], int]:
    """MoE outputs of all passes of a step in their order, and the total number of tokens."""
    tokens = sum(encoded.stream.hidden_states.shape[0] for encoded in passes)
    return tuple(layer for encoded in passes for layer in encoded.moe), tokens
