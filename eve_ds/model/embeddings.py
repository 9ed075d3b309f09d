"""Embeddings of pixels and of token ids, and conversion of position tables to other sizes."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import ModelConfig


class PatchProjection(nn.Conv2d):
    """Convolution whose kernel covers a patch; for single patches it is a linear layer, which is faster."""

    def forward(self, patches: Tensor) -> Tensor:
        """(M, 3, P, P) -> (M, D, 1, 1); whole images (M, 3, H, W) -> (M, D, H / P, W / P)."""
        if patches.shape[2:] != self.weight.shape[2:]:
            return super().forward(patches)
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


class ImageEmbedding(nn.Module):
    """Patch projection, class token first, + position + type (upstream `patch_embed`, `pos_embed_vision`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.patch_size = config.patch_size
        self.projection = PatchProjection(3, width, kernel_size=config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(config.num_patches + 1, width))
        self.modality = nn.Parameter(torch.empty(width))

    def forward(self, pixel_values: Tensor, visible_patch_ids: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + N, D); if `visible_patch_ids` (B, N) is given, only those patches are embedded.

        Each patch gets the position embedding of its place in the image.
        """
        batch = pixel_values.shape[0]
        pixel_values = pixel_values.to(self.position.dtype)  # batches are fp32, weights may not be
        patches = _patches(pixel_values, self.patch_size)
        position = self.position[1:].expand(batch, -1, -1)
        if visible_patch_ids is not None:
            patches = _take(patches, visible_patch_ids)
            position = self.position[1:][visible_patch_ids]
        shape = (batch, patches.shape[1], self.position.shape[1])
        patches = self.projection(patches.reshape(-1, 3, self.patch_size, self.patch_size)).view(shape)
        first = (self.class_token + self.position[0]).expand(batch, 1, -1)
        return torch.cat([first, patches + position], dim=1) + self.modality


class TextEmbedding(nn.Module):
    """Word embedding, LayerNorm, dropout, + position + type (upstream `word_embedding`, `layer_norm_text`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.text_dropout)
        self.position = nn.Parameter(torch.empty(config.text_positions, config.hidden_size))
        self.modality = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, D).

        Raises:
            ValueError: L exceeds the position table.
        """
        length = input_ids.shape[1]
        if length > self.position.shape[0]:
            raise ValueError(f"text of {length} tokens exceeds text_positions ({self.position.shape[0]})")
        words = self.dropout(self.norm(self.word(input_ids)))
        return words + self.position[:length] + self.modality


def vocabulary_matrix(word: nn.Module) -> Tensor:
    """(V, D) embeddings of all words, by which the text head multiplies.

    This is the weight of `word`, unless an adapter took its place, or accelerate moves the weight to its device during
    a call only. Then `word` is called with all ids, so that the logits use the same embeddings as the input.
    """
    weight = cast(Tensor, word.weight)
    if type(word) is nn.Embedding and not hasattr(word, "_hf_hook"):
        return weight
    return word(torch.arange(weight.shape[0], device="cpu" if weight.is_meta else weight.device))


def resize_positions(position: Tensor, side: int) -> Tensor:
    """Convert a position table (1 + N * N, D) of N x N patches to (1 + side * side, D), for images of another size.

    Patch rows are interpolated in fp32 (bicubic, corners not aligned, no antialiasing: upstream
    `interpolate_pos_embed`). The class token's row is copied. The dtype does not change.

    Raises:
        ValueError: the number of patches in the table is not a square.
    """
    old = math.isqrt(position.shape[0] - 1)
    if old * old != position.shape[0] - 1:
        raise ValueError(f"a position table of {position.shape[0]} rows is not a class token and a square of patches")
    if old == side:
        return position
    grid = position[1:].float().t().unflatten(1, (old, old))  # (D, N, N)
    resized = F.interpolate(grid.unsqueeze(0), size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([position[:1], resized[0].flatten(1).t().to(position.dtype)])


def cut_positions(position: Tensor, length: int) -> Tensor:
    """First `length` rows of a text position table (T, D).

    Raises:
        ValueError: the table is shorter than `length`; untrained positions are not invented.
    """
    if length > position.shape[0]:
        raise ValueError(f"a text position table of {position.shape[0]} rows cannot serve text_positions ({length})")
    return position[:length]


def _patches(pixel_values: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, N, 3 * P * P) in row-major order; values of a patch are in the order of a convolution weight.

    This is one copy, while `F.unfold` launches one kernel per image on CUDA.
    """
    grid = pixel_values.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, 3, rows, P, columns, P)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Select tokens by id: (B, N, D), (B, M) int64 -> (B, M, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
