"""The operations of an EVE step in plain torch: these functions define what is correct.

Arithmetic is fp32 whatever the dtype of the tokens, and fp64 where they are that. Integers use int64, and -1 stands for
"none": a route that was dropped, a row that is empty. Ties between experts go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """The tensor in the dtype that is computed in: fp32, or fp64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


class Routing(NamedTuple):
    """Where every token goes. T tokens, E experts, K choices, R rows of the expert buffer."""

    expert_ids: Tensor
    """(T, K) int64, best expert first."""
    slots: Tensor
    """(T, K) int64 row of the expert buffer, -1 where the route is dropped or the token is not valid."""
    gates: Tensor
    """(T, K) fp32 weight of each choice, 0 where dropped."""
    source: Tensor
    """(R,) int64 token that fills each row, -1 for an empty row."""
    counts: Tensor
    """(E,) int64 filled rows per expert."""
    probabilities: Tensor
    """(T, E) fp32 softmax of the logits, without gradient: for statistics."""
    first_choices: Tensor
    """(E,) fp32 valid tokens whose best expert this is; (G, E) where G groups of tokens are kept apart."""
    probability_sum: Tensor
    """(E,) or (G, E) fp32 sum of probabilities over valid tokens."""
    z_sum: Tensor
    """() or (G,) fp32 sum over valid tokens of logsumexp(logits)^2 (ST-MoE eq. 5)."""


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float, min_capacity: int) -> int:
    """Slots per expert: ceil(K * factor * T / E), and no less than `min_capacity` (GShard section 2.2).

    The factor counts as the decimal it is written as: 1.1 times 10 tokens is 11 slots, not ceil(11.000000000000002).
    """
    return slots_of_share(num_tokens, capacity_share(num_experts, top_k, capacity_factor), min_capacity)


def capacity_share(num_experts: int, top_k: int, capacity_factor: float) -> tuple[int, int]:
    """Slots per expert and token, as numerator and denominator; for :func:`slots_of_share`."""
    share = Fraction(str(capacity_factor)) * top_k / num_experts
    return share.numerator, share.denominator


