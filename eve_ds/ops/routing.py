"""Routing ops: the compiled ops with autograd where they are loaded, otherwise the reference.

Semantics are those of :mod:`eve_ds.ops.reference`; signatures too, but `route_topk` here has no `group_sizes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eve_ds.ops import reference
from eve_ds.ops.autocast import keeps_dtypes
from eve_ds.ops.build import use_built
from eve_ds.ops.reference import Routing, sum_groups
from eve_ds.ops.schema import LIBRARY

GATES, EXPERT_IDS, SLOTS, SOURCE, COUNTS, PROBABILITIES, FIRST_CHOICES, PROBABILITY_SUM, LOG_SUM_EXP, Z_SUM = range(10)
"""Index of each output of the op `route_topk`."""
CONSTANT = (EXPERT_IDS, SLOTS, SOURCE, COUNTS, PROBABILITIES, FIRST_CHOICES, LOG_SUM_EXP)
"""Indices of the outputs that have no gradient."""
FOR_BACKWARD = (PROBABILITIES, LOG_SUM_EXP, EXPERT_IDS, SLOTS, GATES)
"""Indices of the outputs that the backward reads, in the order of its arguments."""
CPU_MULTIPLIES_BF16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether bf16 products are at least as fast as fp32 on this CPU; without AVX-512 they take ten times as long."""


@keeps_dtypes
def route_topk(
    logits: Tensor,
    *,
    top_k: int,
    capacity: int,
    modality_bias: Tensor | None = None,
    modality_ids: Tensor | None = None,
    valid: Tensor | None = None,
    noise: Tensor | None = None,
) -> Routing:
    """Choose experts and assign rows; see :func:`eve_ds.ops.reference.route_topk`."""
    if not use_built(logits):
        return reference.route_topk(
            logits,
            top_k=top_k,
            capacity=capacity,
            modality_bias=modality_bias,
            modality_ids=modality_ids,
            valid=valid,
            noise=noise,
        )
    bias = None if modality_bias is None else modality_bias.float()
    ids = None if modality_bias is None else modality_ids
    return _routing(torch.ops.eve_ds.route_topk(logits.float(), bias, ids, valid, noise, top_k, capacity))


def moe_dispatch(
    x: Tensor,
    slots: Tensor,
    source: Tensor,
    modality_embedding: Tensor | None = None,
    modality_ids: Tensor | None = None,
) -> Tensor:
    """Copy tokens to rows; see :func:`eve_ds.ops.reference.moe_dispatch`."""
    if not use_built(x):
        return reference.moe_dispatch(x, slots, source, modality_embedding, modality_ids)
    if modality_embedding is None:
        return torch.ops.eve_ds.moe_dispatch(x, slots, source, None, None)
    return torch.ops.eve_ds.moe_dispatch(x, slots, source, modality_embedding.float(), modality_ids)


@keeps_dtypes
def moe_combine(expert_rows: Tensor, slots: Tensor, gates: Tensor, source: Tensor) -> Tensor:
    """Sum the weighted rows of each token; see :func:`eve_ds.ops.reference.moe_combine`."""
    if not use_built(expert_rows):
        return reference.moe_combine(expert_rows, slots, gates, source)
    return torch.ops.eve_ds.moe_combine(expert_rows, slots, gates, source)


@keeps_dtypes
def route_and_dispatch(
    x: Tensor,
    weight: Tensor,
    modality_embedding: Tensor,
    modality_ids: Tensor,
    *,
    top_k: int,
    capacity: int,
    valid: Tensor | None = None,
    noise: Tensor | None = None,
    group_sizes: Sequence[int] | None = None,
    embed_rows: bool = False,
    announce: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Routing]:
    """Run router, routing and dispatch; see :func:`eve_ds.ops.reference.route_and_dispatch`.

    All of it is one autograd node: the backward adds the router's gradient to the gradient through the rows in place.
    On CUDA the router multiplies bf16 or fp16 operands directly and accumulates in fp32.
    """
    if not use_built(x):
        return reference.route_and_dispatch(
            x,
            weight,
            modality_embedding,
            modality_ids,
            top_k=top_k,
            capacity=capacity,
            valid=valid,
            noise=noise,
            group_sizes=group_sizes,
            embed_rows=embed_rows,
            announce=announce,
        )
    rows, *routed = RouteAndDispatch.apply(
        x, weight, modality_embedding, modality_ids, valid, noise, top_k, capacity, group_sizes, embed_rows, announce
    )
    return rows, _routing(routed)


