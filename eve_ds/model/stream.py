"""Token stream of a view without padding, and conversions between stream, padded samples and modality order.

Samples follow one another, each with its image tokens before its text tokens. Modules that work token by token (norms,
projections, feed-forward networks, experts) see real tokens only; attention works within each sample. A
:class:`eve_ds.views.Layout` gives the place of each token. The streams of several views of a batch can also follow one
another (:class:`eve_ds.views.Packing`), so that one pass encodes all views.
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
        """(B, S, D), zero at positions without a token; image tokens (class token first) come before text."""
        return pad(self.hidden_states, self.layout)


def join(image: Tensor | None, text: Tensor | None, layout: Layout) -> TokenStream:
    """One stream of image tokens (B, N_image, D) and text tokens (B, L, D); either may be None."""
    parts = [tokens for tokens in (image, text) if tokens is not None]
    return TokenStream(pack(torch.cat(parts, dim=1), layout), layout)


def pad(tokens: Tensor, layout: Layout) -> Tensor:
    """(N, D) -> (B, S, D), zero at positions without a token."""
    if not layout.is_whole:
        tokens = take_rows(tokens, layout.places, layout.token_ids)
    return tokens.view(*layout.mask.shape, tokens.shape[-1])


def pack(padded: Tensor, layout: Layout) -> Tensor:
    """(B, S, D) -> (N, D)."""
    rows = padded.flatten(0, 1)
    return rows if layout.is_whole else take_rows(rows, layout.token_ids, layout.places)


def sort_by_modality(tokens: Tensor, packing: Packing) -> Tensor:
    """(N, D) in stream order -> (N, D) with image tokens first."""
    if packing.order is None or packing.places is None:
        return tokens
    return take_rows(tokens, packing.order, packing.places)


def restore_order(tokens: Tensor, packing: Packing) -> Tensor:
    """(N, D) in modality order -> (N, D) in stream order."""
    if packing.order is None or packing.places is None:
        return tokens
    return take_rows(tokens, packing.places, packing.order)


def take_rows(x: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """Rows `ids` of x, with zeros for -1: (T, D), (R,) -> (R, D); no row of x may be taken twice.

    `places` (T,) is the destination of each row of x, or -1 if the row is not taken.
    """
    return TakeRows.apply(x, ids, places)


class TakeRows(torch.autograd.Function):
    """Autograd node of :func:`take_rows`.

    No row is taken twice, so the backward is the same operation with the two index tensors exchanged.
    """

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
