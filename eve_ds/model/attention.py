"""Multi-head attention with one fused projection (self) or separate query and key-value projections (cross)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.model.stream import Layout


class SelfAttention(nn.Module):
    """Fused qkv weight; queries and values have a bias, keys have none (BEiT; upstream `Attention`)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(hidden_size))
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, *layouts: Layout) -> Tensor:
        """(N, D) -> (N, D); tokens attend to the real tokens of their sample.

        The tokens of several layouts stand one after the other. They share the projections; each is padded for itself.
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).split([layout.num_tokens for layout in layouts])
        mixed = []
        for own, layout in zip(qkv, layouts, strict=True):
            q, k, v = layout.pad(own).chunk(3, dim=-1)
            mixed.append(layout.pack(attend(q, k, v, self.num_heads, layout.key_mask)))
        return self.proj(torch.cat(mixed) if len(mixed) > 1 else mixed[0])


class CrossAttention(nn.Module):
    """Queries of one sequence read another sequence of a different width."""

    def __init__(self, hidden_size: int, memory_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(memory_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, memory: Tensor, layout: Layout) -> Tensor:
        """(B, Q, D), tokens (N, M) and their layout over the same B samples -> (B, Q, D)."""
        k, v = layout.pad(self.key_value(memory)).chunk(2, dim=-1)
        return self.proj(attend(self.query(x), k, v, self.num_heads, layout.key_mask))


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, key_mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention: (B, N, D), (B, S, D), (B, S, D) -> (B, N, D); softmax in fp32 (torch's SDPA)."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, length, D / heads)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
