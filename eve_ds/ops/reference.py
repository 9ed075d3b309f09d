"""The operations of an EVE step in plain PyTorch: these functions define the correct result.

Arithmetic is in fp32 for every token dtype except fp64, which stays fp64. Integer tensors are int64, and -1 means
"none": a dropped route or an empty row. Ties between experts go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Tensor in the dtype used for arithmetic: fp64 stays fp64, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


class Routing(NamedTuple):
    """Destination of every token; T tokens, E experts, K choices, R rows of the expert buffer."""

    expert_ids: Tensor
    """(T, K) int64, best expert first."""
    slots: Tensor
    """(T, K) int64 row of the expert buffer, -1 where the route is dropped or the token is not valid."""
    gates: Tensor
    """(T, K) fp32 weight of each choice, 0 where dropped."""
    source: Tensor
    """(R,) int64 token in each row, -1 for an empty row."""
    counts: Tensor
    """(E,) int64 filled rows per expert."""
    probabilities: Tensor
    """(T, E) fp32 softmax of the logits, detached; for statistics only."""
    first_choices: Tensor
    """(E,) fp32 number of valid tokens whose first choice is this expert; (G, E) for G groups of tokens."""
    probability_sum: Tensor
    """(E,) fp32 sum of probabilities over valid tokens; (G, E) for G groups."""
    z_sum: Tensor
    """() fp32 sum over valid tokens of logsumexp(logits)^2 (ST-MoE eq. 5); (G,) for G groups."""


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float, min_capacity: int) -> int:
    """Slots per expert: ceil(K * factor * T / E), but at least `min_capacity` (GShard section 2.2).

    The factor is read as the decimal number that was written: 1.1 times 10 tokens gives 11 slots, not
    ceil(11.000000000000002).
    """
    return slots_of_share(num_tokens, capacity_share(num_experts, top_k, capacity_factor), min_capacity)


def capacity_share(num_experts: int, top_k: int, capacity_factor: float) -> tuple[int, int]:
    """Slots per expert and token as (numerator, denominator), the input of :func:`slots_of_share`."""
    share = Fraction(str(capacity_factor)) * top_k / num_experts
    return share.numerator, share.denominator


def slots_of_share(num_tokens: int, share: tuple[int, int], min_capacity: int) -> int:
    """Same as :func:`expert_capacity`, in integers only, so that a compiler can trace it for any number of tokens."""
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
    """Choose experts, assign rows (all first choices first), and weigh the choices that got a row (GShard algorithm 1).

    Args:
        logits: (T, E) router logits; arithmetic is in fp32.
        top_k: choices per token, at most E.
        capacity: rows per expert; expert e owns rows [e * capacity, (e + 1) * capacity). A negative value means
            dropless: rows are packed by expert, R = T * K, and rows past `counts.sum()` are empty.
        modality_bias: (M, E) logits added by modality.
        modality_ids: (T,) int64 in [0, M), required with `modality_bias`.
        valid: (T,) bool; tokens that are not valid get no row and enter no statistic.
        noise: (T, E) added to the logits for every choice after the first (Gumbel noise in GShard).
        group_sizes: token counts of consecutive groups whose sums stay separate. None gives one sum over all tokens,
            without a group dimension.

    Returns:
        Routing. The gates of a token's kept choices sum to 1. For `top_k` 1 the gate is the plain probability (Switch),
        because a single renormalized gate would be constant and give the router no gradient.
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
    """Sum over the first dimension: (T, ...) -> (...), or (G, ...) for consecutive groups of `group_sizes` rows."""
    if group_sizes is None:
        return values.sum(dim=0)
    return torch.stack([group.sum(dim=0) for group in values.split(list(group_sizes))])


def _choose(logits: Tensor, top_k: int, noise: Tensor | None) -> Tensor:
    """(T, K) expert ids by repeated argmax, which (unlike topk) guarantees the lowest index on ties."""
    scores = logits.detach()
    choices = [scores.argmax(dim=1)]
    if noise is not None:
        scores = scores + noise
    for _ in range(top_k - 1):
        scores = scores.scatter(1, choices[-1].unsqueeze(1), float("-inf"))
        choices.append(scores.argmax(dim=1))
    return torch.stack(choices, dim=1)


