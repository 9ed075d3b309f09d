"""What the tasks share: states of class tokens, the head of a classification, start of a new head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eve_ds.config import Config
from eve_ds.model.eve import Backbone, BackboneOutput, MoEFactory
from eve_ds.model.moe import MoEOutput
from eve_ds.tasks.batches import ImageReader, TaskCollator, evaluation_batches
from eve_ds.tasks.examples import Example


class ClassifierOutput(NamedTuple):
    """Of a model that classifies."""

    logits: Tensor
    """(B, classes)."""
    moe: tuple[MoEOutput, ...]
    num_tokens: int
    """That entered the backbone on this rank."""


class Classifier(nn.Module):
    """Images and text together through the backbone, a perceptron on the text's [CLS] (EVE: VQA and NLVR2 heads).

    Each of the I images of an example is paired with the text, and the I states are concatenated.
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
        """(B, I, 3, H, W), (B, L) int64, (B, L) bool -> logits (B, classes); `targets` are not looked at."""
        num_images = pixel_values.shape[1]
        pixel_values = pixel_values.flatten(0, 1)
        encoded = self.backbone(
            pixel_values,
            input_ids.repeat_interleave(num_images, dim=0),
            attention_mask.repeat_interleave(num_images, dim=0),
            visible_patch_ids=self.visible_patches(pixel_values),
        )
        states = text_class_states(encoded).unflatten(0, (-1, num_images))  # (B, I, D)
        return ClassifierOutput(self.head(states.flatten(1)), encoded.moe, encoded.stream.hidden_states.shape[0])


class VisiblePatches(nn.Module):
    """Which patches the encoder sees: all in evaluation, `task.visible_patch_share` of them, at random, in training."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.task is not None
        self.num_patches = (config.model.image_size // config.model.patch_size) ** 2
        self.count = max(1, round(config.task.visible_patch_share * self.num_patches))

    def forward(self, pixel_values: Tensor) -> Tensor | None:
        """(B, 3, H, W) -> (B, count) int64, ascending, or None for all; draws from torch's default generator."""
        if not self.training or self.count == self.num_patches:
            return None
        order = torch.rand(len(pixel_values), self.num_patches, device=pixel_values.device).argsort(dim=1)
        return order[:, : self.count].sort(dim=1).values


class Classified(NamedTuple):
    """An example and its logits, or why it has none."""

    example: Example
    logits: Tensor | None
    """(classes,) fp32 on the host."""
    skipped: str = ""


@torch.no_grad()
def classify(
    model: nn.Module, examples: Sequence[Example], reader: ImageReader, collate: TaskCollator, batch_size: int
) -> Iterator[Classified]:
    """Every example once; within a batch those that could not be read come first."""
    device = next(model.parameters()).device
    for read in evaluation_batches(examples, reader, collate, batch_size):
        yield from (Classified(example, None, reason) for example, reason in read.skipped)
        if read.batch is not None:
            logits = model(**read.batch.to(device).model_inputs()).logits.float().cpu()
            yield from (Classified(*pair) for pair in zip(read.batch.examples, logits, strict=True))


def text_class_states(encoded: BackboneOutput) -> Tensor:
    """(B, D) final states of the first text token, [CLS], of every sample."""
    return _states_at(encoded, encoded.num_image_tokens)


def image_class_states(encoded: BackboneOutput) -> Tensor:
    """(B, D) final states of the images' class token."""
    return _states_at(encoded, 0)


def _states_at(encoded: BackboneOutput, position: int) -> Tensor:
    layout = encoded.stream.layout
    batch, length = layout.mask.shape
    positions = torch.arange(batch, device=layout.places.device) * length + position
    return encoded.stream.hidden_states.index_select(0, layout.places[positions])


def sum_outputs(passes: Sequence[BackboneOutput]) -> tuple[tuple[MoEOutput, ...], int]:
    """MoE outputs of all passes of a step, one after the other, and the tokens of all."""
    tokens = sum(encoded.stream.hidden_states.shape[0] for encoded in passes)
    return tuple(layer for encoded in passes for layer in encoded.moe), tokens
