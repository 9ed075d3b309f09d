"""Modality-aware mixture of experts on one process: the reference that the distributed layer is compared with.

A token's router sees the token plus a learnt embedding of its modality (EVE eq. 4). The output is a weighted sum of the
chosen experts' outputs. EVE's eq. 5 weighs expert i by its probability g(x)_i as it is; the released code divides the
probabilities of the choices that got a slot by their sum, and so do both profiles here: released weights were trained
that way, and a token's output keeps its scale whatever share of probability its top k experts hold. With top_k 1 the
probability stays as it is. Profiles:

- `default`: the embedding moves the router only, experts see the token; padding is not routed; evaluation is
  noise-free and dropless, so an output never depends on what else is in the batch.
- `official`, the released behaviour: experts too see token + embedding, padding is routed and takes capacity,
  capacity (and the noise of the second choice, if switched on) acts at evaluation as in training. It reproduces what
  the released fine-tuning uses. It does not reproduce the released code's path for a part of the patches (`ids_keep`),
  which loses their positions and routes text as if it were image: there, patches keep their places here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds import ops
from eve_ds.config import ModelConfig
from eve_ds.model.experts import Experts
from eve_ds.model.naming import is_stacked, plain_names
from eve_ds.views import IMAGE, TEXT


class RouterStatistics(NamedTuple):
    """Counts of one MoE layer and one view; sums over ranks, steps and views are meaningful.

    Of V views that shared a forward all fields have V as their first dimension.
    """

    routes: Tensor
    """(2, E) fp32 routes chosen by modality and expert, before dropping."""
    dropped: Tensor
    """(2,) fp32 routes dropped by modality."""
    tokens: Tensor
    """(2,) fp32 routed tokens by modality."""
    entropy_sum: Tensor
    """() fp32 sum over tokens of the entropy of the router's distribution, in nats."""


class MoEOutput(NamedTuple):
    """What an MoE layer returns; nothing is kept on the module."""

    hidden_states: Tensor
    """Shape of the input, zero for tokens that are not routed."""
    load_balancing_loss: Tensor
    """() fp32, 1 when balanced; (V,) of V views, each balanced for itself."""
    router_z_sum: Tensor
    """() or (V,) fp32 sum over this rank's tokens of logsumexp(logits)^2 (ST-MoE eq. 5)."""
    statistics: RouterStatistics

    def by_view(self) -> list[MoEOutput]:
        """Of an output over V views one output per view, without hidden states."""
        nothing = self.hidden_states.new_empty(0)
        losses = zip(self.load_balancing_loss.unbind(), self.router_z_sum.unbind(), strict=True)
        counts = zip(*(values.unbind() for values in self.statistics), strict=True)
        return [MoEOutput(nothing, *loss, RouterStatistics(*own)) for loss, own in zip(losses, counts, strict=True)]


def sum_statistics(of_views: Sequence[RouterStatistics]) -> RouterStatistics:
    """Counts of one layer over several views."""
    return RouterStatistics(*(torch.stack(values).sum(dim=0) for values in zip(*of_views, strict=True)))


class RouterOutput(NamedTuple):
    """Routes of the tokens of one forward, the rows they fill, and what losses and statistics are made of."""

    rows: Tensor
    """(R, D) what experts see."""
    routing: ops.Routing
    num_tokens: Tensor
    """() fp32 tokens routed, or (V,) of V views."""
    statistics: RouterStatistics


