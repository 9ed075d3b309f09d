"""Modality-aware mixture of experts on one process: the reference for the distributed layer.

The router sees each token plus a learned embedding of its modality (EVE eq. 4). The output is a weighted sum of the
outputs of the chosen experts. EVE's eq. 5 weighs expert i by its plain probability g(x)_i. The released code instead
divides the probabilities of the choices that got a slot by their sum, and so do both profiles here: released weights
were trained that way, and a token's output keeps its scale whatever share of probability its top k experts hold. With
top_k 1 the weight is the plain probability. Profiles:

- `default`: the embedding affects the router only; experts see the token alone. Padding is not routed. Evaluation has
  no noise and no dropping, so an output never depends on the other samples of the batch.
- `official`, the behavior of the release: experts also see token + embedding. Padding is routed and takes capacity.
  Capacity (and the noise of the second choice, if enabled) applies in evaluation as in training. This profile
  reproduces the behavior that the released fine-tuning uses. One part is not reproduced: the released path for a subset
  of patches (`ids_keep`) loses the patches' positions and routes text as if it were image. Here, patches keep their
  positions.
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
from eve_ds.ops.autocast import keeps_dtypes
from eve_ds.views import IMAGE, TEXT


class RouterStatistics(NamedTuple):
    """Counts of one MoE layer and one view; they may be summed over ranks, steps and views.

    If V views shared a forward, every field has V as its first dimension.
    """

    routes: Tensor
    """(2, E) fp32 chosen routes by modality and expert, before dropping."""
    dropped: Tensor
    """(2,) fp32 dropped routes by modality."""
    tokens: Tensor
    """(2,) fp32 routed tokens by modality."""
    entropy_sum: Tensor
    """() fp32 sum over tokens of the entropy of the router's distribution, in nats."""


class MoEOutput(NamedTuple):
    """Result of an MoE layer; the module itself keeps nothing."""

    hidden_states: Tensor
    """Shape of the input; zero for tokens that are not routed."""
    load_balancing_loss: Tensor
    """() fp32, 1 when balanced; (V,) for V views, each balanced separately."""
    router_z_sum: Tensor
    """() or (V,) fp32 sum over this rank's tokens of logsumexp(logits)^2 (ST-MoE eq. 5)."""
    statistics: RouterStatistics

    def by_view(self) -> list[MoEOutput]:
        """Split an output over V views into one output per view, without hidden states."""
        nothing = self.hidden_states.new_empty(0)
        losses = zip(self.load_balancing_loss.unbind(), self.router_z_sum.unbind(), strict=True)
        counts = zip(*(values.unbind() for values in self.statistics), strict=True)
        return [MoEOutput(nothing, *loss, RouterStatistics(*own)) for loss, own in zip(losses, counts, strict=True)]


def sum_statistics(of_views: Sequence[RouterStatistics]) -> RouterStatistics:
    """Counts of one layer, summed over several views."""
    return RouterStatistics(*(torch.stack(values).sum(dim=0) for values in zip(*of_views, strict=True)))


class RouterOutput(NamedTuple):
    """Routes of the tokens of one forward, the rows they fill, and the inputs of losses and statistics."""

    rows: Tensor
    """(R, D) input of the experts."""
    rows_per_expert: Tensor
    """(E,) int64 rows of each expert among them: the filled rows if dropless, otherwise the expert's slots."""
    routing: ops.Routing
    num_tokens: Tensor
    """() fp32 number of routed tokens; (V,) for V views."""
    statistics: RouterStatistics


class Peers(NamedTuple):
    """What a layer whose experts are spread over ranks knows of the other ranks before it runs."""

    tokens: tuple[tuple[int, ...] | None, ...]
    """By view: number of tokens on each rank that shares the experts; None where nobody knows it."""
    sizes: dict[int, Any] | None
    """By view: numbers of rows of each rank. The first run of a block fills it for the recomputation, which then asks
    nobody. None: the block is not recomputed."""


def is_dropless(config: ModelConfig, training: bool) -> bool:
    """Whether rows are packed, rather than laid out in fixed slots per expert."""
    always = config.moe.routing == "dropless"
    return always or (config.profile == "default" and not training)