class RouteAndDispatch(torch.autograd.Function):
    """Autograd node from x, router weight and modality embedding to rows and the outputs of the op `route_topk`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        modality_embedding: Tensor,
        modality_ids: Tensor,
        valid: Tensor | None,
        noise: Tensor | None,
        top_k: int,
        capacity: int,
        group_sizes: Sequence[int] | None,
        embed_rows: bool,
        announce: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor, ...]:
        """Arguments of :func:`route_and_dispatch`."""
        ops = torch.ops.eve_ds
        router, embedding = weight.float(), modality_embedding.float()
        if _multiplies_in_low_precision(x, weight):
            logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        else:
            logits = x.float() @ router.t()
        bias = embedding @ router.t()
        routed = ops.route_topk(logits, bias, modality_ids, valid, noise, top_k, capacity)
        if group_sizes is not None:
            routed = _sums_by_group(routed, valid, group_sizes)
        if announce is not None:
            announce(routed[COUNTS])
        added = (embedding, modality_ids) if embed_rows else (None, None)
        rows = ops.moe_dispatch(x, routed[SLOTS], routed[SOURCE], *added)
        saved = (routed[place] for place in FOR_BACKWARD)
        ctx.save_for_backward(x, weight, modality_embedding, modality_ids, valid, *saved)
        ctx.embed_rows, ctx.group_sizes = embed_rows, group_sizes
        ctx.mark_non_differentiable(*(routed[place] for place in CONSTANT))
        ctx.set_materialize_grads(False)
        return rows, *routed

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor | None, *d_routed: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and modality embedding."""
        x, weight, modality_embedding, modality_ids, valid, *routed = ctx.saved_tensors
        ops = torch.ops.eve_ds
        slots, num_modalities = routed[3], modality_embedding.shape[0]
        upstream = (d_routed[GATES], d_routed[PROBABILITY_SUM], d_routed[Z_SUM])
        saved = (*routed, valid, modality_ids)
        if ctx.group_sizes is None:
            d_logits, d_bias = ops.route_topk_backward(*upstream, *saved, num_modalities)
        else:
            d_logits, d_bias = _route_backward_by_group(upstream, saved, num_modalities, ctx.group_sizes)
        router, embedding = weight.float(), modality_embedding.float()
        d_embedding = d_bias @ router
        if d_rows is None:
            d_x = torch.zeros_like(x)
        else:
            d_x, through_rows = ops.moe_dispatch_backward(
                d_rows, slots, modality_ids, num_modalities if ctx.embed_rows else 0
            )
            if ctx.embed_rows:
                d_embedding += through_rows
        d_logits_short = d_logits.to(x.dtype)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not CPU_MULTIPLIES_BF16:
            d_x.add_(d_logits @ router)
        else:
            d_x.addmm_(d_logits_short, weight.to(x.dtype))
        if _multiplies_in_low_precision(x, weight):
            d_weight = torch.mm(d_logits_short.t(), x, out_dtype=torch.float32)
        else:
            d_weight = d_logits.t() @ x.float()
        d_weight += d_bias.t() @ embedding
        d_weight, d_embedding = d_weight.to(weight.dtype), d_embedding.to(modality_embedding.dtype)
        return d_x, d_weight, d_embedding, *(None,) * 8


def _multiplies_in_low_precision(x: Tensor, weight: Tensor) -> bool:
    """Whether the router multiplies in the shared dtype of both operands, bf16 or fp16, with fp32 products and sums.

    Products of two such numbers are exact in fp32, so the logits differ from those of widened operands only by the
    order of the sums. The gradient of the logits is rounded for the weight gradient, as it is for the gradient of x.
    CUDA only: the CPU has no such product.
    """
    return x.device.type == "cuda" and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)