class Router(nn.Module):
    """Bias-free linear in fp32 on token + modality embedding, then top-k (upstream `TopKGate`, `vision_embed`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.moe
        self.official = config.profile == "official"
        self.capacity_share = ops.capacity_share(config.moe.num_experts, config.moe.top_k, config.moe.capacity_factor)
        self.weight = nn.Parameter(torch.empty(config.moe.num_experts, config.hidden_size))
        shape = (2, config.hidden_size)
        self.modality_embedding = nn.Parameter(torch.empty(shape)) if config.moe.modality_embedding else None

    def forward(
        self,
        x: Tensor,
        modality_ids: Tensor,
        valid: Tensor | None = None,
        view_sizes: Sequence[int] | None = None,
    ) -> RouterOutput:
        """Route (T, D) tokens with (T,) modality ids; (T,) `valid` False means padding, None that there is none.

        `view_sizes` are the tokens of each view, whose sums are kept apart; None: one sum. Needs :attr:`packs_views`.
        """
        routed = None if self.official else valid
        embedding = x.new_zeros(2, x.shape[1]) if self.modality_embedding is None else self.modality_embedding
        grouped = {} if view_sizes is None else {"group_sizes": view_sizes}
        dispatch = (
            self._dispatch_jittered if self.training and self.config.router_jitter > 0 else ops.route_and_dispatch
        )
        rows, routing = dispatch(
            x,
            self.weight,
            embedding,
            modality_ids,
            top_k=self.config.top_k,
            capacity=self._capacity(x.shape[0]),
            valid=routed,
            noise=self._second_choice_noise(x),
            embed_rows=self.official,
            **grouped,
        )
        counted = torch.ones_like(modality_ids, dtype=torch.bool) if routed is None else routed
        num_tokens = ops.sum_groups(counted, view_sizes).float()
        return RouterOutput(rows, routing, num_tokens, _statistics(routing, modality_ids, counted, view_sizes))

    @property
    def packs_views(self) -> bool:
        """Whether tokens of several views can be routed at once: no token's route depends on another token."""
        return self.dropless and not (self.training and self.config.router_jitter > 0)

    @property
    def dropless(self) -> bool:
        """Whether rows are packed instead of laid out in fixed slots per expert."""
        if self.official:
            return self.config.routing == "dropless"
        return self.config.routing == "dropless" or not self.training

    def rows_per_expert(self, routing: ops.Routing) -> Tensor:
        """(E,) int64 rows of each expert in the buffer: those filled if dropless, otherwise its slots."""
        if self.dropless:
            return routing.counts
        return torch.full_like(routing.counts, routing.source.numel() // routing.counts.numel())

    def _dispatch_jittered(
        self,
        x: Tensor,
        weight: Tensor,
        modality_embedding: Tensor,
        modality_ids: Tensor,
        *,
        embed_rows: bool,
        **routing_options: Any,
    ) -> tuple[Tensor, ops.Routing]:
        """As :func:`eve_ds.ops.route_and_dispatch`; the router sees each token times noise around 1 (Switch 2.4)."""
        low, high = 1 - self.config.router_jitter, 1 + self.config.router_jitter
        weight, embedding = weight.float(), modality_embedding.float()
        jittered = x.float() * torch.empty_like(x, dtype=torch.float32).uniform_(low, high)
        routing = ops.route_topk(
            F.linear(jittered, weight),
            modality_bias=F.linear(embedding, weight),
            modality_ids=modality_ids,
            **routing_options,
        )
        added = (embedding, modality_ids) if embed_rows else ()
        return ops.moe_dispatch(x, routing.slots, routing.source, *added), routing

    def _capacity(self, num_tokens: int) -> int:
        if self.dropless:
            return -1
        return ops.slots_of_share(num_tokens, self.capacity_share, self.config.min_capacity)

    def _second_choice_noise(self, x: Tensor) -> Tensor | None:
        if not self.config.second_choice_noise or not (self.training or self.official):
            return None
        noise = x.new_empty((x.shape[0], self.config.num_experts), dtype=torch.float32)
        return -noise.exponential_().log()  # standard Gumbel


class MoE(nn.Module):
    """All experts on this process."""

    first_expert = 0
    """Global id of the first expert held here; other layers of this interface may hold a part."""
    is_compilable = True
    """Whether :meth:`mix` is one graph for `torch.compile`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config.moe.num_experts, config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        modality_ids: Tensor,
        attention_mask: Tensor | None = None,
        view_sizes: Sequence[int] | None = None,
    ) -> MoEOutput:
        """(..., D), (...) int64, (...) bool or None where all are tokens -> MoEOutput.

        `view_sizes` are the tokens of V views that stand one after the other; None: they are of one view.
        """
        return self.output(*self.mix(hidden_states, modality_ids, attention_mask, view_sizes))

    def mix(
        self,
        hidden_states: Tensor,
        modality_ids: Tensor,
        attention_mask: Tensor | None,
        view_sizes: Sequence[int] | None,
    ) -> tuple[Tensor, ...]:
        """What :func:`mix_experts` gives for arguments as those of :meth:`forward`."""
        return mix_experts(self.router, hidden_states, modality_ids, attention_mask, self.experts, view_sizes)

    def output(self, *mixed: Tensor) -> MoEOutput:
        """MoEOutput of what :meth:`mix` gave."""
        return moe_output(*mixed)


def _itself(parameter: nn.Parameter) -> Tensor:
    return parameter


def plain_named_tensors(
    model: nn.Module, of: Callable[[nn.Parameter], Tensor] = _itself
) -> Iterator[tuple[str, Tensor]]:
    """What is held here under the names of the plain model's state dict, experts counted over all processes.

    Args:
        model: a plain or DeepSpeed model.
        of: what to take of every parameter, in the parameter's shape: itself, its gradient, its fp32 master. That of
            stacked experts is handed on expert by expert, as views.
    """
    for name, parameter in model.named_parameters():
        tensor = of(parameter)
        parts = tensor.unbind() if is_stacked(name) else [tensor]
        yield from zip(plain_names_of(model, name, parameter), parts, strict=True)


def plain_names_of(model: nn.Module, name: str, parameter: nn.Parameter) -> tuple[str, ...]:
    """Plain names of what a parameter of a plain or DeepSpeed model holds: its experts' in order, or its own."""
    block, is_moe, _ = name.partition(".moe.")
    first_expert = cast(int, model.get_submodule(f"{block}.moe").first_expert) if is_moe else 0
    return plain_names(name, first_expert, len(parameter) if is_stacked(name) else 1)


def mix_experts(
    router: Router,
    hidden_states: Tensor,
    modality_ids: Tensor,
    attention_mask: Tensor | None,
    apply_experts: Callable[[Tensor, Tensor], Tensor],
    view_sizes: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Route, dispatch, run the experts wherever they live, combine: what every MoE layer does.

    Where experts have a capacity, each view has its own, and so its own pass.

    Args:
        router: chooses experts.
        hidden_states, modality_ids, attention_mask: (..., D), (...) int64, (...) bool or None where all are tokens.
        apply_experts: maps the expert buffer (R, D) and the (E,) int64 rows of each expert in it to the (R, D) outputs.
        view_sizes: tokens of V views that stand one after the other; None: they are of one view, and no result has the
            dimension of views.

    Returns:
        Arguments of :func:`moe_output`: tensors only, and without a collective, so that all of it can be compiled.
    """
    x, ids = hidden_states.flatten(0, -2), modality_ids.flatten()
    valid = None if attention_mask is None else attention_mask.flatten()
    if view_sizes is None or router.packs_views:
        mixed, *sums = _mix(router, x, ids, valid, apply_experts, view_sizes)
    else:
        sizes = list(view_sizes)
        no_masks = [None] * len(sizes)
        views = zip(x.split(sizes), ids.split(sizes), no_masks if valid is None else valid.split(sizes), strict=True)
        parts, *of_views = zip(*(_mix(router, *view, apply_experts) for view in views), strict=True)
        mixed, sums = torch.cat(parts), [torch.stack(values) for values in of_views]
    return mixed.view_as(hidden_states), *sums


def _mix(
    router: Router,
    x: Tensor,
    modality_ids: Tensor,
    valid: Tensor | None,
    apply_experts: Callable[[Tensor, Tensor], Tensor],
    view_sizes: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """One routing of tokens (T, D)."""
    routed = router(x, modality_ids, valid, view_sizes)
    routing = routed.routing
    rows = apply_experts(routed.rows, router.rows_per_expert(routing))
    mixed = ops.moe_combine(rows, routing.slots, routing.gates, routing.source)
    balance = torch.cat([routing.first_choices, routing.probability_sum, routed.num_tokens.unsqueeze(-1)], dim=-1)
    return mixed, balance, routing.z_sum, *routed.statistics


def moe_output(hidden_states: Tensor, balance: Tensor, z_sum: Tensor, *statistics: Tensor) -> MoEOutput:
    """MoEOutput of the parts that :func:`mix_experts` gives; views are balanced each for itself.

    Args:
        hidden_states: as in MoEOutput.
        balance: (2 E + 1) or (V, 2 E + 1) fp32 sums over the tokens that are balanced together, of this rank or of
            several: first choices and probabilities by expert, and how many tokens there are.
        z_sum: as in MoEOutput.
        statistics: fields of RouterStatistics.
    """
    num_experts = balance.shape[-1] // 2
    first_choices, probability_sum, num_tokens = balance.split([num_experts, num_experts, 1], dim=-1)
    loss = ops.load_balancing_loss(first_choices, probability_sum, num_tokens.squeeze(-1))
    return MoEOutput(hidden_states, loss, z_sum, RouterStatistics(*statistics))


@torch.no_grad()
def _statistics(
    routing: ops.Routing, modality_ids: Tensor, routed: Tensor, view_sizes: Sequence[int] | None
) -> RouterStatistics:
    """Sums over tokens by view and modality, as one product: counts are exact, and the host makes few calls."""
    num_tokens, num_experts = routing.probabilities.shape
    # Columns: routes by expert, dropped routes, tokens, entropy.
    figures = routing.probabilities.new_zeros(num_tokens, num_experts + 3, dtype=torch.float32)
    figures.scatter_(1, routing.expert_ids, 1.0)
    entropy = torch.special.entr(routing.probabilities).sum(dim=1)
    dropped = (routing.slots < 0).sum(dim=1)
    figures[:, num_experts:] = torch.stack([dropped, torch.ones_like(entropy), entropy], dim=1)
    group_ids, num_groups = modality_ids, 2
    if view_sizes is not None:
        of_views = modality_ids.split(list(view_sizes))
        group_ids = torch.cat([ids + 2 * view for view, ids in enumerate(of_views)])
        num_groups *= len(of_views)
    membership = figures.new_zeros(num_tokens, num_groups)
    membership.scatter_(1, group_ids.unsqueeze(1), routed.to(figures.dtype).unsqueeze(1))
    sums = (membership.t() @ figures).unflatten(0, (-1, 2))
    if view_sizes is None:
        sums = sums.squeeze(0)
    routes, by_modality = sums.split([num_experts, 3], dim=-1)
    dropped, tokens, entropy = by_modality.unbind(dim=-1)
    return RouterStatistics(routes, dropped, tokens, entropy.sum(dim=-1))


def on_host(statistics: Sequence[RouterStatistics]) -> list[RouterStatistics]:
    """The same in the host's memory, by one copy of all: each copy makes the host wait for an accelerator."""
    fields = [field for own in statistics for field in own]
    flat = torch.cat([field.flatten() for field in fields]).cpu() if fields else torch.empty(0)
    parts = iter(flat.split([field.numel() for field in fields]))
    return [RouterStatistics(*(next(parts).view_as(field) for field in own)) for own in statistics]


def router_metrics(statistics: RouterStatistics) -> dict[str, float]:
    """Readable figures of one MoE layer, from statistics of one forward or summed over ranks and steps.

    Returns:
        `image_share`: of the routed tokens. `entropy`: mean over tokens of the router's distribution, in nats, at most
        log(E). `dead_experts`: experts that no token chose. `max_load`: routes of the most chosen expert over the mean,
        1 when balanced. `dropped_image`, `dropped_text`: share of a modality's routes. `image_routes/e` and
        `text_routes/e`: routes that chose expert e, before dropping. Shares of nothing are 0.
    """
    chosen = statistics.routes.sum(dim=0)  # (E,)
    by_modality = statistics.routes.sum(dim=1).clamp(min=1)  # (2,)
    tokens = statistics.tokens.sum().clamp(min=1)
    dropped = statistics.dropped / by_modality
    metrics = {
        "image_share": float(statistics.tokens[IMAGE] / tokens),
        "entropy": float(statistics.entropy_sum / tokens),
        "dead_experts": float((chosen == 0).sum()),
        "max_load": float(chosen.max() * chosen.numel() / chosen.sum().clamp(min=1)),
        "dropped_image": float(dropped[IMAGE]),
        "dropped_text": float(dropped[TEXT]),
    }
    for modality, name in ((IMAGE, "image_routes"), (TEXT, "text_routes")):
        metrics |= {f"{name}/{expert}": routes for expert, routes in enumerate(statistics.routes[modality].tolist())}
    return metrics
