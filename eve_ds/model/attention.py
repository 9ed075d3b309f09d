"""Multi-head attention with one fused projection (self) or separate query and key-value projections (cross)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.model.stream import pack, pad
from eve_ds.views import Layout, joined


class FusedProjection(nn.Linear):
    """Linear layer without a bias of its own; a call may pass one, which saves a pass over the output."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(N, D), (F,) -> (N, F)."""
        return F.linear(x, self.weight, bias)


class SelfAttention(nn.Module):
    """Fused qkv weight; queries and values have a bias, keys have none (BEiT; upstream `Attention`)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = FusedProjection(hidden_size, 3 * hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(hidden_size))
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, layouts: Sequence[Layout]) -> Tensor:
        """(N, D) -> (N, D); each token attends to the real tokens of its sample.

        The tokens of several layouts follow one another in N and share the projections.
        """
        qkv = self._project(x).split([layout.num_tokens for layout in layouts])
        return self.proj(
            joined([attend(None, own, self.num_heads, layout) for own, layout in zip(qkv, layouts, strict=True)])
        )

    def _project(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, 3 D)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if type(self.qkv) is FusedProjection:
            return self.qkv(x, bias)
        # An adapter or a quantized layer took its place: those act on a layer without a bias.
        qkv = self.qkv(x)
        return qkv + bias.to(qkv.dtype)


class CrossAttention(nn.Module):
    """Queries from one sequence attend to another sequence of a different width."""

    def __init__(self, hidden_size: int, memory_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(memory_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, memory: Tensor, layout: Layout) -> Tensor:
        """Queries (B, Q, D), memory tokens (N, M) with their layout over the same B samples -> (B, Q, D)."""
        return self.proj(attend(self.query(x), self.key_value(memory), self.num_heads, layout))


def attend(queries: Tensor | None, packed: Tensor, num_heads: int, layout: Layout) -> Tensor:
    """Scaled dot-product attention within each sample, softmax in fp32.

    Tokens are padded per sample for torch's SDPA. If that would add padding and `varlen_attn` has a kernel, it takes
    the packed tokens instead.

    Args:
        queries: (B, Q, D), the same number of queries for every sample. None means that `packed` holds one query per
            token.
        packed: (N, 2 D) keys and values of the tokens, or (N, 3 D) queries, keys and values.
        num_heads: number of heads, each with D / num_heads channels.
        layout: layout of the N tokens.

    Returns:
        (B, Q, D), or (N, D) in token order if `queries` is None.
    """
    head_size = packed.shape[1] // (num_heads * (3 if queries is None else 2))
    if _takes_packed(packed, head_size, layout):
        return _attend_packed(queries, packed, num_heads, head_size, layout)
    padded = pad(packed, layout)
    q, k, v = padded.chunk(3, dim=-1) if queries is None else (queries, *padded.chunk(2, dim=-1))
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, length, D / heads)
    mask = None if layout.key_mask is None else layout.key_mask[:, None, None, :]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    return pack(mixed, layout) if queries is None else mixed


def _takes_packed(packed: Tensor, head_size: int, layout: Layout) -> bool:
    """Whether to use `varlen_attn`: it needs a kernel, and padding to avoid.

    Without padding SDPA is faster: 0.8 against 1.2 ms for 256 x 213 tokens on an H200.
    """
    has_kernel = packed.device.type == "cuda" and packed.dtype in (torch.bfloat16, torch.float16)
    return has_kernel and head_size % 8 == 0 and head_size <= 256 and not (layout.is_whole or layout.keeps_padding)


def _attend_packed(queries: Tensor | None, packed: Tensor, num_heads: int, head_size: int, layout: Layout) -> Tensor:
    """Same result as :func:`attend`; the end offsets of `layout` separate the samples."""
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler, which costs over a second at start

    *own, k, v = packed.unflatten(-1, (-1, num_heads, head_size)).unbind(1)  # (N, heads, D / heads)
    if queries is None:
        q, ends, most = own[0], layout.ends, layout.longest
    else:
        batch, most = queries.shape[:2]
        q = queries.view(batch * most, num_heads, head_size)
        ends = torch.arange(0, batch * most + 1, most, dtype=torch.int32, device=queries.device)
    mixed = cast(Tensor, varlen_attn(q, k, v, ends, layout.ends, most, layout.longest)).flatten(1)
    return mixed if queries is None else mixed.view_as(queries)