def slots_of_share(num_tokens: int, share: tuple[int, int], min_capacity: int) -> int:
    """As :func:`expert_capacity`, in whole numbers only, which a compiler traces for any number of tokens."""
    return max(-(-share[0] * num_tokens // share[1]), min_capacity)


def route_topk(
    logits: Tensor,
    *,
    top_k: int,
    capacity: int,
    modality_bias: Tensor | None = None,
    modality_ids: Tensor | None = None,
    valid: Tensor | None = None,
    noise: Tensor | None = None,
    group_sizes: Sequence[int] | None = None,
) -> Routing:
    """Choose experts, give out rows first choices first, and weigh the choices that got one (GShard algorithm 1).

    Args:
        logits: (T, E) router logits; computed in fp32.
        top_k: choices per token, at most E.
        capacity: rows per expert, expert e owning rows [e * capacity, (e + 1) * capacity); negative means dropless:
            rows are packed by expert, R = T * K, and rows past `counts.sum()` are empty.
        modality_bias: (M, E) logits added by modality.
        modality_ids: (T,) int64 in [0, M), needed with `modality_bias`.
        valid: (T,) bool; other tokens get no row and enter no statistic.
        noise: (T, E) added to the logits for every choice after the first (Gumbel noise in GShard).
        group_sizes: tokens of groups that stand one after the other and whose sums are kept apart; None: one sum of
            all, without a dimension of groups.

    Returns:
        Routing. Gates of kept choices sum to 1, or are the plain probability when `top_k` is 1 (Switch), since a
        renormalised single gate would be constant and teach the router nothing.
    """
    num_tokens, num_experts = logits.shape
    logits = widen(logits)
    if modality_bias is not None and modality_ids is not None:
        logits = logits + widen(modality_bias)[modality_ids]
    probabilities = logits.softmax(dim=-1)
    expert_ids = _choose(logits, top_k, noise)
    if valid is None:
        valid = torch.ones(num_tokens, dtype=torch.bool, device=logits.device)
    slots, source, counts = _assign_rows(expert_ids, valid, num_experts, capacity)
    gates = probabilities.gather(1, expert_ids) * (slots >= 0)
    if top_k > 1:
        gates = gates / gates.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    first = F.one_hot(expert_ids[:, 0], num_experts).to(logits.dtype)
    return Routing(
        expert_ids=expert_ids,
        slots=slots,
        gates=gates,
        source=source,
        counts=counts,
        probabilities=probabilities.detach(),
        first_choices=sum_groups(first * valid.unsqueeze(1), group_sizes),
        probability_sum=sum_groups(probabilities * valid.unsqueeze(1), group_sizes),
        z_sum=sum_groups(logits.logsumexp(dim=-1).square() * valid, group_sizes),
    )


def sum_groups(values: Tensor, group_sizes: Sequence[int] | None) -> Tensor:
    """Sum over the first dimension: (T, ...) -> (...), or (G, ...) for `group_sizes` of rows in turn."""
    if group_sizes is None:
        return values.sum(dim=0)
    return torch.stack([group.sum(dim=0) for group in values.split(list(group_sizes))])


def _choose(logits: Tensor, top_k: int, noise: Tensor | None) -> Tensor:
    """(T, K) expert ids by repeated argmax, which (unlike topk) promises the lowest index on ties."""
    scores = logits.detach()
    choices = [scores.argmax(dim=1)]
    if noise is not None:
        scores = scores + noise
    for _ in range(top_k - 1):
        scores = scores.scatter(1, choices[-1].unsqueeze(1), float("-inf"))
        choices.append(scores.argmax(dim=1))
    return torch.stack(choices, dim=1)


def _assign_rows(expert_ids: Tensor, valid: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give each route a row: all first choices in token order, then all second choices, and so on."""
    num_tokens, top_k = expert_ids.shape
    nobody = torch.full_like(expert_ids, num_experts)
    owner = torch.where(valid.unsqueeze(1), expert_ids, nobody).t().reshape(-1)  # (K * T,), choice-major
    order = owner.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    routes = torch.bincount(owner, minlength=num_experts + 1)
    starts = routes.cumsum(0) - routes
    position = rank - starts[owner]
    routed = owner < num_experts
    if capacity < 0:
        rows, num_rows, counts = rank, num_tokens * top_k, routes[:num_experts]
    else:
        routed = routed & (position < capacity)
        rows, num_rows = owner * capacity + position, num_experts * capacity
        counts = routes[:num_experts].clamp(max=capacity)
    rows = torch.where(routed, rows, torch.full_like(rows, -1))
    tokens = torch.arange(num_tokens, device=rows.device).repeat(top_k)
    spare = torch.where(routed, rows, torch.full_like(rows, num_rows))  # one row past the end takes what is dropped
    source = rows.new_full((num_rows + 1,), -1).scatter_(0, spare, torch.where(routed, tokens, -1))[:num_rows]
    return rows.view(top_k, num_tokens).t(), source, counts


def load_balancing_loss(first_choices: Tensor, probability_sum: Tensor, num_tokens: Tensor) -> Tensor:
    """E * sum_e(share of first choices_e * mean probability_e); 1 when balanced (GShard section 2.2, Switch eq. 4).

    Args:
        first_choices, probability_sum: (..., E) fp32 sums over tokens, of one rank or of many.
        num_tokens: (...) number of tokens in the sums; 0 gives a loss of 0.

    Returns:
        (...) fp32.
    """
    tokens = num_tokens.clamp(min=1).unsqueeze(-1)
    return first_choices.shape[-1] * (first_choices / tokens * (probability_sum / tokens)).sum(dim=-1)


def moe_dispatch(
    x: Tensor,
    slots: Tensor,
    source: Tensor,
    modality_embedding: Tensor | None = None,
    modality_ids: Tensor | None = None,
) -> Tensor:
    """Copy tokens into their experts' rows: (T, D), (R,) -> (R, D) in the dtype of x, empty rows zero.

    `slots` (T, K) says the same as `source` from the tokens' side; with both, forward and backward of a fused form only
    gather.

    With `modality_embedding` (M, D) and `modality_ids` (T,), each row gets its token's embedding added (the released
    model's behaviour, see EVE profile `official`).
    """
    filled = (source >= 0).unsqueeze(1)
    tokens = source.clamp(min=0)
    rows = _at_least_one(x).index_select(0, tokens)
    if modality_embedding is not None and modality_ids is not None:
        ids = _at_least_one(modality_ids)[tokens]
        rows = (widen(rows) + widen(modality_embedding)[ids]).to(rows.dtype)
    return rows * filled


def _at_least_one(values: Tensor) -> Tensor:
    """The values, or one zero where there are none: what is masked out later is looked up at 0, which must exist."""
    return values if values.shape[0] else torch.cat([values, values.new_zeros(1, *values.shape[1:])])


def moe_combine(expert_rows: Tensor, slots: Tensor, gates: Tensor, source: Tensor) -> Tensor:
    """Weighted sum of each token's expert rows: (R, D), (T, K), (T, K) -> (T, D); accumulated in fp32, rounded once.

    `source` (R,) says the same as `slots` from the rows' side.
    """
    num_tokens, top_k = slots.shape
    picked = _at_least_one(expert_rows).index_select(0, slots.clamp(min=0).reshape(-1))
    picked = picked.view(num_tokens, top_k, expert_rows.shape[1])
    weights = widen(gates) * (slots >= 0)
    return torch.einsum("tk,tkd->td", weights, widen(picked)).to(expert_rows.dtype)


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
) -> tuple[Tensor, Routing]:
    """Router on token + modality embedding in fp32, then :func:`route_topk` and :func:`moe_dispatch`.

    The embedding is added as `embedding W^T` to the logits: the sum is never rounded to the tokens' dtype.

    Args:
        x: (T, D) tokens.
        weight: (E, D) of the router.
        modality_embedding, modality_ids: (M, D), (T,) int64.
        top_k, capacity, valid, noise, group_sizes: see :func:`route_topk`.
        embed_rows: whether rows too get their token's embedding added.

    Returns:
        (R, D) rows in the dtype of x, and the routing.
    """
    router, embedding = widen(weight), widen(modality_embedding)
    routing = route_topk(
        F.linear(widen(x), router),
        top_k=top_k,
        capacity=capacity,
        modality_bias=F.linear(embedding, router),
        modality_ids=modality_ids,
        valid=valid,
        noise=noise,
        group_sizes=group_sizes,
    )
    added = (embedding, modality_ids) if embed_rows else ()
    return moe_dispatch(x, routing.slots, routing.source, *added), routing


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Summed cross entropy of a vocabulary projection: (N, D), (V, D), (V,), (N,) int64 -> () fp32; N may be 0."""
    return F.cross_entropy(widen(F.linear(hidden, weight, bias)), target, reduction="sum")


def masked_pixel_loss(
    pixel_values: Tensor,
    predictions: Tensor,
    masked_patch_ids: Tensor,
    patch_size: int,
    eps: float = 1e-6,
    *,
    normalize: bool = True,
) -> Tensor:
    """Squared error of predicted pixels, for each masked patch; either B or N may be 0.

    Args:
        pixel_values: (B, 3, H, W).
        predictions: (B, N, P * P * 3), pixels of a patch in (row, column, channel) order.
        masked_patch_ids: (B, N) int64, row-major patch index.
        patch_size: P.
        eps: added to the unbiased variance of a patch.
        normalize: whether the target is the patch less its mean, over its standard deviation (MAE section 3,
            `norm_pix_loss`), or the values of `pixel_values` as they are, for which `eps` does not matter.

    Returns:
        (B, N) fp32, mean over the values of a patch.
    """
    patches = patchify(widen(pixel_values), patch_size)
    target = patches.gather(1, masked_patch_ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    if normalize and target.numel() > 0:  # torch warns of the variance of nothing
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + eps).sqrt()
    return (widen(predictions) - target).square().mean(dim=-1)


def patchify(pixel_values: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, H/P * W/P, P * P * C), pixels of a patch in (row, column, channel) order."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixel_values.view(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x) (CLIP; upstream activation), by way of silu, whose backward is one pass over the data."""
    return F.silu(1.702 * x) / 1.702


def grouped_feed_forward(
    rows: Tensor,
    sizes: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    """Expert e on its `sizes[e]` rows: (R, D) -> (R, D); rows past their sum (empty ones) come out as zeros.

    Args:
        rows: those of expert 0, then those of expert 1, and so on.
        sizes: (E,) int64 rows of each expert; an expert without rows still has a gradient, of zeros.
        fc1, fc1_bias, fc2, fc2_bias: (E, F, D), (E, F), (E, D, F), (E, D) of all experts.
    """
    filled = sizes.tolist()
    *chunks, empty = rows.split([*filled, rows.shape[0] - sum(filled)])
    parameters = zip(fc1.unbind(), fc1_bias.unbind(), fc2.unbind(), fc2_bias.unbind(), strict=True)
    done = [
        F.linear(quick_gelu(F.linear(chunk, w1, b1)), w2, b2)
        for chunk, (w1, b1, w2, b2) in zip(chunks, parameters, strict=True)
    ]
    return torch.cat([*done, torch.zeros_like(empty)])


def grouped_linear(x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear layer e on the rows of expert e: (R, D) -> (R, F), with zeros, and without gradient, in rows of nobody.

    Args:
        x: rows in the order of their experts.
        ends: (E,) int32, where the rows of each expert end; rows past the last end belong to nobody.
        weight, bias: (E, F, D), (E, F).
    """
    expert = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True).unsqueeze(1)  # (R, 1)
    member = (expert == torch.arange(len(ends), device=x.device)).to(x.dtype)  # (R, E) 0 or 1
    filled = expert < len(ends)
    product = F.grouped_mm(x.where(filled, 0), weight.transpose(1, 2), offs=ends)
    return torch.addmm(product.where(filled, 0), member, bias)


def grouped_bias(x: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """Add each expert's bias (E, F) to its rows: (R, F) -> (R, F), zeros in rows of nobody; `ends` as above."""
    expert = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
    shifted = widen(x) + widen(bias)[expert.clamp(max=len(ends) - 1)]
    return shifted.where((expert < len(ends)).unsqueeze(1), 0).to(x.dtype)