def packs_views(config: ModelConfig, training: bool) -> bool:
    """Whether one routing can serve several views: true if no token's route depends on another token."""
    return is_dropless(config, training) and not (training and config.moe.router_jitter > 0)


class Router(nn.Module):
    """Bias-free fp32 linear layer on token + modality embedding, then top-k (upstream `TopKGate`, `vision_embed`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model_config, self.config = config, config.moe
        self.official = config.profile == "official"
        self.capacity_share = ops.capacity_share(config.moe.num_experts, config.moe.top_k, config.moe.capacity_factor)
        self.weight = nn.Parameter(torch.empty(config.moe.num_experts, config.hidden_size))
        shape = (2, config.hidden_size)
        self.modality_embedding = nn.Parameter(torch.empty(shape)) if config.moe.modality_embedding else None

    @keeps_dtypes
    def forward(
        self,
        x: Tensor,
        modality_ids: Tensor,
        valid: Tensor | None = None,
        view_sizes: Sequence[int] | None = None,
        announce: Callable[[Tensor], None] | None = None,
    ) -> RouterOutput:
        """Route tokens (T, D) with modality ids (T,); `valid` (T,) is False for padding, None without padding.

        `view_sizes` gives the token count of each view and keeps the sums of views separate; it requires
        :func:`packs_views`. None gives one sum. `announce` is given the (E,) int64 rows of each expert, before the rows
        are copied.
        """
        routed = None if self.official else valid
        embedding = x.new_zeros(2, x.shape[1]) if self.modality_embedding is None else self.modality_embedding
        options: dict[str, Any] = {} if view_sizes is None else {"group_sizes": view_sizes}
        capacity = self._capacity(x.shape[0])
        if announce is not None:
            options["announce"] = lambda counts: announce(_rows_per_expert(counts, capacity))
        dispatch = (
            self._dispatch_jittered if self.training and self.config.router_jitter > 0 else ops.route_and_dispatch
        )
        rows, routing = dispatch(
            x,
            self.weight,
            embedding,
            modality_ids,
            top_k=self.config.top_k,
            capacity=capacity,
            valid=routed,
            noise=self._second_choice_noise(x),
            embed_rows=self.official,
            **options,
        )
        counted = torch.ones_like(modality_ids, dtype=torch.bool) if routed is None else routed
        num_tokens = ops.sum_groups(counted, view_sizes).float()
        statistics = _statistics(routing, modality_ids, counted, view_sizes)
        return RouterOutput(rows, _rows_per_expert(routing.counts, capacity), routing, num_tokens, statistics)

    def _dispatch_jittered(
        self,
        x: Tensor,
        weight: Tensor,
        modality_embedding: Tensor,
        modality_ids: Tensor,
        *,
        embed_rows: bool,
        announce: Callable[[Tensor], None] | None = None,
        **routing_options: Any,
    ) -> tuple[Tensor, ops.Routing]:
        """Same as :func:`eve_ds.ops.route_and_dispatch`, with router inputs times noise around 1 (Switch 2.4)."""
        low, high = 1 - self.config.router_jitter, 1 + self.config.router_jitter
        weight, embedding = weight.float(), modality_embedding.float()
        jittered = x.float() * torch.empty_like(x, dtype=torch.float32).uniform_(low, high)
        routing = ops.route_topk(
            F.linear(jittered, weight),
            modality_bias=F.linear(embedding, weight),
            modality_ids=modality_ids,
            **routing_options,
        )
        if announce is not None:
            announce(routing.counts)
        added = (embedding, modality_ids) if embed_rows else ()
        return ops.moe_dispatch(x, routing.slots, routing.source, *added), routing

    def _capacity(self, num_tokens: int) -> int:
        return -1 if is_dropless(self.model_config, self.training) else self.slots(num_tokens)

    def slots(self, num_tokens: int) -> int:
        """Return how many rows each expert takes of that many tokens if it has a capacity."""
        return ops.slots_of_share(num_tokens, self.capacity_share, self.config.min_capacity)

    def _second_choice_noise(self, x: Tensor) -> Tensor | None:
        if not self.config.second_choice_noise or not (self.training or self.official):
            return None
        noise = x.new_empty((x.shape[0], self.config.num_experts), dtype=torch.float32)
        return -noise.exponential_().log()  # standard Gumbel


def _rows_per_expert(counts: Tensor, capacity: int) -> Tensor:
    """Rows (E,) int64 of each expert among those that it gets: `counts` if packed, its slots if it has a capacity."""
    return counts if capacity < 0 else torch.full_like(counts, capacity)


class MoE(nn.Module):
    """MoE layer with all experts on this process."""

    first_expert = 0
    """Global id of the first expert held here; other layers with this interface may hold a part of the experts."""
    is_compilable = True
    """Whether :meth:`mix` compiles to one graph under `torch.compile`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config.moe.num_experts, config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        modality_ids: Tensor,
        attention_mask: Tensor | None = None,
        view_sizes: Sequence[int] | None = None,
    ) -> MoEOutput:
        """(..., D), (...) int64, (...) bool (None without padding) -> MoEOutput.

        `view_sizes` gives the token counts of V consecutive views; None means one view.
        """
        return self.outputs([self.mix(hidden_states, modality_ids, attention_mask, view_sizes)])[0]

    def mix(
        self,
        hidden_states: Tensor,
        modality_ids: Tensor,
        attention_mask: Tensor | None,
        view_sizes: Sequence[int] | None,
        peers: Peers | None = None,
    ) -> tuple[Tensor, ...]:
        """Output of :func:`mix_experts` for the arguments of :meth:`forward`; there are no `peers` here."""
        one_pass = packs_views(self.config, self.training)
        return mix_experts(self.router, hidden_states, modality_ids, attention_mask, self.experts, view_sizes, one_pass)

    def outputs(self, mixed: Sequence[Sequence[Tensor]]) -> list[MoEOutput]:
        """Convert the results of :meth:`mix` of all layers of a model; a layer of other ranks may ask them, once."""
        return [moe_output(*own) for own in mixed]


