"""Feed-forward ops: activation in one pass, and the networks of all experts as one autograd node.

Signatures and meaning are those of :mod:`eve_ds.ops.reference`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.ops import reference
from eve_ds.ops.build import mode, use_built
from eve_ds.ops.schema import LIBRARY


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x); see :func:`eve_ds.ops.reference.quick_gelu`."""
    return torch.ops.eve_ds.quick_gelu(x) if use_built(x) else reference.quick_gelu(x)


def grouped_feed_forward(
    rows: Tensor, sizes: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor
) -> Tensor:
    """All experts on their rows; see :func:`eve_ds.ops.reference.grouped_feed_forward`.

    On the CPU one matrix product per expert, written where its result belongs, and one activation for all: nothing is
    cut apart and put together again. In bf16 on CUDA grouped products, for which the host need not know the sizes.
    """
    if _has_grouped_products(rows, fc1):
        return grouped_products(rows, sizes, fc1, fc1_bias, fc2, fc2_bias)
    if rows.device.type != "cpu" or not use_built(rows):
        return reference.grouped_feed_forward(rows, sizes, fc1, fc1_bias, fc2, fc2_bias)
    return GroupedFeedForward.apply(rows, tuple(sizes.tolist()), fc1, fc1_bias, fc2, fc2_bias)


def _has_grouped_products(rows: Tensor, fc1: Tensor) -> bool:
    """Where `F.grouped_mm` has a kernel of its own: bf16 from sm_80 on, rows of whole 16 bytes.

    On the CPU it is a loop over the experts with copies, slower than ours: see the log of kernels/README.md.
    """
    return (
        rows.device.type == "cuda"
        and rows.dtype == fc1.dtype == torch.bfloat16
        and all(size % 8 == 0 for size in fc1.shape[1:])
        and mode() != "reference"
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    )


def grouped_products(
    rows: Tensor, sizes: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor
) -> Tensor:
    """As :func:`grouped_feed_forward` on `F.grouped_mm`; sizes stay on the device.

    Grouped products leave rows of no expert as they find them, in forward and backward: those are set to zero wherever
    they would enter a sum.
    """
    ends = sizes.cumsum(0)
    expert = torch.searchsorted(ends, torch.arange(len(rows), device=rows.device), right=True).unsqueeze(1)  # (R, 1)
    member = (expert == torch.arange(len(sizes), device=rows.device)).to(rows.dtype)  # (R, E) 0 or 1
    filled, offsets = expert < len(sizes), ends.to(torch.int32)

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        product = F.grouped_mm(x.where(filled, 0), weight.transpose(1, 2), offs=offsets)
        return torch.addmm(product.where(filled, 0), member, bias)

    return linear(quick_gelu(linear(rows, fc1, fc1_bias)), fc2, fc2_bias)


class GroupedFeedForward(torch.autograd.Function):
    """rows and the experts' parameters -> rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sizes: tuple[int, ...], fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor
    ) -> Tensor:
        """Arguments as in :func:`grouped_feed_forward`, `sizes` on the host."""
        spans = _spans(sizes)
        hidden = rows.new_empty(rows.shape[0], fc1.shape[1])
        out = torch.empty_like(rows)
        for span, weight, bias in zip(spans, fc1, fc1_bias, strict=True):
            torch.addmm(bias, rows[span], weight.t(), out=hidden[span])
        hidden[sum(sizes) :] = 0
        activated = torch.ops.eve_ds.quick_gelu(hidden)
        for span, weight, bias in zip(spans, fc2, fc2_bias, strict=True):
            torch.addmm(bias, activated[span], weight.t(), out=out[span])
        out[sum(sizes) :] = 0
        ctx.save_for_backward(rows, hidden, activated, fc1, fc2)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rows and of every parameter."""
        rows, hidden, activated, fc1, fc2 = ctx.saved_tensors
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
        d_fc1, d_fc1_bias = _parameter_gradients(ctx.spans, d_hidden, rows)
        d_fc2, d_fc2_bias = _parameter_gradients(ctx.spans, d_out, activated)
        return d_rows, None, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias


def _parameter_gradients(spans: list[slice], d_out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the stacked weights and biases of linear layers, from that of their outputs and their inputs."""
    weight = x.new_empty(len(spans), d_out.shape[1], x.shape[1])
    bias = x.new_empty(len(spans), d_out.shape[1])
    for span, d_weight, d_bias in zip(spans, weight, bias, strict=True):
        torch.mm(d_out[span].t(), x[span], out=d_weight)
        torch.sum(d_out[span], dim=0, out=d_bias)
    return weight, bias


def _spans(sizes: tuple[int, ...]) -> list[slice]:
    """The rows of each expert."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> Tensor:
    return torch.ops.eve_ds.quick_gelu_backward(d_out, *ctx.saved_tensors)


torch.library.register_autograd("eve_ds::quick_gelu", _backward, setup_context=_setup, lib=LIBRARY)
