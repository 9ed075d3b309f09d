"""Schemas and fake kernels of the compiled ops: one place for the CPU and CUDA libraries, which add implementations.

T tokens, E experts, K choices, R rows of the expert buffer, M modalities; `reference.py` defines the semantics of the
ops. Outputs that serve the backward only: `log_sum_exp` (T,), and `mean` and `scale` (B, N), which are 0 and 1 for raw
pixels.

The ops `grouped_*` are the steps of :class:`eve_ds.ops.feed_forward.GroupedProducts` and have no autograd of their own.
Their rows (R, F) are ordered by expert, `bias` (E, F) has the dtype of the rows, and `ends` (E,) int32 is the end row
of each expert. Rows past the last end belong to no expert: the ops write zeros there and ignore the values read there.
`grouped_bias_` without a bias only writes those zeros. Dtypes: fp32 and bf16 on the CPU; also fp16 on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("eve_ds", "DEF")

SCHEMAS = (
    "route_topk(Tensor logits, Tensor? modality_bias, Tensor? modality_ids, Tensor? valid, Tensor? noise, int top_k, "
    "SymInt capacity) -> (Tensor gates, Tensor expert_ids, Tensor slots, Tensor source, Tensor counts, "
    "Tensor probabilities, Tensor first_choices, Tensor probability_sum, Tensor log_sum_exp, Tensor z_sum)",
    "route_topk_backward(Tensor? d_gates, Tensor? d_probability_sum, Tensor? d_z_sum, Tensor probabilities, "
    "Tensor log_sum_exp, Tensor expert_ids, Tensor slots, Tensor gates, Tensor? valid, Tensor? modality_ids, "
    "int modalities) -> (Tensor d_logits, Tensor d_modality_bias)",
    "moe_dispatch(Tensor x, Tensor slots, Tensor source, Tensor? modality_embedding, Tensor? modality_ids) -> Tensor",
    "moe_dispatch_backward(Tensor d_rows, Tensor slots, Tensor? modality_ids, int modalities) "
    "-> (Tensor d_x, Tensor d_modality_embedding)",
    "moe_combine(Tensor expert_rows, Tensor slots, Tensor gates, Tensor source) -> Tensor",
    "moe_combine_backward(Tensor d_out, Tensor expert_rows, Tensor slots, Tensor gates, Tensor source) "
    "-> (Tensor d_rows, Tensor d_gates)",
    "cross_entropy_inplace_(Tensor(a!) logits, Tensor? bias, Tensor target) -> Tensor",
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int chunk, bool with_gradients) "
    "-> (Tensor loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    "masked_pixel_loss(Tensor pixel_values, Tensor predictions, Tensor masked_patch_ids, int patch_size, float eps, "
    "bool normalize) -> (Tensor losses, Tensor mean, Tensor scale)",
    "masked_pixel_loss_backward(Tensor d_losses, Tensor pixel_values, Tensor predictions, Tensor masked_patch_ids, "
    "Tensor mean, Tensor scale, int patch_size) -> Tensor",
    "grouped_feed_forward(Tensor rows, Tensor sizes, Tensor fc1, Tensor fc1_bias, Tensor fc2, Tensor fc2_bias) "
    "-> (Tensor out, Tensor hidden, Tensor activated, Tensor sizes_on_host)",
    "grouped_feed_forward_backward(Tensor d_out, Tensor sizes, Tensor rows, Tensor hidden, Tensor activated, "
    "Tensor fc1, Tensor fc2) -> (Tensor d_rows, Tensor d_fc1, Tensor d_fc1_bias, Tensor d_fc2, Tensor d_fc2_bias)",
    "quick_gelu(Tensor x) -> Tensor",
    "quick_gelu_backward(Tensor d_out, Tensor x) -> Tensor",
    "grouped_bias_quick_gelu(Tensor x, Tensor bias, Tensor ends) -> Tensor",
    "grouped_bias_quick_gelu_backward(Tensor d_out, Tensor x, Tensor bias, Tensor ends) -> (Tensor d_x, Tensor d_bias)",
    "grouped_bias_(Tensor(a!) x, Tensor? bias, Tensor ends) -> ()",
    "grouped_bias_backward(Tensor d_out, Tensor ends) -> Tensor",
)
for schema in SCHEMAS:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"eve_ds::{name}", lib=LIBRARY)


@_fake("route_topk")
def _route_topk(
    logits: Tensor,
    modality_bias: Tensor | None,
    modality_ids: Tensor | None,
    valid: Tensor | None,
    noise: Tensor | None,
    top_k: int,
    capacity: int,
) -> tuple[Tensor, ...]:
    tokens, experts = logits.shape
    ids = logits.new_empty((tokens, top_k), dtype=torch.int64)
    rows = tokens * top_k if capacity < 0 else experts * capacity
    return (
        logits.new_empty(ids.shape),
        ids,
        torch.empty_like(ids),
        ids.new_empty(rows),
        ids.new_empty(experts),
        logits.new_empty(tokens, experts),
        logits.new_empty(experts),
        logits.new_empty(experts),
        logits.new_empty(tokens),
        logits.new_empty(()),
    )


@_fake("route_topk_backward")
def _route_topk_backward(
    d_gates: Tensor | None,
    d_probability_sum: Tensor | None,
    d_z_sum: Tensor | None,
    probabilities: Tensor,
    log_sum_exp: Tensor,
    expert_ids: Tensor,
    slots: Tensor,
    gates: Tensor,
    valid: Tensor | None,
    modality_ids: Tensor | None,
    modalities: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(probabilities), probabilities.new_empty(modalities, probabilities.shape[1])


@_fake("moe_dispatch")
def _moe_dispatch(
    x: Tensor, slots: Tensor, source: Tensor, modality_embedding: Tensor | None, modality_ids: Tensor | None
) -> Tensor:
    return x.new_empty(source.shape[0], x.shape[1])


@_fake("moe_dispatch_backward")
def _moe_dispatch_backward(
    d_rows: Tensor, slots: Tensor, modality_ids: Tensor | None, modalities: int
) -> tuple[Tensor, Tensor]:
    width = d_rows.shape[1]
    return d_rows.new_empty(slots.shape[0], width), d_rows.new_empty((modalities, width), dtype=torch.float32)


@_fake("moe_combine")
def _moe_combine(expert_rows: Tensor, slots: Tensor, gates: Tensor, source: Tensor) -> Tensor:
    return expert_rows.new_empty(slots.shape[0], expert_rows.shape[1])


@_fake("moe_combine_backward")
def _moe_combine_backward(
    d_out: Tensor, expert_rows: Tensor, slots: Tensor, gates: Tensor, source: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty(expert_rows.shape, dtype=expert_rows.dtype, device=d_out.device), torch.empty(
        gates.shape, device=d_out.device
    )


@_fake("cross_entropy_inplace_")
def _cross_entropy_inplace_(logits: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@_fake("linear_cross_entropy")
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, chunk: int, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    if not with_gradients:
        return loss, hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0, dtype=torch.float32)
    d_bias = hidden.new_empty(weight.shape[0] if bias is not None else 0, dtype=torch.float32)
    return loss, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), d_bias


@_fake("masked_pixel_loss")
def _masked_pixel_loss(
    pixel_values: Tensor,
    predictions: Tensor,
    masked_patch_ids: Tensor,
    patch_size: int,
    eps: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = masked_patch_ids.shape
    return pixel_values.new_empty(shape), pixel_values.new_empty(shape), pixel_values.new_empty(shape)


@_fake("masked_pixel_loss_backward")
def _masked_pixel_loss_backward(
    d_losses: Tensor,
    pixel_values: Tensor,
    predictions: Tensor,
    masked_patch_ids: Tensor,
    mean: Tensor,
    scale: Tensor,
    patch_size: int,
) -> Tensor:
    return predictions.new_empty(predictions.shape)


@_fake("grouped_feed_forward")
def _grouped_feed_forward(
    rows: Tensor, sizes: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = rows.new_empty(rows.shape[0], fc1.shape[1])
    return torch.empty_like(rows), hidden, torch.empty_like(hidden), torch.empty_like(sizes, device="cpu")


@_fake("grouped_feed_forward_backward")
def _grouped_feed_forward_backward(
    d_out: Tensor, sizes: Tensor, rows: Tensor, hidden: Tensor, activated: Tensor, fc1: Tensor, fc2: Tensor
) -> tuple[Tensor, ...]:
    biases = (fc1.new_empty(weight.shape[:2]) for weight in (fc1, fc2))
    return torch.empty_like(rows), torch.empty_like(fc1), next(biases), torch.empty_like(fc2), next(biases)


@_fake("quick_gelu")
def _quick_gelu(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_fake("quick_gelu_backward")
def _quick_gelu_backward(d_out: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_fake("grouped_bias_quick_gelu")
def _grouped_bias_quick_gelu(x: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_fake("grouped_bias_quick_gelu_backward")
def _grouped_bias_quick_gelu_backward(d_out: Tensor, x: Tensor, bias: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return d_out.new_empty(d_out.shape), bias.new_empty(bias.shape)


@_fake("grouped_bias_")
def _grouped_bias_(x: Tensor, bias: Tensor | None, ends: Tensor) -> None:
    return None


@_fake("grouped_bias_backward")
def _grouped_bias_backward(d_out: Tensor, ends: Tensor) -> Tensor:
    return d_out.new_empty(ends.shape[0], d_out.shape[1])
