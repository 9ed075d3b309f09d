"""Decoders of masked signal modeling: one predicts the pixels of masked patches, one predicts masked words.

The released files hold no decoder. The paper (Methods) uses MAE's asymmetric decoder for pixels, and two layers with a
softmax for words. Two details of the word head are our choice: its output is tied to the word embedding, and BERT's
LayerNorm precedes that product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import ModelConfig
from eve_ds.model.attention import CrossAttention, SelfAttention
from eve_ds.model.feed_forward import FeedForward
from eve_ds.model.stream import TokenStream, pack, pad
from eve_ds.views import Layout


class PixelDecoder(nn.Module):
    """Predict masked patches from the encoded visible patches and text tokens.

    `cross`: mask tokens (one per masked patch, identified by position) query the encoded stream.
    `self`: mask tokens join the projected stream, and all tokens attend to all tokens.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        decoder = config.pixel_decoder
        width = decoder.hidden_size
        self.kind = decoder.kind
        self.mask_token = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(config.num_patches, width))
        self.memory_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.memory = nn.Linear(config.hidden_size, width) if decoder.kind == "self" else nn.Identity()
        memory_size = width if decoder.kind == "self" else config.hidden_size
        self.blocks = nn.ModuleList(DecoderBlock(config, memory_size) for _ in range(decoder.num_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pixels = nn.Linear(width, config.patch_size**2 * 3)

    def forward(self, stream: TokenStream, visible_patch_ids: Tensor, masked_patch_ids: Tensor) -> Tensor:
        """Encoded stream of B samples, (B, N_visible), (B, N_masked) int64 -> pixels (B, N_masked, P * P * 3).

        Raises:
            ValueError: `masked_patch_ids` does not have B rows.
        """
        batch = len(stream.layout.mask)
        if masked_patch_ids.ndim != 2 or len(masked_patch_ids) != batch:
            raise ValueError(
                f"masked_patch_ids {tuple(masked_patch_ids.shape)} must be ({batch}, patches): a row for every image"
            )
        queries = self.mask_token + self.position[masked_patch_ids]  # (B, N_masked, W)
        memory = self.memory(self.memory_norm(stream.hidden_states))  # (N, W or D)
        if self.kind == "cross":
            for block in self.blocks:
                queries = block(queries, memory, stream.layout)
            return self.pixels(self.norm(queries))
        tokens, layout = self._join(queries, pad(memory, stream.layout), stream.layout, visible_patch_ids)
        for block in self.blocks:
            tokens = block(tokens, None, layout)
        return self.pixels(self.norm(pad(tokens, layout)[:, : masked_patch_ids.shape[1]]))

    def _join(
        self, queries: Tensor, memory: Tensor, layout: Layout, visible_patch_ids: Tensor
    ) -> tuple[Tensor, Layout]:
        """Put mask tokens before the stream; patches (after the class token) get the decoder's position embedding."""
        num_visible = visible_patch_ids.shape[1]
        position = F.pad(self.position[visible_patch_ids], (0, 0, 1, memory.shape[1] - num_visible - 1))
        layout = layout.behind(queries.shape[1])
        return pack(torch.cat([queries, memory + position], dim=1), layout), layout


class DecoderBlock(nn.Module):
    """Pre-norm attention (self over all tokens, or cross from mask tokens to the stream) and feed-forward."""

    def __init__(self, config: ModelConfig, memory_size: int) -> None:
        super().__init__()
        decoder = config.pixel_decoder
        width, heads = decoder.hidden_size, decoder.num_attention_heads
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention: nn.Module = (
            SelfAttention(width, heads) if decoder.kind == "self" else CrossAttention(width, memory_size, heads)
        )
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ffn = FeedForward(width, 4 * width)

    def forward(self, x: Tensor, memory: Tensor | None, layout: Layout) -> Tensor:
        """Tokens (N, W) with their layout, or queries (B, Q, W) with `memory` and its layout -> the shape of `x`."""
        h = self.norm1(x)
        x = x + (self.attention(h, [layout]) if memory is None else self.attention(h, memory, layout))
        return x + self.ffn(self.norm2(x))


class TextHead(nn.Module):
    """Dense, GELU, LayerNorm; the projection to the vocabulary is the word embedding itself plus this bias (BERT)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """(M, D) -> (M, D), which the caller multiplies by the word embedding; with that (V, D) -> logits (M, V)."""
        hidden = self.norm(F.gelu(self.dense(hidden_states)))
        return hidden if vocabulary is None else F.linear(hidden, vocabulary, self.bias)
