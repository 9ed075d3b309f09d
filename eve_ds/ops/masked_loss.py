"""Masked-loss ops: the compiled ops with autograd where they are loaded, otherwise the reference.

Signatures and semantics are those of :mod:`eve_ds.ops.reference`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from eve_ds.ops import reference
from eve_ds.ops.autocast import keeps_dtypes, like_linear
from eve_ds.ops.build import use_built
from eve_ds.ops.schema import LIBRARY

SMALL_BYTES, CHUNK_BYTES = 2**24, 3 * 2**25
"""Chunk sizes on a CPU. Up to 16 MiB of logits are computed at once, more in two or more chunks of at most 96 MiB:
matrix products of few rows are slow."""
CUDA_CHUNK_BYTES = 2**30
"""Chunk size on a GPU, where few rows are slower still: twice the speed of 96 MiB on an H200 (kernels/README.md)."""
MOST_ROUNDED = 4
"""Most chunks that may be added to a gradient in the weight's own dtype; each addition rounds the sum once."""
SLICE_ROWS = 4096
"""Vocabulary rows per step when the weight gradient accumulates in fp32 while the weight has a smaller dtype."""


@like_linear
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, chunk: int | None = None
) -> Tensor:
    """Summed cross entropy of a vocabulary projection; see :func:`eve_ds.ops.reference.linear_cross_entropy`.

    The forward forms the gradients together with the loss, `chunk` rows at a time (None: see `CHUNK_BYTES` and
    `CUDA_CHUNK_BYTES`), so that (N, V) logits larger than a chunk are never held whole. The backward multiplies these
    gradients by its upstream gradient in place, so it can run only once.
    """
    if not use_built(hidden):
        return reference.linear_cross_entropy(hidden, weight, bias, target)
    if chunk is None:
        chunk = chunk_rows(hidden.shape[0], weight.shape[0] * hidden.element_size(), hidden.device)
    learns = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    return torch.ops.eve_ds.linear_cross_entropy(hidden, weight, bias, target, chunk, learns)[0]


def chunk_rows(rows: int, row_bytes: int, on: torch.device) -> int:
    """Rows per chunk: chunks of equal size, rounded up to a multiple of 64 rows."""
    total = rows * row_bytes
    at_once, largest = (CUDA_CHUNK_BYTES,) * 2 if on.type == "cuda" else (SMALL_BYTES, CHUNK_BYTES)
    if total <= at_once:
        return max(rows, 1)
    pieces = max(math.ceil(total / largest), 2)
    return math.ceil(rows / pieces / 64) * 64


@keeps_dtypes
def masked_pixel_loss(
    pixel_values: Tensor,
    predictions: Tensor,
    masked_patch_ids: Tensor,
    patch_size: int,
    eps: float = 1e-6,
    *,
    normalize: bool = True,
) -> Tensor:
    """Squared error of masked patches; see :func:`eve_ds.ops.reference.masked_pixel_loss`."""
    if not use_built(predictions):
        return reference.masked_pixel_loss(
            pixel_values, predictions, masked_patch_ids, patch_size, eps, normalize=normalize
        )
    pixels = pixel_values.float()
    return torch.ops.eve_ds.masked_pixel_loss(pixels, predictions, masked_patch_ids, patch_size, eps, normalize)[0]


def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, chunk: int, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward op: loss () fp32, then the gradients of hidden, weight and bias, which are empty if not requested.

    Gradients of hidden and weight have the dtypes of these; the gradient of the bias is fp32.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    shift = None if bias is None else bias.float()
    loss = hidden.new_zeros((), dtype=torch.float32)
    if not with_gradients:
        for start in range(0, rows, chunk):
            logits = hidden[start : start + chunk] @ weight.t()
            loss += torch.ops.eve_ds.cross_entropy_inplace_(logits, shift, target[start : start + chunk]).sum()
        return loss, hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0, dtype=torch.float32)
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    d_weight = WeightGradient(weight, chunks=math.ceil(rows / chunk))
    d_bias = hidden.new_zeros(0 if bias is None else vocabulary, dtype=torch.float32)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        logits = hidden[part] @ weight.t()
        loss += torch.ops.eve_ds.cross_entropy_inplace_(logits, shift, target[part]).sum()
        torch.mm(logits, weight, out=d_hidden[part])
        d_weight.add(logits, hidden[part])
        if bias is not None:
            d_bias += logits.sum(dim=0, dtype=torch.float32)
    return loss, d_hidden, d_weight.finish(), d_bias


class WeightGradient:
    """Sum of d_logits^T hidden over chunks; accumulates in fp32 if rounding many partial sums would make it drift."""

    def __init__(self, weight: Tensor, chunks: int) -> None:
        self.dtype = weight.dtype
        self.apart = chunks > MOST_ROUNDED and weight.dtype != torch.float32
        self.total = torch.empty(
            weight.shape, dtype=torch.float32 if self.apart else weight.dtype, device=weight.device
        )
        if self.apart or chunks == 0:
            self.total.zero_()
        self.begun = False

    def add(self, d_logits: Tensor, hidden: Tensor) -> None:
        """Add one chunk: d_logits (n, V) and hidden (n, D)."""
        if self.apart:
            for piece, logits in zip(self.total.split(SLICE_ROWS), d_logits.split(SLICE_ROWS, dim=1), strict=True):
                piece.add_(logits.t() @ hidden)
        elif self.begun:
            self.total.addmm_(d_logits.t(), hidden)
        else:
            torch.mm(d_logits.t(), hidden, out=self.total)
        self.begun = True

    def finish(self) -> Tensor:
        """Gradient (V, D) in the weight's dtype."""
        return self.total.to(self.dtype)


LIBRARY.impl("linear_cross_entropy", _linear_cross_entropy, "CompositeExplicitAutograd")


def _cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, d_hidden, d_weight, d_bias = output
    ctx.gradients = (d_hidden, d_weight, d_bias)
    ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype
    ctx.mark_non_differentiable(d_hidden, d_weight, d_bias)
    ctx.set_materialize_grads(False)


def _cross_entropy_backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.gradients is None:
        raise RuntimeError("linear_cross_entropy runs backward once: its gradients were formed in the forward pass")
    d_hidden, d_weight, d_bias = ctx.gradients
    ctx.gradients = None
    if d_loss is None:
        return None, None, None, None, None, None
    for gradient in (d_hidden, d_weight, d_bias):
        gradient.mul_(d_loss)
    return d_hidden, d_weight, None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype), None, None, None


def _pixel_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pixel_values, predictions, masked_patch_ids, patch_size, *_ = inputs
    _, mean, scale = output
    ctx.save_for_backward(pixel_values, predictions, masked_patch_ids, mean, scale)
    ctx.patch_size = patch_size
    ctx.mark_non_differentiable(mean, scale)


def _pixel_loss_backward(ctx: Any, d_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    d_predictions = torch.ops.eve_ds.masked_pixel_loss_backward(d_losses, *ctx.saved_tensors, ctx.patch_size)
    return None, d_predictions, None, None, None, None


torch.library.register_autograd(
    "eve_ds::linear_cross_entropy", _cross_entropy_backward, setup_context=_cross_entropy_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "eve_ds::masked_pixel_loss", _pixel_loss_backward, setup_context=_pixel_loss_setup, lib=LIBRARY
)
