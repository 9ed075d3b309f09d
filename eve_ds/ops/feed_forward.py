"""Feed-forward ops: the activation in one pass, and the feed-forward networks of all experts as one autograd node.

Signatures and semantics are those of :mod:`eve_ds.ops.reference`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.ops import reference
from eve_ds.ops.autocast import like_linear
from eve_ds.ops.build import mode, use_built
from eve_ds.ops.schema import LIBRARY


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x); see :func:`eve_ds.ops.reference.quick_gelu`."""
    return torch.ops.eve_ds.quick_gelu(x) if use_built(x) else reference.quick_gelu(x)


@like_linear
def grouped_feed_forward(
    rows: Tensor, sizes: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor
) -> Tensor:
    """Apply every expert to its rows; see :func:`eve_ds.ops.reference.grouped_feed_forward`.

    On a GPU that has grouped products for bf16, this runs :func:`grouped_products`, which keeps the sizes on the
    device. Elsewhere it runs one matrix product per expert, written directly into its place in the result, and one
    activation pass over all rows, so that nothing is split and concatenated. In that form a GPU (fp32, fp16, or older
    than sm_90) makes the host wait for the sizes once per forward pass and never in a backward pass.
    """
    if _has_grouped_products(rows, fc1):
        return grouped_products(rows, sizes, fc1, fc1_bias, fc2, fc2_bias)
    if not use_built(rows):
        return reference.grouped_feed_forward(rows, sizes, fc1, fc1_bias, fc2, fc2_bias)
    return torch.ops.eve_ds.grouped_feed_forward(rows, sizes, fc1, fc1_bias, fc2, fc2_bias)[0]


def _has_grouped_products(rows: Tensor, fc1: Tensor) -> bool:
    """Whether `F.grouped_mm` has a kernel of its own here: bf16 on sm_90 or newer, with rows of whole 16 bytes.

    Without such a kernel, `F.grouped_mm` loops over the experts and the host waits in each of six products. On the CPU
    it also copies, and is slower than our op; see the log in kernels/README.md.
    """
    return (
        rows.device.type == "cuda"
        and rows.dtype == fc1.dtype == torch.bfloat16
        and len(rows) > 0
        and all(size % 8 == 0 for size in fc1.shape[1:])
        and mode() != "reference"
        and torch.cuda.get_device_capability(rows.device) >= (9, 0)
    )


def grouped_products(
    rows: Tensor, sizes: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor
) -> Tensor:
    """Same result as :func:`grouped_feed_forward`, computed by `F.grouped_mm`.

    The sizes stay on the device and the host never waits for them. Between the products, the compiled ops make one pass
    over the hidden states in the forward and one in the backward. Without compiled ops these are several passes.
    """
    ends = sizes.cumsum(0, dtype=torch.int32)
    if use_built(rows):
        return GroupedProducts.apply(rows, ends, fc1, fc1_bias, fc2, fc2_bias)
    hidden = reference.grouped_linear(rows, ends, fc1, fc1_bias)
    return reference.grouped_linear(quick_gelu(hidden), ends, fc2, fc2_bias)


class GroupedProducts(torch.autograd.Function):
    """Autograd node from rows and expert parameters to output rows.

    Grouped products leave rows that belong to no expert untouched. The ops between the products write zeros there.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, ends: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor
    ) -> Tensor:
        """Arguments of :func:`grouped_feed_forward`, except that `ends` (E,) int32, the end row of each expert,
        replaces `sizes`.
        """
        rows = rows.contiguous()
        product = F.grouped_mm(rows, fc1.transpose(1, 2), offs=ends)
        activated = torch.ops.eve_ds.grouped_bias_quick_gelu(product, fc1_bias, ends)
        out = F.grouped_mm(activated, fc2.transpose(1, 2), offs=ends)
        torch.ops.eve_ds.grouped_bias_(out, fc2_bias, ends)
        ctx.save_for_backward(rows, ends, product, activated, fc1, fc1_bias, fc2)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rows and of every parameter, by the same products that autograd uses for `F.grouped_mm`."""
        rows, ends, product, activated, fc1, fc1_bias, fc2 = ctx.saved_tensors
        ops = torch.ops.eve_ds
        d_out = d_out.contiguous()
        d_activated = F.grouped_mm(d_out, fc2, offs=ends)
        d_hidden, d_fc1_bias = ops.grouped_bias_quick_gelu_backward(d_activated, product, fc1_bias, ends)
        d_rows = F.grouped_mm(d_hidden, fc1, offs=ends)
        ops.grouped_bias_(d_rows, None, ends)
        d_fc1 = F.grouped_mm(d_hidden.t(), rows, offs=ends)
        d_fc2 = F.grouped_mm(d_out.t(), activated, offs=ends)
        return d_rows, None, d_fc1, d_fc1_bias, d_fc2, ops.grouped_bias_backward(d_out, ends)


