"""Feed-forward ops: activation in one pass, and the networks of all experts as one autograd node.

Signatures and meaning are those of :mod:`eve_ds.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from eve_ds.ops import reference
from eve_ds.ops.build import use_built
from eve_ds.ops.schema import LIBRARY


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x); see :func:`eve_ds.ops.reference.quick_gelu`, which CUDA has too."""
    return torch.ops.eve_ds.quick_gelu(x) if x.device.type == "cpu" and use_built(x) else reference.quick_gelu(x)


def grouped_feed_forward(
    rows: Tensor,
    sizes: Sequence[int],
    fc1: Sequence[Tensor],
    fc1_bias: Sequence[Tensor],
    fc2: Sequence[Tensor],
    fc2_bias: Sequence[Tensor],
) -> Tensor:
    """All experts on their rows; see :func:`eve_ds.ops.reference.grouped_feed_forward`.

    One matrix product per expert written where its result belongs, and one activation for all: nothing is cut apart and
    put together again.
    """
    if rows.device.type != "cpu" or not use_built(rows):
        return reference.grouped_feed_forward(rows, sizes, fc1, fc1_bias, fc2, fc2_bias)
    return GroupedFeedForward.apply(rows, tuple(sizes), *fc1, *fc1_bias, *fc2, *fc2_bias)


class GroupedFeedForward(torch.autograd.Function):
    """rows and the experts' parameters, kind by kind -> rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...], *parameters: Tensor) -> Tensor:
        """Arguments as in :func:`grouped_feed_forward`."""
        fc1, fc1_bias, fc2, fc2_bias = _by_kind(parameters)
        spans = _spans(sizes)
        hidden = rows.new_empty(rows.shape[0], fc1[0].shape[0])
        out = torch.empty_like(rows)
        for span, weight, bias in zip(spans, fc1, fc1_bias, strict=True):
            torch.addmm(bias, rows[span], weight.t(), out=hidden[span])
        hidden[sum(sizes) :] = 0
        activated = torch.ops.eve_ds.quick_gelu(hidden)
        for span, weight, bias in zip(spans, fc2, fc2_bias, strict=True):
            torch.addmm(bias, activated[span], weight.t(), out=out[span])
        out[sum(sizes) :] = 0
        ctx.save_for_backward(rows, hidden, activated, *fc1, *fc2)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rows and of every parameter."""
        rows, hidden, activated, *weights = ctx.saved_tensors
        fc1, fc2 = weights[: len(weights) // 2], weights[len(weights) // 2 :]
        end = ctx.spans[-1].stop
        d_activated = torch.empty_like(hidden)
        d_activated[end:] = 0
        for span, weight in zip(ctx.spans, fc2, strict=True):
            torch.mm(d_out[span], weight, out=d_activated[span])
        d_hidden = torch.ops.eve_ds.quick_gelu_backward(d_activated, hidden)
        d_rows = torch.empty_like(rows)
        d_rows[end:] = 0
        for span, weight in zip(ctx.spans, fc1, strict=True):
            torch.mm(d_hidden[span], weight, out=d_rows[span])
        return (
            d_rows,
            None,
            *(d_hidden[span].t() @ rows[span] for span in ctx.spans),
            *(d_hidden[span].sum(dim=0) for span in ctx.spans),
            *(d_out[span].t() @ activated[span] for span in ctx.spans),
            *(d_out[span].sum(dim=0) for span in ctx.spans),
        )


def _by_kind(parameters: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Four kinds of equally many tensors."""
    experts = len(parameters) // 4
    return [parameters[kind * experts : (kind + 1) * experts] for kind in range(4)]


def _spans(sizes: tuple[int, ...]) -> list[slice]:
    """The rows of each expert."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> Tensor:
    return torch.ops.eve_ds.quick_gelu_backward(d_out, *ctx.saved_tensors)


torch.library.register_autograd("eve_ds::quick_gelu", _backward, setup_context=_setup, lib=LIBRARY)
