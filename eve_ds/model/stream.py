"""One stream of image and text tokens that carries its modality with it and holds no padding.

Samples stand one after the other, each with its image tokens before its text tokens. Whatever works on tokens one by
one (norms, projections, feed-forward networks, experts) sees real tokens only; attention lays them out by sample.
The streams of several views of a batch can stand one after the other too, so that one pass encodes them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eve_ds import ops

IMAGE, TEXT = 0, 1
"""Modality ids."""


class Layout(NamedTuple):
    """Where N tokens stand among B samples of S positions."""

    mask: Tensor
    """(B, S) bool, True = a real token."""
    token_ids: Tensor
    """(N,) int64, ascending: position of each token among the B * S."""
    places: Tensor
    """(B * S,) int64: the token at each position, -1 = none."""
    real: Tensor | None
    """(N,) bool, False = padding that was kept; None: there is none."""

    @classmethod
    def of(cls, mask: Tensor, keep_padding: bool = False) -> Layout:
        """Layout of the tokens that (B, S) bool `mask` calls real, or of all positions with `keep_padding`.

        How many are real is asked once a forward; on an accelerator the host waits for the answer.
        """
        positions = torch.arange(mask.numel(), device=mask.device)
        if keep_padding:
            return cls(mask, positions, positions, mask.flatten())
        token_ids = mask.flatten().nonzero().squeeze(1)
        places = torch.full_like(positions, -1)
        places[token_ids] = positions[: token_ids.numel()]
        return cls(mask, token_ids, places, None)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.token_ids.numel()

    @property
    def is_whole(self) -> bool:
        """Whether there is a token at every position."""
        return self.num_tokens == self.places.numel()

    @property
    def key_mask(self) -> Tensor | None:
        """`mask`, or None where every position may be looked at: attention without a mask has faster kernels."""
        return None if self.is_whole and self.real is None else self.mask

    def pad(self, tokens: Tensor) -> Tensor:
        """(N, D) -> (B, S, D), zero where no token is."""
        if not self.is_whole:
            tokens = take_rows(tokens, self.places, self.token_ids)
        return tokens.view(*self.mask.shape, tokens.shape[-1])

    def pack(self, padded: Tensor) -> Tensor:
        """(B, S, D) -> (N, D)."""
        rows = padded.flatten(0, 1)
        return rows if self.is_whole else take_rows(rows, self.token_ids, self.places)

    def sample_ids(self) -> Tensor:
        """(N,) int64 sample of each token."""
        return self.token_ids // self.mask.shape[1]


class ModalityOrder(NamedTuple):
    """The tokens of a stream sorted by modality."""

    order: Tensor | None
    """(N,) int64 tokens, those of images first; None: they are sorted."""
    places: Tensor | None
    """(N,) int64 where each token went."""
    sizes: dict[int, int]
    """Number of tokens by modality; one that the batch cannot have is absent."""

    @classmethod
    def of(cls, modality_ids: Tensor, modalities: list[int]) -> ModalityOrder:
        """From (N,) int64 modality ids, and the modalities that may be among them."""
        if len(modalities) == 1:
            return cls(None, None, {modalities[0]: modality_ids.numel()})
        ids = [(modality_ids == modality).nonzero().squeeze(1) for modality in modalities]
        order = torch.cat(ids)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.numel(), device=order.device)
        return cls(order, places, {modality: own.numel() for modality, own in zip(modalities, ids, strict=True)})

    def sort(self, tokens: Tensor) -> Tensor:
        """(N, D) in stream order -> (N, D) by modality."""
        return tokens if self.order is None or self.places is None else take_rows(tokens, self.order, self.places)

    def restore(self, tokens: Tensor) -> Tensor:
        """(N, D) by modality -> (N, D) in stream order."""
        return tokens if self.order is None or self.places is None else take_rows(tokens, self.places, self.order)


class TokenStream(NamedTuple):
    """Tokens of B samples in one view."""

    hidden_states: Tensor
    """(N, D)."""
    modality_ids: Tensor
    """(N,) int64, IMAGE or TEXT."""
    layout: Layout
    modalities: tuple[int, ...]
    """Modalities that may be among the tokens, ascending."""

    def padded(self) -> Tensor:
        """(B, S, D), zero where no token is; image tokens (class token first) come before text."""
        return self.layout.pad(self.hidden_states)


class PackedViews(NamedTuple):
    """The tokens of one or several views, each of samples of its own, one view after the other."""

    hidden_states: Tensor
    """(N, D)."""
    modality_ids: Tensor
    """(N,) int64, IMAGE or TEXT."""
    layouts: tuple[Layout, ...]
    """One per view, counting its own tokens from 0."""
    by_modality: ModalityOrder
    """Over all views."""
    modalities: tuple[tuple[int, ...], ...]
    """Of each view."""

    @classmethod
    def of(cls, streams: Sequence[TokenStream]) -> PackedViews:
        """At least one stream."""
        modality_ids = _joined([stream.modality_ids for stream in streams])
        present = sorted({modality for stream in streams for modality in stream.modalities})
        return cls(
            hidden_states=_joined([stream.hidden_states for stream in streams]),
            modality_ids=modality_ids,
            layouts=tuple(stream.layout for stream in streams),
            by_modality=ModalityOrder.of(modality_ids, present),
            modalities=tuple(stream.modalities for stream in streams),
        )

    @property
    def view_sizes(self) -> list[int]:
        """Tokens of each view."""
        return [layout.num_tokens for layout in self.layouts]

    @property
    def real(self) -> Tensor | None:
        """(N,) bool, False = padding that was kept; None: there is none."""
        kept = [layout.real for layout in self.layouts if layout.real is not None]
        return _joined(kept) if kept else None

    def split(self) -> list[TokenStream]:
        """The views apart again."""
        states = self.hidden_states.split(self.view_sizes)
        modality_ids = self.modality_ids.split(self.view_sizes)
        return [TokenStream(*part) for part in zip(states, modality_ids, self.layouts, self.modalities, strict=True)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


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


def join(
    image: Tensor | None,
    text: Tensor | None,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    keep_padding: bool = False,
) -> TokenStream:
    """One stream of image tokens (B, N_image, D) and text tokens (B, L, D); either may be None.

    Args:
        image, text: embedded tokens.
        image_mask: (B,) or (B, N_image) bool, True = this sample has an image, or this token counts; None = all do.
        text_mask: (B, L) bool, True = real token; None = all are.
        keep_padding: keep what the masks leave out as tokens that attention does not look at.
    """
    parts: list[Tensor] = []
    masks: list[Tensor] = []
    modalities: list[Tensor] = []
    present: list[int] = []
    for tokens, mask, modality in ((image, image_mask, IMAGE), (text, text_mask, TEXT)):
        if tokens is None:
            continue
        shape = tokens.shape[:2]
        everything = torch.ones(shape, dtype=torch.bool, device=tokens.device)
        parts.append(tokens)
        masks.append(everything if mask is None else mask.bool().view(shape[0], *mask.shape[1:] or (1,)).expand(shape))
        modalities.append(torch.full(shape, modality, device=tokens.device))
        present.append(modality)
    if not parts:
        raise ValueError("a batch needs pixel_values or input_ids; both are None")
    layout = Layout.of(torch.cat(masks, dim=1), keep_padding)
    modality_ids = torch.cat(modalities, dim=1).flatten()[layout.token_ids]
    return TokenStream(layout.pack(torch.cat(parts, dim=1)), modality_ids, layout, tuple(present))