def _sums_by_group(routed: Sequence[Tensor], valid: Tensor | None, group_sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Outputs of the op `route_topk`, with the sums over tokens taken separately for each group of tokens."""
    parts = list(routed)
    probabilities = routed[PROBABILITIES]
    counted = torch.ones_like(routed[LOG_SUM_EXP]) if valid is None else valid.to(probabilities.dtype)
    chosen = torch.zeros_like(probabilities).scatter_(1, routed[EXPERT_IDS][:, :1], counted.unsqueeze(1))
    parts[FIRST_CHOICES] = sum_groups(chosen, group_sizes)
    parts[PROBABILITY_SUM] = sum_groups(probabilities * counted.unsqueeze(1), group_sizes)
    parts[Z_SUM] = sum_groups(routed[LOG_SUM_EXP].square() * counted, group_sizes)
    return tuple(parts)


def _route_backward_by_group(
    upstream: tuple[Tensor | None, ...],
    saved: tuple[Tensor | None, ...],
    num_modalities: int,
    group_sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Run the op `route_topk_backward`, which works token by token, on each group with the gradient of that group's
    sums.

    Args:
        upstream: gradients of gates (T, K), probability sums (G, E) and z sums (G,), or None.
        saved: (T, ...) tensors or None, in the op's order.
        num_modalities: rows of the modality bias.
        group_sizes: tokens of each group.
    """
    d_gates, d_probability_sum, d_z_sum = upstream
    by_token = [
        [None] * len(group_sizes) if tensor is None else tensor.split(list(group_sizes)) for tensor in (d_gates, *saved)
    ]
    by_group = [[None] * len(group_sizes) if tensor is None else tensor for tensor in (d_probability_sum, d_z_sum)]
    d_logits, d_bias = zip(
        *(
            torch.ops.eve_ds.route_topk_backward(gates, probability_sum, z_sum, *rest, num_modalities)
            for probability_sum, z_sum, gates, *rest in zip(*by_group, *by_token, strict=True)
        ),
        strict=True,
    )
    return torch.cat(d_logits), torch.stack(d_bias).sum(dim=0)


def _routing(routed: Any) -> Routing:
    """Outputs of the op as a named tuple."""
    return Routing(
        expert_ids=routed[EXPERT_IDS],
        slots=routed[SLOTS],
        gates=routed[GATES],
        source=routed[SOURCE],
        counts=routed[COUNTS],
        probabilities=routed[PROBABILITIES],
        first_choices=routed[FIRST_CHOICES],
        probability_sum=routed[PROBABILITY_SUM],
        z_sum=routed[Z_SUM],
    )


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, modality_bias, modality_ids, valid, *_ = inputs
    ctx.save_for_backward(*(output[place] for place in FOR_BACKWARD), valid, modality_ids)
    ctx.num_modalities = 0 if modality_bias is None else modality_bias.shape[0]
    ctx.mark_non_differentiable(*(output[place] for place in CONSTANT))
    ctx.set_materialize_grads(False)


def _route_backward(ctx: Any, *d_routed: Tensor | None) -> tuple[Tensor | None, ...]:
    d_logits, d_bias = torch.ops.eve_ds.route_topk_backward(
        d_routed[GATES], d_routed[PROBABILITY_SUM], d_routed[Z_SUM], *ctx.saved_tensors, ctx.num_modalities
    )
    return d_logits, d_bias if ctx.num_modalities else None, None, None, None, None, None


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, slots, _, modality_embedding, modality_ids = inputs
    ctx.save_for_backward(slots, modality_ids)
    ctx.num_modalities = 0 if modality_embedding is None else modality_embedding.shape[0]


def _dispatch_backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
    d_x, d_embedding = torch.ops.eve_ds.moe_dispatch_backward(d_rows, *ctx.saved_tensors, ctx.num_modalities)
    return d_x, None, None, d_embedding if ctx.num_modalities else None, None


def _combine_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    d_rows, d_gates = torch.ops.eve_ds.moe_combine_backward(d_out, *ctx.saved_tensors)
    return d_rows, None, d_gates, None


torch.library.register_autograd("eve_ds::route_topk", _route_backward, setup_context=_route_setup, lib=LIBRARY)
torch.library.register_autograd("eve_ds::moe_dispatch", _dispatch_backward, setup_context=_dispatch_setup, lib=LIBRARY)
torch.library.register_autograd("eve_ds::moe_combine", _combine_backward, setup_context=_combine_setup, lib=LIBRARY)