def _grouped_feed_forward(
    rows: Tensor, sizes: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward op: outputs (R, D), hidden and activated states (R, F) for the backward, and the sizes on the host."""
    on_host = sizes.to("cpu", copy=True)  # the host waits for a GPU here
    spans, end = _spans(on_host)
    hidden = rows.new_empty(rows.shape[0], fc1.shape[1])
    out = torch.empty_like(rows)
    for span, weight, bias in zip(spans, fc1, fc1_bias, strict=True):
        torch.addmm(bias, rows[span], weight.t(), out=hidden[span])
    hidden[end:] = 0
    activated = torch.ops.eve_ds.quick_gelu(hidden)
    for span, weight, bias in zip(spans, fc2, fc2_bias, strict=True):
        torch.addmm(bias, activated[span], weight.t(), out=out[span])
    out[end:] = 0
    return out, hidden, activated, on_host


def _grouped_feed_forward_backward(
    d_out: Tensor, sizes: Tensor, rows: Tensor, hidden: Tensor, activated: Tensor, fc1: Tensor, fc2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward op: gradients of the rows and of every parameter."""
    spans, end = _spans(sizes)
    d_activated = torch.empty_like(hidden)
    d_activated[end:] = 0
    for span, weight in zip(spans, fc2, strict=True):
        torch.mm(d_out[span], weight, out=d_activated[span])
    d_hidden = torch.ops.eve_ds.quick_gelu_backward(d_activated, hidden)
    d_rows = torch.empty_like(rows)
    d_rows[end:] = 0
    for span, weight in zip(spans, fc1, strict=True):
        torch.mm(d_hidden[span], weight, out=d_rows[span])
    d_fc1, d_fc1_bias = _parameter_gradients(spans, d_hidden, rows)
    d_fc2, d_fc2_bias = _parameter_gradients(spans, d_out, activated)
    return d_rows, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias


LIBRARY.impl("grouped_feed_forward", _grouped_feed_forward, "CompositeExplicitAutograd")
LIBRARY.impl("grouped_feed_forward_backward", _grouped_feed_forward_backward, "CompositeExplicitAutograd")


def _parameter_gradients(spans: list[slice], d_out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of stacked linear weights and biases, from the gradient of the outputs and the inputs `x`."""
    weight = x.new_empty(len(spans), d_out.shape[1], x.shape[1])
    bias = x.new_empty(len(spans), d_out.shape[1])
    for span, d_weight, d_bias in zip(spans, weight, bias, strict=True):
        torch.mm(d_out[span].t(), x[span], out=d_weight)
        torch.sum(d_out[span], dim=0, out=d_bias)
    return weight, bias


def _spans(sizes: Tensor) -> tuple[list[slice], int]:
    """Row range of each expert, and the end of the last range."""
    filled = sizes.tolist()
    ends = list(accumulate(filled))
    return [slice(end - size, end) for size, end in zip(filled, ends, strict=True)], ends[-1]


def _grouped_setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    rows, _, fc1, _, fc2, _ = inputs
    _, hidden, activated, sizes = output
    ctx.save_for_backward(sizes, rows, hidden, activated, fc1, fc2)
    ctx.mark_non_differentiable(hidden, activated, sizes)
    ctx.set_materialize_grads(False)


def _grouped_backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 6
    d_rows, *d_parameters = torch.ops.eve_ds.grouped_feed_forward_backward(d_out, *ctx.saved_tensors)
    return d_rows, None, *d_parameters


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> Tensor:
    return torch.ops.eve_ds.quick_gelu_backward(d_out, *ctx.saved_tensors)


torch.library.register_autograd(
    "eve_ds::grouped_feed_forward", _grouped_backward, setup_context=_grouped_setup, lib=LIBRARY
)
torch.library.register_autograd("eve_ds::quick_gelu", _backward, setup_context=_setup, lib=LIBRARY)