def _assign_rows(expert_ids: Tensor, valid: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assign a row to each route: all first choices in token order, then all second choices, and so on."""
    num_tokens, top_k = expert_ids.shape
    unowned = torch.full_like(expert_ids, num_experts)
    owner = torch.where(valid.unsqueeze(1), expert_ids, unowned).t().reshape(-1)  # (K * T,), choice-major
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
    spare = torch.where(routed, rows, torch.full_like(rows, num_rows))  # dropped routes write one row past the end
    source = rows.new_full((num_rows + 1,), -1).scatter_(0, spare, torch.where(routed, tokens, -1))[:num_rows]
    return rows.view(top_k, num_tokens).t(), source, counts


def load_balancing_loss(first_choices: Tensor, probability_sum: Tensor, num_tokens: Tensor) -> Tensor:
    """E * sum_e(share of first choices_e * mean probability_e); 1 when balanced (GShard section 2.2, Switch eq. 4).

    Args:
        first_choices, probability_sum: (..., E) fp32 sums over the tokens of one rank or of several.
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
    """Copy tokens into their experts' rows: (T, D), (R,) -> (R, D) in the dtype of x; empty rows are zero.

    `slots` (T, K) holds the same routing as `source`, indexed by token. A fused implementation that has both needs only
    gathers, in the forward and in the backward.

    If `modality_embedding` (M, D) and `modality_ids` (T,) are given, each row is its token plus the embedding of the
    token's modality (behavior of the released model, see EVE profile `official`).
    """
    filled = (source >= 0).unsqueeze(1)
    tokens = source.clamp(min=0)
    rows = _at_least_one(x).index_select(0, tokens)
    if modality_embedding is not None and modality_ids is not None:
        ids = _at_least_one(modality_ids)[tokens]
        rows = (widen(rows) + widen(modality_embedding)[ids]).to(rows.dtype)
    return rows * filled


def _at_least_one(values: Tensor) -> Tensor:
    """Return the values, or one zero row if empty: masked entries look up index 0, which must exist."""
    return values if values.shape[0] else torch.cat([values, values.new_zeros(1, *values.shape[1:])])


def moe_combine(expert_rows: Tensor, slots: Tensor, gates: Tensor, source: Tensor) -> Tensor:
    """Weighted sum of each token's expert rows: (R, D), (T, K), (T, K) -> (T, D); accumulated in fp32, rounded once.

    `source` (R,) holds the same routing as `slots`, indexed by row.
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
    announce: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Routing]:
    """Run the router on token + modality embedding in fp32, then :func:`route_topk` and :func:`moe_dispatch`.

    The embedding enters the logits as `embedding W^T`, so token + embedding is never rounded to the token dtype.

    Args:
        x: (T, D) tokens.
        weight: (E, D) router weight.
        modality_embedding, modality_ids: (M, D), (T,) int64.
        top_k, capacity, valid, noise, group_sizes: see :func:`route_topk`.
        embed_rows: whether the embedding of each token is also added to its rows.
        announce: is given the (E,) int64 rows of each expert before the rows are copied, so that it can send them on
            meanwhile.

    Returns:
        Rows (R, D) in the dtype of x, and the routing.
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
    if announce is not None:
        announce(routing.counts)
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
    """Squared error of the predicted pixels of each masked patch; B or N may be 0.

    Args:
        pixel_values: (B, 3, H, W).
        predictions: (B, N, P * P * 3), pixels of a patch in (row, column, channel) order.
        masked_patch_ids: (B, N) int64, row-major patch index.
        patch_size: P.
        eps: added to the unbiased variance of a patch.
        normalize: True takes as target each patch minus its mean, divided by its standard deviation (MAE section 3,
            `norm_pix_loss`). False takes the raw values of `pixel_values`; `eps` then has no effect.

    Returns:
        (B, N) fp32, mean over the values of a patch.
    """
    patches = patchify(widen(pixel_values), patch_size)
    target = patches.gather(1, masked_patch_ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    if normalize and target.numel() > 0:  # torch warns about the variance of an empty tensor
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
    """x * sigmoid(1.702 x) (CLIP; upstream activation), computed by silu, whose backward is one pass over the data."""
    return F.silu(1.702 * x) / 1.702


def grouped_feed_forward(
    rows: Tensor,
    sizes: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    """Apply expert e to its `sizes[e]` rows: (R, D) -> (R, D); rows past the sum of sizes are empty and return zeros.

    Args:
        rows: rows of expert 0, then rows of expert 1, and so on.
        sizes: (E,) int64 rows of each expert. An expert without rows gets a zero gradient, not None.
        fc1, fc1_bias, fc2, fc2_bias: (E, F, D), (E, F), (E, D, F), (E, D) parameters of all experts.
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
    """Apply linear layer e to the rows of expert e: (R, D) -> (R, F); rows of no expert give zeros and no gradient.

    Args:
        x: rows in the order of their experts.
        ends: (E,) int32 end row of each expert; rows past the last end belong to no expert.
        weight, bias: (E, F, D), (E, F).
    """
    expert = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True).unsqueeze(1)  # (R, 1)
    member = (expert == torch.arange(len(ends), device=x.device)).to(x.dtype)  # (R, E) 0 or 1
    filled = expert < len(ends)
    product = F.grouped_mm(x.where(filled, 0), weight.transpose(1, 2), offs=ends)
    return torch.addmm(product.where(filled, 0), member, bias)


def grouped_bias(x: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """Add each expert's bias (E, F) to its rows: (R, F) -> (R, F); zeros in rows of no expert; `ends` as above."""
    expert = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
    shifted = widen(x) + widen(bias)[expert.clamp(max=len(ends) - 1)]
    return shifted.where((expert < len(ends)).unsqueeze(1), 0).to(x.dtype)
