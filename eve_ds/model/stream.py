"""Tokens of a view in one stream without padding, and the ways between that, samples and modalities.

Samples stand one after the other, each with its image tokens before its text tokens. Whatever works on tokens one by
one (norms, projections, feed-forward networks, experts) sees real tokens only; attention looks at each sample. Where a
token stands is said by a :class:`eve_ds.views.Layout`. The streams of several views of a batch can stand one after the
other too (:class:`eve_ds.views.Packing`), so that one pass encodes them all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eve_ds import ops
from eve_ds.views import Layout, Packing


class TokenStream(NamedTuple):
    """Tokens of B samples in one view."""

    hidden_states: Tensor
    """(N, D)."""
    layout: Layout

    def padded(self) -> Tensor:
        """(B, S, D), zero where no token is; image tokens (class token first) come before text."""
        return pad(self.hidden_states, self.layout)


def join(image: Tensor | None, text: Tensor | None, layout: Layout) -> TokenStream:
    """One stream of image tokens (B, N_image, D) and text tokens (B, L, D); either may be None."""
    parts = [tokens for tokens in (image, text) if tokens is not None]
    return TokenStream(pack(torch.cat(parts, dim=1), layout), layout)


def pad(tokens: Tensor, layout: Layout) -> Tensor:
    """(N, D) -> (B, S, D), zero where no token is."""
    if not layout.is_whole:
        tokens = take_rows(tokens, layout.places, layout.token_ids)
    return tokens.view(*layout.mask.shape, tokens.shape[-1])


def pack(padded: Tensor, layout: Layout) -> Tensor:
    """(B, S, D) -> (N, D)."""
    rows = padded.flatten(0, 1)
    return rows if layout.is_whole else take_rows(rows, layout.token_ids, layout.places)


def sort_by_modality(tokens: Tensor, packing: Packing) -> Tensor:
    """(N, D) in stream order -> (N, D), those of images first."""
    if packing.order is None or packing.places is None:
        return tokens
    return take_rows(tokens, packing.order, packing.places)


def restore_order(tokens: Tensor, packing: Packing) -> Tensor:
    """(N, D) by modality -> (N, D) in stream order."""
    if packing.order is None or packing.places is None:
        return tokens
    return take_rows(tokens, packing.places, packing.order)


def take_rows(x: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """Rows `ids` of x, zero for -1: (T, D), (R,) -> (R, D); no row twice.

    `places` (T,) says where each row of x went, or -1.
    """
    return TakeRows.apply(x, ids, places)


class TakeRows(torch.autograd.Function):
    """As no row is taken twice, the gradient is taken the same way, with the roles of the indices exchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, places: Tensor) -> Tensor:
        """See :func:`take_rows`."""
        ctx.save_for_backward(ids, places)
        return ops.moe_dispatch(x, places.unsqueeze(1), ids)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of x."""
        ids, places = ctx.saved_tensors
        return ops.moe_dispatch(d_rows, ids.unsqueeze(1), places), None, None