def _identity(parameter: nn.Parameter) -> Tensor:
    return parameter


def plain_named_tensors(
    model: nn.Module, of: Callable[[nn.Parameter], Tensor] = _identity
) -> Iterator[tuple[str, Tensor]]:
    """Tensors held by this process, under the names of the plain model's state dict (global expert ids).

    Args:
        model: a plain or DeepSpeed model.
        of: maps each parameter to the tensor to yield, in the parameter's shape: the parameter itself, its gradient, or
            its fp32 master. Tensors of stacked experts are yielded expert by expert, as views.
    """
    for name, parameter in model.named_parameters():
        tensor = of(parameter)
        parts = tensor.unbind() if is_stacked(name) else [tensor]
        yield from zip(plain_names_of(model, name), parts, strict=True)


def local_plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Weights held by this rank (dense weights and its experts), detached, under their names in the plain model."""
    return {name: weight.detach() for name, weight in plain_named_tensors(model)}


@torch.no_grad()
def load_plain_state_dict(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Copy this rank's weights from weights of the plain model; call before `deepspeed.initialize`.

    Args:
        model: plain or DeepSpeed model.
        read: returns a tensor by its name in the plain model's state dict, such as the state dict's `__getitem__`.
    """
    for name, weight in plain_named_tensors(model):
        weight.copy_(read(name))


def plain_names_of(model: nn.Module, name: str) -> tuple[str, ...]:
    """Plain names of the contents of a parameter of a plain or DeepSpeed model: one per expert, or its own name."""
    if not is_stacked(name):
        return (name,)
    block, _, path = name.partition(".moe.")
    moe = model.get_submodule(f"{block}.moe")
    # The module knows the number: a parameter that an engine has partitioned is empty.
    experts = cast(Experts, moe.get_submodule(path.rpartition(".")[0]))
    return plain_names(name, cast(int, moe.first_expert), experts.num_experts)


def mix_experts(
    router: Router,
    hidden_states: Tensor,
    modality_ids: Tensor,
    attention_mask: Tensor | None,
    apply_experts: Callable[[Tensor, Tensor], Tensor],
    view_sizes: Sequence[int] | None,
    one_pass: bool,
    announce: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, ...]:
    """Steps shared by every MoE layer: route, dispatch, run the experts wherever they are, combine.

    If experts have a capacity, each view has its own capacity and therefore its own pass.

    Args:
        router: chooses experts.
        hidden_states, modality_ids, attention_mask: (..., D), (...) int64, (...) bool or None without padding.
        apply_experts: maps the expert buffer (R, D) and the (E,) int64 rows of each expert in it to the (R, D) outputs.
        view_sizes: token counts of V consecutive views. None means one view, and results without a view dimension.
        one_pass: whether the views are routed together, see :func:`packs_views`.
        announce: is given the (E,) int64 rows of each expert as early as possible, before each call of `apply_experts`.

    Returns:
        Arguments of :func:`moe_output`: tensors only, computed without a collective, so that all of this can compile.
    """
    x, ids = hidden_states.flatten(0, -2), modality_ids.flatten()
    valid = None if attention_mask is None else attention_mask.flatten()
    if view_sizes is None or one_pass:
        mixed, *sums = _mix(router, x, ids, valid, apply_experts, announce, view_sizes)
    else:
        sizes = list(view_sizes)
        no_masks = [None] * len(sizes)
        views = zip(x.split(sizes), ids.split(sizes), no_masks if valid is None else valid.split(sizes), strict=True)
        parts, *of_views = zip(*(_mix(router, *view, apply_experts, announce) for view in views), strict=True)
        mixed, sums = torch.cat(parts), [torch.stack(values) for values in of_views]
    return mixed.view_as(hidden_states), *sums


def _mix(
    router: Router,
    x: Tensor,
    modality_ids: Tensor,
    valid: Tensor | None,
    apply_experts: Callable[[Tensor, Tensor], Tensor],
    announce: Callable[[Tensor], None] | None,
    view_sizes: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Route tokens (T, D) once, run the experts and combine."""
    routed = router(x, modality_ids, valid, view_sizes, announce)
    routing = routed.routing
    rows = apply_experts(routed.rows, routed.rows_per_expert)
    mixed = ops.moe_combine(rows, routing.slots, routing.gates, routing.source)
    balance = torch.cat([routing.first_choices, routing.probability_sum, routed.num_tokens.unsqueeze(-1)], dim=-1)
    return mixed, balance, routing.z_sum, *routed.statistics


def moe_output(hidden_states: Tensor, balance: Tensor, z_sum: Tensor, *statistics: Tensor) -> MoEOutput:
    """MoEOutput from the parts that :func:`mix_experts` returns; each view is balanced separately.

    Args:
        hidden_states: see MoEOutput.
        balance: (2 E + 1) or (V, 2 E + 1) fp32 sums over the tokens that are balanced together, of this rank or of
            several: first choices by expert, probabilities by expert, and the number of tokens.
        z_sum: see MoEOutput.
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
    """Sums over tokens by view and modality, as one matrix product: counts are exact, and the host launches few ops."""
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
    """Copy statistics to the host in one transfer, because each transfer makes the host wait for the accelerator."""
    fields = [field for own in statistics for field in own]
    flat = torch.cat([field.flatten() for field in fields]).cpu() if fields else torch.empty(0)
    parts = iter(flat.split([field.numel() for field in fields]))
    return [RouterStatistics(*(next(parts).view_as(field) for field in own)) for own in statistics]


def router_metrics(statistics: RouterStatistics) -> dict[str, float]:
    """Readable metrics of one MoE layer, from statistics of one forward or summed over ranks and steps.

    Returns:
        `image_share`: share of image tokens among the routed tokens. `entropy`: mean over tokens of the entropy of the
        router's distribution, in nats, at most log(E). `dead_experts`: number of experts that no token chose.
        `max_load`: routes of the most chosen expert divided by the mean, 1 when balanced. `dropped_image`,
        `dropped_text`: share of a modality's routes that were dropped. `image_routes/e`, `text_routes/e`: routes of
        that modality that chose expert e, before dropping. A share of zero routes or tokens is 0.
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
